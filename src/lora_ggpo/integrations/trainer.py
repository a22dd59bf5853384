"""GGPO in a ``transformers.Trainer`` (and TRL's trainers): one callback."""

from __future__ import annotations

import base64
from typing import Any

import safetensors.torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..perturbation import GGPO, GGPOConfig


class GGPOCallback(TrainerCallback, ExportableState):
    """Perturbs the Trainer's PEFT model from the beginning of training to its end::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[GGPOCallback(GGPOConfig(sigma=0.03))])

    Its diagnostics join the logged loss (``ggpo/gradient_share`` and others of :meth:`GGPO.metrics`). Its state is
    part of each checkpoint's ``trainer_state.json``, so ``resume_from_checkpoint`` continues exactly.

    Args:
        config: The settings; None is the defaults.
    """

    def __init__(self, config: GGPOConfig | None = None) -> None:
        self.config = config or GGPOConfig()
        self.ggpo: GGPO | None = None
        self._grad_scale = 1.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        self.ggpo = GGPO(model, self.config, total_steps=state.max_steps)
        callbacks: Any = state.stateful_callbacks  # a dictionary by class name, whatever its annotation says
        saved = callbacks.get(type(self).__name__)
        if state.global_step > 0 and saved:
            self.ggpo.load_state_dict(_decoded(saved["attributes"]["ggpo_state"]))

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
        if self.ggpo:
            self.ggpo.detach()

    def state(self) -> dict[str, Any]:
        """The configuration and, once training has begun, the state of :class:`GGPO` (for ``trainer_state.json``)."""
        tensors = self.ggpo.state_dict() if self.ggpo else {}
        return {"args": self.config.to_dict(), "attributes": {"ggpo_state": _encoded(tensors)}}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> GGPOCallback:
        return cls(GGPOConfig.from_dict(state["args"]))


def _encoded(tensors: dict[str, Tensor]) -> str:
    return base64.b64encode(safetensors.torch.save(tensors)).decode("ascii")


def _decoded(text: str) -> dict[str, Tensor]:
    return safetensors.torch.load(base64.b64decode(text))
