"""LoRA-GGPO on a PEFT model: attach, step, detach."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .config import GGPOConfig
from .layers import PerturbedLayer, find_layers
from .noise import noise_table
from .passes import Passes, tied_tensors
from .scales import ramp
from .statistics import LayerGroup, grouped, summary
from .zero import StepHook, zero_optimizer

NEGLIGIBLE_SHARE = 1e-3
"""Share of the gradient term in tau^2 under which ``rule="paper"`` is numerically Flat-LoRA's noise."""

SHARE_WARNING_STEPS = 20
"""Optimizer steps after which the share is judged."""


class GGPO:
    r"""Train the active LoRA adapters of a PEFT model on E_eps[ L(W0 + s B A + eps) ].

    eps_ij ~ N(0, tau_i^2) is drawn for every forward pass in training mode with gradients, tau_i^2 = (sigma^2 / n)
    (||W'_i||^2 + beta ||G_i||^2) or another rule of :func:`~lora_ggpo.perturbation.scales.tau_squared`, and G = dL/dW'
    of the optimizer step before: the accumulated, unclipped gradient, estimated from the gradients of A and B (arXiv
    2502.14538)::

        ggpo = GGPO(model, GGPOConfig(sigma=0.03))
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            ggpo.step()
            optimizer.zero_grad()
        ggpo.detach()

    Gradient norms are read as each ``backward()`` ends, so :meth:`step` may come before or after clipping, the
    optimizer's step and ``zero_grad``. W0 is never written, and evaluation, ``torch.no_grad()`` (a reference model's
    pass, ``generate()``), ``disable_adapter()`` and saving see the plain model.

    Args:
        model: A PEFT model, or any module with PEFT LoRA layers inside. Its own ``forward`` must be the one called.
        config: The settings; None is the defaults.
        total_steps: Number of optimizer steps of the run; needed by a ramp schedule only.
        optimizer: The one that ``deepspeed.initialize`` or ``accelerator.prepare`` returned; needed under DeepSpeed
            ZeRO only, where gradients are read as its step begins instead.

    Raises:
        ValueError: the model has no LoRA layer that can be perturbed, is perturbed already, or, with
            ``config.strict``, has one that cannot be; a ramp schedule has no ``total_steps``; or a model under ZeRO has
            no ``optimizer``.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GGPOConfig | None = None,
        total_steps: int | None = None,
        optimizer: Any = None,
    ) -> None:
        self.config = config or GGPOConfig()
        self.total_steps = total_steps
        ramp(self.config.schedule, 0, total_steps)
        self._model = model
        self._passes = Passes()
        self.layers, skipped = find_layers(model, self.config.noise, self._passes)
        _check_layers(self.layers, skipped, self.config.strict)
        self._zero = zero_optimizer((p for layer in self.layers for p in layer.trained()), optimizer)
        self._groups: list[LayerGroup] = []
        self._adapters: list[Any] | None = None
        self._handles: list[Any] = []
        self._steps = self._forwards = self._draw = 0
        self._stale = True
        self._captured = self._warned = False
        self._highest_share = 0.0
        self._zero_scale = 1.0
        self._regroup()
        if self.config.sigma > 0:  # sigma = 0 must be plain LoRA bit for bit: nothing is attached at all
            self._attach()

    def step(self, grad_scale: float = 1.0) -> None:
        """Count an optimizer step; call it once after each.

        Args:
            grad_scale: The factor that a ``GradScaler`` put on the loss (``scaler.get_scale()`` before ``update()``).
        """
        self._warn_if_blind()
        for group in self._groups:
            group.commit(grad_scale * self._zero_scale, self.config.ema)
        self._steps += 1
        self._stale = True
        self._captured = False
        self._warn_if_negligible()

    def metrics(self) -> dict[str, float]:
        """Diagnostics of the noise in force: for all layers and for each group of equally named ones (``q_proj``).

        Keys: ``ggpo/gradient_share``, the share of the gradient term in the sum of tau^2; ``ggpo/relative_noise``,
        sqrt(E ||eps||^2) / ||W'||; ``ggpo/tau``, the root mean square of tau; each again as ``ggpo/<group>/...``.
        Empty until the first forward pass in training mode with gradients.
        """
        return summary(self._groups)

    def memory(self) -> dict[str, int]:
        """Bytes that the method keeps: the ``table`` of noise that all layers read, row ``statistics``, and the
        ``block`` of a noisy weight that is formed at a time. The first and the last are 0 if nothing was attached."""
        layers = self.layers if self.config.sigma > 0 else []
        tables = {layer.w0_norms.device for layer in layers if layer.noise == "table"}
        return {
            "table": sum(noise_table(device).nbytes for device in tables),
            "statistics": sum(tensor.nbytes for group in self._groups for tensor in group.tensors()),
            "block": max((layer.block_bytes() for layer in layers), default=0),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """What exact resumption needs beyond the adapter: counters (int64) and ||G_i||^2 (m,) of each layer."""
        state = {"steps": torch.tensor(self._steps), "forwards": torch.tensor(self._forwards)}
        for group in self._groups:
            if group.gradient is not None:
                for layer, norms in zip(group.layers, group.gradient, strict=True):
                    state[f"gradient_norms_squared.{layer.name}"] = norms.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: the state is of another model.
        """
        norms = {key.partition(".")[2]: value for key, value in state.items() if "." in key}
        shapes = {layer.name: (layer.m,) for layer in self.layers}
        for name, value in norms.items():
            if shapes.get(name) != value.shape:
                raise ValueError(f"the GGPO state is of another model: no layer {name} of {len(value)} rows here")
        self._steps, self._forwards = int(state["steps"]), int(state["forwards"])
        for group in self._groups:
            group.load(norms)
        self._stale = True

    def detach(self) -> None:
        """Remove every trace from the model: afterwards it is the stock PEFT model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self.layers:
            layer.detach()

    def _attach(self) -> None:
        for layer in self.layers:
            layer.attach()
        self._handles = [
            self._model.register_forward_pre_hook(self._before_forward),
            self._model.register_forward_hook(self._after_forward, always_call=True),
        ]
        if self._zero is not None:
            self._handles.append(StepHook(self._zero, self._capture))

    def _regroup(self) -> None:
        """Follow a change of the active adapter: shapes, and what a gradient norm belongs to, change with it."""
        first = self.layers[0]
        made = (first.module.lora_A[name] for name in first.adapters())  # one can be made anew under its name
        active = [*first.module.active_adapters, *made]
        if active != self._adapters:
            self._adapters, self._groups, self._stale = active, grouped(self.layers), True

    @torch.compiler.disable
    def _before_forward(self, model: nn.Module, args: Any) -> None:
        if not self._passes.begin(model.training):
            return
        self._forwards += 1
        self._regroup()
        if self._stale:
            factor = ramp(self.config.schedule, self._steps, self.total_steps)
            for group in self._groups:
                group.refresh(self.config, factor)
            self._stale = False
        by_step = self.config.redraw == "optimizer-step"
        self._redraw(self._own(self._steps) if by_step else self._own(self._forwards - 1) + 1)

    def _own(self, draw: int) -> int:
        """This process's number of the draw that is the run's ``draw``-th."""
        if self.config.ranks == "agree" or not (distributed.is_available() and distributed.is_initialized()):
            return draw
        return draw * distributed.get_world_size() + distributed.get_rank()

    @torch.compiler.disable
    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        """Tie the output to its draw: when its gradient arrives, the layers that gradient checkpointing runs again
        must see the noise of this forward pass, even if others have run since."""
        if not self._passes.end():
            return
        draw = self._draw

        def on_gradient(_: Tensor) -> None:
            if self._draw != draw:
                self._redraw(draw)
            self._passes.enter_backward(self._after_backward)

        for tensor in tied_tensors(output):
            tensor.register_hook(on_gradient)

    def _after_backward(self) -> None:
        if self._zero is None:
            self._capture()

    def _redraw(self, draw: int) -> None:
        self._draw = draw
        for layer in self.layers:
            layer.redraw(self.config.seed, draw)

    def _capture(self) -> None:
        """Read the gradients accumulated so far, as a backward pass ends: before clipping can change them."""
        self._captured = True
        if self._zero is not None:
            self._zero_scale = float(self._zero.loss_scale)
        with torch.no_grad():
            for group in self._groups:
                group.capture(self.config)

    def _warn_if_blind(self) -> None:
        if self._captured or self._warned or not self._handles:
            return
        self._warned = True
        warnings.warn(
            "GGPO saw no gradient before step(): call the forward of the very model that was given to GGPO, in "
            "training mode and with gradients, let it return tensors (in tuples, lists, dictionaries or objects), and "
            "step() after backward()",
            stacklevel=3,
        )

    def _warn_if_negligible(self) -> None:
        if self.config.rule != "paper" or self.config.beta == 0 or self._steps > SHARE_WARNING_STEPS:
            return
        self._highest_share = max(self._highest_share, self.metrics().get("ggpo/gradient_share", 0.0))
        if self._steps == SHARE_WARNING_STEPS and 0 < self._highest_share < NEGLIGIBLE_SHARE:
            warnings.warn(
                f'rule="paper" with beta={self.config.beta:g}: the gradient term made at most '
                f"{self._highest_share:.1e} of the noise variance in {self._steps} steps, so the noise is Flat-LoRA's; "
                'use rule="relative" for guidance that counts',
                stacklevel=3,
            )


def _check_layers(layers: list[PerturbedLayer], skipped: list[tuple[str, str]], strict: bool) -> None:
    if skipped:
        names = "; ".join(f"{name} ({reason})" for name, reason in skipped[:3])
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        message = f"GGPO cannot perturb {names}{more}"
        if strict:
            raise ValueError(f"{message}; leave them out of target_modules, or set strict=False to train them plainly")
        if layers:
            warnings.warn(f"{message}: trained without noise", stacklevel=3)
    if not layers:
        raise ValueError(
            "GGPO found no LoRA layer on a linear base layer in this model; add an adapter with PEFT first"
        )
    if any(isinstance(layer.base.__dict__.get("forward"), PerturbedLayer) for layer in layers):
        raise ValueError("the model is perturbed already; detach() the first GGPO before attaching another")
