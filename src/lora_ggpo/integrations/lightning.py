"""GGPO in a Lightning Trainer: one callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftMixedModel, PeftModel
from torch import nn

from ..perturbation import GGPO, GGPOConfig

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback


class GGPOLightningCallback(Callback):  # type: ignore[misc]
    """Perturbs the PEFT model in a LightningModule from the beginning of training to its end::

        Trainer(callbacks=[GGPOLightningCallback(GGPOConfig(sigma=0.03, rule="relative", beta=0.5))])

    The metrics of :meth:`GGPO.metrics` are logged every ``log_every_n_steps``. The state is part of each checkpoint, so
    ``fit(ckpt_path=...)`` continues exactly. Accumulation, clipping, DDP and the loss scale of ``16-mixed`` need
    nothing more.

    Args:
        config: The settings; None is the defaults.
        model: The name of the submodule with the adapter, as ``get_submodule`` takes it, whose own ``forward`` the
            training step calls; None looks for the one PEFT model in the module.

    Raises:
        ValueError: as training begins, by :class:`GGPO`, or because the module has no PEFT model, or several.
    """

    def __init__(self, config: GGPOConfig | None = None, model: str | None = None) -> None:
        self.config = config or GGPOConfig()
        self.model = model
        self.ggpo: GGPO | None = None
        self._saved: Mapping[str, Any] = {}
        self._grad_scale: float | None = None  # of the optimizer step that has not been counted yet

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        model = pl_module.get_submodule(self.model) if self.model else _peft_model(pl_module)
        total = trainer.estimated_stepping_batches
        self.ggpo = GGPO(model, self.config, total_steps=int(total) if total != float("inf") else None)
        if self._saved:
            self.ggpo.load_state_dict(self._saved)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._grad_scale = scaler.get_scale() if scaler is not None else 1.0
        if not pl_module.automatic_optimization:  # a batch may have several steps
            self._step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        stepped = self._grad_scale is not None or not pl_module.automatic_optimization
        self._step()
        every = trainer.log_every_n_steps
        if self.ggpo and stepped and every and trainer.global_step % every == 0:
            self.log_dict(self.ggpo.metrics())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        return dict(self.ggpo.state_dict()) if self.ggpo else dict(self._saved)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._saved = state_dict

    def _step(self) -> None:
        if self.ggpo and self._grad_scale is not None:
            self.ggpo.step(self._grad_scale)
            self._grad_scale = None

    def _detach(self) -> None:
        if self.ggpo:
            self.ggpo.detach()


def _peft_model(module: nn.Module) -> nn.Module:
    found = [name for name, inner in module.named_modules() if isinstance(inner, PeftModel | PeftMixedModel)]
    if len(found) != 1:
        there = f"the PEFT models {', '.join(found)}" if found else "no PEFT model"
        raise ValueError(
            f"{type(module).__name__} has {there}: name the one to perturb, GGPOLightningCallback(config, model=...)"
        )
    return module.get_submodule(found[0])
