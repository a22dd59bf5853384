"""LoRA-GGPO on a PEFT model: attach, step, detach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .compiled import draw, no_graph_of_its_own, register
from .config import GGPOConfig
from .find import DATA_PARALLEL, check_layers, find_layers, in_training, report_skipped
from .linear import autocast_dtype
from .noise import NOISES, Noise, Seeded, buckets, joint_factors, mix, own_number, split_factors
from .passes import Passes, tied_tensors
from .rise import Rise
from .rows import LayerGroup, clip_factor, gradient_norm_squared, group_layers
from .scales import RULES, ramp
from .watch import Coverage, Watch, noise_metrics, report_blind
from .zero import StepHook, zero_optimizer

_SKETCH = 0x536B


class GGPO:
    r"""Train the active adapters of a PEFT model on E_eps[ L(W' + eps) ]; for LoRA W' = W0 + s B A.

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
        model: One with layers of PEFT, or of ``register_layer``, inside. Its own ``forward`` must be the one called.
        config: The settings; None is the defaults.
        total_steps: Number of optimizer steps of the run; needed by a ramp schedule only.
        optimizer: The one that ``deepspeed.initialize`` or ``accelerator.prepare`` returned; needed under DeepSpeed
            ZeRO only, where gradients are read as its step begins instead.

    Raises:
        ValueError: the model has no adapted layer that can be perturbed, is perturbed already, or, with
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
        self.layers, self.skipped = find_layers(model, self._passes)
        check_layers(model, self.layers, self.skipped)
        report_skipped(self.skipped, self.config.strict)
        self._zero = zero_optimizer((p for layer in self.layers for p in layer.trained()), optimizer)
        self._handles: list[Any] = []
        self._watched: list[Any] = []
        self._number, self._counter = register(self), torch.zeros((), dtype=torch.int64)
        self._rise = Rise(self.config.rise, self.config.sigma) if self.config.rise else None
        self._measures = False
        self._drawn_in_graph = self.config.noise == "factored" and self._rise is None  # a graph cannot run itself again
        self._steps = self._forwards = 0
        self._drawn: list[Noise] = []
        self._stale = True
        self._captured = self._warned = False
        self._zero_scale = 1.0
        self._norm_squared = 0.0  # of the gradients as they were read
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
        self._capture_late()
        self._coverage.step(self._groups)
        scale = grad_scale * self._zero_scale
        if RULES[self.config.rule].clipped:
            scale /= clip_factor(self._norm_squared, gradient_norm_squared(self.layers), scale)
        for group in self._groups:
            group.commit(scale, self.config.ema)
        self._steps += 1
        self._draw_sketches()
        self._stale = True
        self._captured = False
        self._watch.step(self._groups, self._steps)

    def metrics(self) -> dict[str, float]:
        """Diagnostics of the last training pass: for all layers and for each group of equally named ones (``q_proj``).

        Keys: ``ggpo/gradient_share``, the share of the gradient term in the sum of tau^2; ``ggpo/relative_noise``,
        sqrt(E ||eps||^2) / ||W'||; ``ggpo/tau``, the root mean square of tau; each again as ``ggpo/<group>/...``. A
        layer that the pass did not reach counts as one without noise. ``ggpo/coverage`` is the share of the adapted
        layers that it reached, ``ggpo/coverage_parameters`` that of the entries of their weights. Empty until the
        first forward pass in training mode with gradients. With ``config.rise`` also ``ggpo/sigma``, where sigma has
        been steered to, and ``ggpo/rise``, the rise that was measured last.

        Raises:
            FloatingPointError: the squares of the adapted weights are not finite.
        """
        self._watch.look(self._groups)
        steered = self._rise.metrics(self.config.sigma) if self._rise else {}
        return self._coverage.metrics() | noise_metrics(self._groups) | steered

    def memory(self) -> dict[str, int]:
        """Bytes that the method keeps: the ``factors`` of the last draw, row ``statistics``, and the ``block`` of a
        noisy weight that dense noise forms at a time. All are 0 before the first pass, or if nothing was attached."""
        factors = [tensor for noise in self._drawn if not isinstance(noise, Seeded) for tensor in noise or ()]
        seeded = any(isinstance(noise, Seeded) for noise in self._drawn)
        return {
            "factors": sum(tensor.nbytes for tensor in factors),
            "statistics": sum(tensor.nbytes for group in self._groups for tensor in group.tensors()),
            "block": max(layer.block_bytes() for layer in self.layers) if seeded else 0,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """What exact resumption needs beyond the adapter: counters (int64), ||G_i||^2 (m,) of each layer, and
        what steers sigma."""
        state = {"steps": torch.tensor(self._steps), "forwards": torch.tensor(self._forwards)}
        state |= {"rise": self._rise.state()} if self._rise else {}
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
        if self._rise is not None:
            self._rise.load(state.get("rise"))
        for group in self._groups:
            group.load(norms)
        self._draw_sketches()
        self._stale = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # of a copy, which draws for itself
        self._number = register(self)

    def detach(self) -> None:
        """Remove every trace from the model: afterwards it is the stock PEFT model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._unwatch()
        for layer in self.layers:
            layer.detach()

    def _attach(self) -> None:
        for layer in self.layers:
            layer.attach()
        self._handles = [
            self._model.register_forward_pre_hook(self._before_forward),
            self._model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]
        if self._zero is not None:
            self._handles.append(StepHook(self._zero, self._capture))

    def _follow(self) -> None:
        """Take up what has changed in the model: other active adapters always, anything else once an optimizer step,
        and in the first layer always."""
        others = any(layer.has_other_names() for layer in self.layers)
        if not others and not any(layer.has_changed() for layer in (self.layers if self._stale else self.layers[:1])):
            return
        known = {skipped.name for skipped in self.skipped}
        self.layers, self.skipped = find_layers(self._model, self._passes, self.layers)
        report_skipped([skipped for skipped in self.skipped if skipped.name not in known], self.config.strict)
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
        self._active = [layer for layer in self.layers if layer.names]
        for group in self._groups:
            group.load(kept)
        self._coverage.set_layers(self._groups, self.skipped)
        self._draw_sketches()
        self._unwatch()

    @no_graph_of_its_own
    def _before_forward(self, model: nn.Module, args: Any) -> None:
        if not (torch.compiler.is_compiling() and self._drawn_in_graph):
            self._begin(model)
        elif model.training and torch.is_grad_enabled():
            self._show(self._draw_in_graph())

    @torch.compiler.disable
    def _begin(self, model: nn.Module) -> None:
        if self._measures:
            return
        if getattr(model, "_is_replica", False):
            raise RuntimeError(DATA_PARALLEL)
        if self._passes.begin(in_training(model, self.layers)):
            config, number = self.config, self._advance()
            self._drawn = NOISES[config.noise](self.layers, config.seed, number, config.noise_rank, autocast_dtype())
            self._show(self._drawn)
            if self._rise:
                self._rise.begin(self._steps)
        elif not self._passes.in_backward():
            self._show(None)

    def _advance(self) -> int:
        """Go on to the forward pass that begins, with sizes of now; returns the number of its draw."""
        self._forwards += 1
        self._follow()
        if self._stale:
            factor = ramp(self.config.schedule, self._steps, self.total_steps)
            factor *= 1.0 if self._rise is None else self._rise.apply(factor)
            for group in self._groups:
                group.refresh(self.config, factor)
            self._stale = False
        for layer in self.layers:
            layer.reached = layer.always_reached
        by_step = self.config.redraw == "optimizer-step"
        agree = self.config.ranks == "agree"
        return own_number(self._steps, agree) if by_step else own_number(self._forwards - 1, agree) + 1

    # A graph with the hooks in it has the operator `draw` in it, which calls draw_joint() whenever the graph runs.

    def _draw_in_graph(self) -> list[Noise]:
        self._follow_for_graph()
        self._counter += 1
        joint = draw(self._counter, self._number)
        return split_factors(self.layers, self._active, joint, self.config.noise_rank)

    @torch.compiler.assume_constant_result
    def _follow_for_graph(self) -> None:
        """Have the graph that is being traced draw for the adapters of now."""
        self._stale = True
        self._follow()

    def draw_joint(self) -> list[Tensor]:
        """The factors of a new draw, for a compiled forward pass."""
        number = self._advance()
        self._passes.any = True
        self._watch_gradients()
        return joint_factors(self._active, self.config.seed, number, self.config.noise_rank, None)

    def joint_shapes(self) -> list[tuple[torch.device, torch.dtype, tuple[int, ...]]]:
        """Device, dtype and shape of each tensor that :meth:`draw_joint` returns."""
        shapes: list[tuple[torch.device, torch.dtype, tuple[int, ...]]] = []
        rank = self.config.noise_rank
        for (device, dtype), members in buckets(self._active).items():
            shapes.append((device, dtype, (rank * sum(layer.n for layer in members),)))
            shapes.append((device, dtype, (rank, sum(layer.m for layer in members))))
        return shapes

    def _watch_gradients(self) -> None:
        """Have the parameters tell of their gradients: the output of a graph has no hook that would."""
        if not self._watched:
            parameters = [parameter for layer in self.layers for parameter in layer.trained()]
            self._watched = [p.register_post_accumulate_grad_hook(self._on_accumulated) for p in parameters]

    def _unwatch(self) -> None:
        for handle in self._watched:
            handle.remove()
        self._watched.clear()

    def _on_accumulated(self, _: Tensor) -> None:
        self._passes.enter_backward(self._after_backward, self._hide)

    def _hide(self) -> None:
        self._show(None)

    def _show(self, drawn: list[Noise] | None) -> None:
        """Have the layers use a draw, or none."""
        for layer, noise in zip(self.layers, drawn or [None] * len(self.layers), strict=False):
            layer.noise = noise

    def _draw_sketches(self) -> None:
        """The same R in all processes, whose gradients are averaged."""
        if self.config.sigma > 0:
            generator = torch.Generator().manual_seed(mix(self.config.seed, self._steps, _SKETCH))
            for group in self._sketching():
                group.draw_sketches(self.config.noise_rank, generator)

    def _sketching(self) -> list[LayerGroup]:
        chosen = self.config.gradient
        return [group for group in self._groups if group.estimator(chosen) == "sketch"] if self.config.beta > 0 else []

    @no_graph_of_its_own
    def _after_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() and self._drawn_in_graph:
            self._hide()
        else:
            self._end(model, args, kwargs, output)

    @torch.compiler.disable
    def _end(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Tie the output to its draw: when its gradient arrives, the layers that gradient checkpointing runs again
        must see the noise of this forward pass, even if others have run since."""
        if self._measures or not self._passes.end():
            return
        drawn = self._drawn
        if self._rise is not None and output is not None:
            self._rise.measure(output, drawn, lambda: model(*args, **kwargs), self._under)
        self._hide()

        def on_gradient(_: Tensor) -> None:
            self._show(drawn)
            self._passes.enter_backward(self._after_backward, self._hide)

        for tensor in tied_tensors(output):
            tensor.register_hook(on_gradient)

    @contextmanager
    def _under(self, drawn: list[Noise] | None) -> Iterator[None]:
        """A pass of the model that is not one of training, under a draw or none."""
        self._measures = self._passes.forward = True
        self._show(drawn)
        try:
            yield
        finally:
            self._measures = self._passes.forward = False

    def _after_backward(self) -> None:
        if self._zero is None:
            self._capture()

    def _capture(self) -> None:
        """Read the gradients accumulated so far, as a backward pass ends: before clipping can change them."""
        self._captured = True
        if self._zero is not None:
            self._zero_scale = float(self._zero.loss_scale)
        with torch.no_grad():
            for group in self._groups:
                if (estimator := group.estimator(self.config.gradient)) != "sketch":
                    group.capture(estimator)
        if RULES[self.config.rule].clipped:
            self._norm_squared = gradient_norm_squared(self.layers)
        self._coverage.note_gradients(always=self._zero is not None)

    def _capture_late(self) -> None:
        """Sketches, which no optimizer clips or clears, are read as the optimizer step is counted."""
        if self._captured:
            with torch.no_grad():
                for group in self._sketching():
                    group.capture("sketch")

    def _warn_if_blind(self) -> None:
        if not self._captured and not self._warned and self._handles:
            self._warned = True
            report_blind(self.config.strict)
