"""GGPO in a ``transformers.Trainer`` (and TRL's trainers): one callback."""

from __future__ import annotations

import base64
import inspect
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from ..perturbation import GGPO, GGPOConfig
from ..perturbation.find import DATA_PARALLEL


class GGPOCallback(TrainerCallback, ExportableState):
    """Perturbs the Trainer's PEFT model from the beginning of training to its end::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[GGPOCallback(GGPOConfig(sigma=0.03))])

    Its diagnostics join the logged loss (``ggpo/gradient_share`` and others of :meth:`GGPO.metrics`), for trackers too:
    as training begins it moves before the other callbacks. Its state is part of each checkpoint's
    ``trainer_state.json``, so ``resume_from_checkpoint`` continues exactly.

    Args:
        config: The settings, also as the dictionary that a checkpoint holds; None is the defaults.

    Raises:
        ValueError: as training begins, by :class:`GGPO`, or because the Trainer would put the model into a
            ``DataParallel``, as it does on several GPUs without a launcher.
    """

    def __init__(self, config: GGPOConfig | Mapping[str, Any] | None = None) -> None:
        self.config = GGPOConfig.from_dict(config) if isinstance(config, Mapping) else config or GGPOConfig()
        self.ggpo: GGPO | None = None
        self._grad_scale = 1.0
        self._processes = 1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        # The Trainer shows callbacks the model inside; a quantised one it does not put into a DataParallel.
        quantised = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
        if args.n_gpu > 1 and not quantised:
            raise ValueError(DATA_PARALLEL)
        _move_first(self)
        self._detach()  # Ctrl-C skips on_train_end, and auto_find_batch_size begins again without it
        self.ggpo = GGPO(model, self.config, total_steps=state.max_steps, optimizer=kwargs.get("optimizer"))
        callbacks: Any = state.stateful_callbacks  # a dictionary by class name, whatever its annotation says
        # A checkpoint of a run without GGPO has no entry, and the Trainer fails to save one that is not there.
        saved = callbacks.setdefault(type(self).__name__, self.state())
        self._processes = args.world_size
        if state.global_step > 0:
            tensors, before = _decoded(saved["attributes"]["ggpo_state"]), saved["attributes"].get("processes")
            if before:  # draws are numbered through all processes: other ones take up where those before stopped
                tensors["forwards"] = tensors["forwards"] * before // self._processes
            self.ggpo.load_state_dict(tensors)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)  # accelerate's optimizer holds the fp16 loss scaler
        self._grad_scale = scaler.get_scale() if scaler is not None else 1.0

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.ggpo:
            self.ggpo.step(self._grad_scale)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if self.ggpo and "loss" in logs:
            metrics = self.ggpo.metrics()
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._detach()

    def _detach(self) -> None:
        if self.ggpo:
            self.ggpo.detach()

    def state(self) -> dict[str, Any]:
        """The configuration and, once training has begun, the state of :class:`GGPO` (for ``trainer_state.json``)."""
        tensors = self.ggpo.state_dict() if self.ggpo else {}
        attributes = {"ggpo_state": _encoded(tensors), "processes": self._processes}
        return {"args": {"config": self.config.to_dict()}, "attributes": attributes}


def _move_first(callback: TrainerCallback) -> None:
    """Have the callback called before all others: trackers come first, and see only what is in the log by then."""
    # A callback is not told of the handler that calls it: only the stack knows it.
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            # The handler is going through this list; what it has not called yet stays where it was.
            handler.callbacks.remove(callback)
            handler.callbacks.insert(0, callback)
            return
        frame = frame.f_back


def _encoded(tensors: dict[str, Tensor]) -> str:
    return base64.b64encode(safetensors.torch.save(tensors)).decode("ascii")


def _decoded(text: str) -> dict[str, Tensor]:
    return safetensors.torch.load(base64.b64decode(text))
