"""LoRA-GGPO on a PEFT model: attach, step, detach."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .config import GGPOConfig
from .find import DATA_PARALLEL, check_layers, find_layers, report_skipped
from .noise import NOISES
from .passes import Passes, tied_tensors
from .rows import LayerGroup, group_layers
from .scales import ramp
from .watch import Coverage, Watch, noise_metrics
from .zero import StepHook, zero_optimizer


class GGPO:
    r"""Train the active LoRA adapters of a PEFT model on E_eps[ L(W0 + s B A + eps) ].

    eps_ij ~ N(0, tau_i^2) is drawn for every forward pass in training mode with gradients, tau_i^2 = (sigma^2 / n)
    (||W'_i||^2 + beta ||G_i||^2) or another rule of :mod:`~lora_ggpo.perturbation.scales`, and G = dL/dW'
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
        self._coverage, self._watch = Coverage(self._passes, self.config.strict), Watch(self.config)
        self.layers, self._skipped = find_layers(model, self.config.noise, self._passes)
        check_layers(model, self.layers, self._skipped)
        report_skipped(self._skipped, self.config.strict)
        self._zero = zero_optimizer((p for layer in self.layers for p in layer.trained()), optimizer)
        self._handles: list[Any] = []
        self._steps = self._forwards = self._draw = 0
        self._stale = True
        self._captured = self._warned = False
        self._zero_scale = 1.0
        self._groups: list[LayerGroup] = []
        self._regroup()
        if self.config.sigma > 0:  # sigma = 0 must be plain LoRA bit for bit: nothing is attached at all
            self._attach()

    def step(self, grad_scale: float = 1.0, scaler: Any = None) -> None:
        """Count an optimizer step; call it once after each.

        Args:
            grad_scale: The factor that is on the loss.
            scaler: In place of it, the ``torch.amp.GradScaler`` that put it there, before its ``update()``; None is
                none, as ``accelerator.scaler`` has it.

        Raises:
            FloatingPointError: the adapted weights have become so large that their squares are not finite (looked for
                after each of the first 20 steps, after every 50th, and by :meth:`metrics`).
            RuntimeError: with ``config.strict``, a layer trains without the noise.
        """
        if scaler is not None:
            grad_scale = scaler.get_scale()
        self._warn_if_blind()
        self._coverage.step(self._groups)
        for group in self._groups:
            group.commit(grad_scale * self._zero_scale, self.config.ema)
        self._steps += 1
        self._stale = True
        self._captured = False
        self._watch.step(self._groups, self._steps)

    def metrics(self) -> dict[str, float]:
        """Diagnostics of the last training pass: for all layers and for each group of equally named ones (``q_proj``).

        Keys: ``ggpo/gradient_share``, the share of the gradient term in the sum of tau^2; ``ggpo/relative_noise``,
        sqrt(E ||eps||^2) / ||W'||; ``ggpo/tau``, the root mean square of tau; each again as ``ggpo/<group>/...``. A
        layer that the pass did not reach counts as one without noise. ``ggpo/coverage`` is the share of the adapted
        layers that it reached, ``ggpo/coverage_parameters`` that of the entries of their weights. Empty until the
        first forward pass in training mode with gradients.

        Raises:
            FloatingPointError: the squares of the adapted weights are not finite.
        """
        self._watch.look(self._groups)
        return self._coverage.metrics() | noise_metrics(self._groups, self._passes.reached)

    def memory(self) -> dict[str, int]:
        """Bytes that the method keeps: the ``table`` of noise that all layers read, row ``statistics``, and the
        ``block`` of a noisy weight that is formed at a time. The first and the last are 0 if nothing was attached."""
        layers = self.layers if self.config.sigma > 0 else []
        tables = {(NOISES[layer.noise].table, layer.w0_norms.device) for layer in layers}
        return {
            "table": sum(table(device).nbytes for table, device in tables if table),
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

    def _follow(self) -> None:
        """Take up what has changed in the model: looked for once an optimizer step, and by its first layer always."""
        if not any(layer.has_changed() for layer in (self.layers if self._stale else self.layers[:1])):
            return
        known = {skipped.name for skipped in self._skipped}
        self.layers, self._skipped = find_layers(self._model, self.config.noise, self._passes, self.layers)
        report_skipped([skipped for skipped in self._skipped if skipped.name not in known], self.config.strict)
        for layer in self.layers:
            layer.attach()
        self._regroup()

    def _regroup(self) -> None:
        """Sort the layers by what is active in them. A gradient norm belongs to the adapters that it was taken of."""
        kept: dict[str, Tensor] = {}
        for group in self._groups:
            if group.gradient is not None:
                rows = zip(group.layers, group.gradient, strict=True)
                kept |= {layer.name: row for layer, row in rows if not layer.has_other_factors()}
        self._groups, self._stale = group_layers(self.layers), True
        for group in self._groups:
            group.load(kept)
        self._coverage.set_layers(self._groups, self._skipped)

    @torch.compiler.disable
    def _before_forward(self, model: nn.Module, args: Any) -> None:
        if getattr(model, "_is_replica", False):
            raise RuntimeError(DATA_PARALLEL)
        if not self._passes.begin(model.training):
            return
        self._forwards += 1
        self._follow()
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
                group.capture(self.config.gradient)
        self._coverage.note_gradients(always=self._zero is not None)

    def _warn_if_blind(self) -> None:
        if self._captured or self._warned or not self._handles:
            return
        self._warned = True
        message = (
            "GGPO saw no gradient before step(): call the forward of the very model that was given to GGPO, in "
            "training mode and with gradients, let it return tensors (in tuples, lists, dictionaries or objects), and "
            "step() after backward()"
        )
        if self.config.strict:
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=3)
