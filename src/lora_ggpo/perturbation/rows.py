"""Row norms and noise sizes of all layers, computed together for layers of one shape."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import GGPOConfig
from .layers import PerturbedLayer, weight_of
from .noise import Factors, has_kernel, mean_over_processes
from .scales import ESTIMATORS, RULES, Norms, product_row_norms_squared, weight_row_norms_squared
from .weights import whole
from .zero import full_gradient, gather, is_cut, is_zero


@dataclass
class LayerGroup:
    """L layers of one shape and rank on one device; all row statistics are (L, m)."""

    layers: list[PerturbedLayer]
    w0_norms: Tensor  # ||W0_i||^2
    s: Tensor  # (L, r) scaling of each column of B
    cut: bool  # whether ZeRO-3 has cut what is trained
    pending: Tensor | None = None  # ||G_i||^2 of the backward passes since the last optimizer step
    gradient: Tensor | None = None  # ||G_i||^2 of the last optimizer step, or their moving average
    weight: Tensor | None = None  # ||W'_i||^2
    tau2: Tensor | None = None  # variance of the noise on W'
    guided: Tensor | None = None  # the part of tau2 due to the gradient
    gain: Tensor | None = None  # DoRA's squared row scale ||W'_i||^2 / ||(W0 + sBA)_i||^2; None for plain LoRA

    @property
    def n(self) -> int:
        return self.layers[0].n

    def tensors(self) -> list[Tensor]:
        """All statistics that are kept, those of the layers included."""
        own = (self.w0_norms, self.s, self.pending, self.gradient, self.weight, self.tau2, self.guided, self.gain)
        layers = (tensor for layer in self.layers for tensor in (layer.w0_norms, layer.tau, *(layer.sketch or ())))
        return [tensor for tensor in (*own, *layers) if tensor is not None]

    def estimator(self, chosen: str) -> str:
        """The estimator of ||G_i||^2 for these layers: those without gradients of A and B have the one that
        needs none."""
        return chosen if self.layers[0].has_gradients() else "sketch"

    def refresh(self, config: GGPOConfig, factor: float) -> None:
        """Noise sizes from the weights as they are now; ``factor`` is the schedule's, on sigma."""
        self.weight = self._weight_norms()
        norms = Norms(self.weight, self.gradient, self.w0_norms, self._product_norms, self.n)
        tau2, guided = RULES[config.rule].tau_squared(config.sigma, config.beta, norms)
        self.tau2, self.guided = tau2 * factor**2, guided * factor**2
        # Of weights whose squares overflow no noise is made; Watch says that training diverges.
        sizes = self.tau2.sqrt().nan_to_num(0.0, 0.0)
        for layer, tau in zip(self.layers, sizes, strict=True):
            layer.tau = tau

    def _weight_norms(self) -> Tensor:
        """||W'_i||^2; of an adapter without thin factors ||W0_i||^2 stands for it."""
        if not self.layers[0].a:
            return self.w0_norms
        sb, a = self.b() * self.s[:, None], self.a()
        lora = weight_row_norms_squared(self.w0_norms, w0_terms(self.layers, sb, a), sb, a)
        if not self.layers[0].magnitudes:
            return lora
        # DoRA trains W' = diag(g) (W0 + sBA) with g = magnitude / ||W0 + sBA||, so that dL/d(W0 + sBA) = diag(g) G.
        weight = self._stacked("magnitudes", _value, 0).flatten(1).square()
        self.gain = (weight / lora).clamp_min(torch.finfo(lora.dtype).tiny)
        return weight

    def _product_norms(self) -> Tensor:
        """||(B A)_i||^2."""
        return product_row_norms_squared(self.b(), self.a()) if self.layers[0].a else torch.zeros_like(self.w0_norms)

    def draw_sketches(self, rank: int, generator: torch.Generator) -> None:
        """A new R (k, n) and S = 0 (m, k) for each layer, to be held by it for an optimizer step."""
        for layer in self.layers:
            device, dtype = layer.w0_norms.device, layer.w0_norms.dtype
            r = torch.randn(rank, layer.n, generator=generator).to(device, dtype)
            layer.sketch = Factors(r, torch.zeros(layer.m, rank, device=device, dtype=dtype, requires_grad=True))

    def capture(self, estimator: str) -> None:
        """Take the estimate of ||G_i||^2 from the gradients that A and B, or the sketches, hold now."""
        norms = ESTIMATORS[estimator](self)
        # DoRA's A and B have gradients of dL/d(W0 + sBA); a sketch is of dL/dW' itself.
        self.pending = norms if self.gain is None or estimator == "sketch" else norms / self.gain

    def commit(self, grad_scale: float, ema: float) -> None:
        """Make the captured norms those of the last optimizer step; a step of non-finite gradients is passed over."""
        if self.pending is None:
            return
        norms, self.pending = self.pending / grad_scale**2, None
        before = torch.zeros_like(norms) if self.gradient is None else self.gradient
        # An average begins at the first gradient, also when steps before it were passed over.
        after = torch.where(before.any(), ema * before + (1 - ema) * norms, norms)
        self.gradient = torch.where(norms.isfinite().all(), after, before)

    def load(self, norms: Mapping[str, Tensor]) -> None:
        """Restore ||G_i||^2 (m,) by layer name; without them the gradient term starts at 0 again."""
        rows = [norms[layer.name] for layer in self.layers if layer.name in norms]
        self.gradient = torch.stack(rows).to(self.w0_norms) if len(rows) == len(self.layers) else None
        self.pending = None

    def a(self) -> Tensor:
        """A of all layers (L, r, n); active adapters one upon the other."""
        return self._stacked("a", _value, 0)

    def b(self) -> Tensor:
        """B of all layers (L, m, r); active adapters side by side."""
        return self._stacked("b", _value, 1)

    def da(self) -> Tensor:
        """dL/dA of all layers (L, r, n)."""
        return self._stacked("a", _gradient, 0)

    def db(self) -> Tensor:
        """dL/dB of all layers (L, m, r)."""
        return self._stacked("b", _gradient, 1)

    def sketches(self) -> Tensor:
        """G R^T of all layers (L, m, k), averaged over processes as gradients are."""
        own = [layer.sketch.u for layer in self.layers if layer.sketch is not None]
        return mean_over_processes(torch.stack([torch.zeros_like(s) if s.grad is None else s.grad for s in own]))

    @torch.no_grad()
    def _stacked(self, factor: str, read: Callable[[Tensor], Tensor], dim: int) -> Tensor:
        modules = [getattr(layer, factor) for layer in self.layers]
        # To read each weight from its module anew is what makes ZeRO wait for those that it fetches ahead already.
        cut = [weight_of(one) for layer in modules for one in layer] if self.cut and read is _value else []
        with gather(cut):
            parts = [[read(weight_of(one)) for one in layer] for layer in modules]
            joined = [part[0] if len(part) == 1 else torch.cat(part, dim) for part in parts]
            return torch.stack(joined).to(self.w0_norms.dtype)


def _value(parameter: Tensor) -> Tensor:
    return whole(parameter).flatten(1) if parameter.dim() > 2 else whole(parameter)


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient of the global batch, put together; 0 where none has arrived."""
    if is_zero(parameter):
        return full_gradient(parameter)
    return _value(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


def w0_terms(layers: list[PerturbedLayer], sb: Tensor, a: Tensor) -> Tensor:
    """(s B_i) . (W0 A^T)_i (L, m) of layers of one shape, for s B (L, m, r) and A (L, r, n)."""
    if has_kernel(a.device) and a.dtype == torch.float32 and all(layer.w0.is_plain() for layer in layers):
        weights = [layer.w0.matrix() for layer in layers]
        if {(w.device, w.dtype, w.stride()) for w in weights} == {(a.device, weights[0].dtype, weights[0].stride())}:
            from .kernel import w0_terms_at_once

            return w0_terms_at_once(weights, sb, a)
    # W0's product takes the view A^T as it is: a copy with rows of r entries takes twice the time.
    products = torch.stack([layer.w0.times(rows.t()) for layer, rows in zip(layers, a, strict=True)])
    return (sb * products).sum(-1)


def group_layers(layers: list[PerturbedLayer]) -> list[LayerGroup]:
    """Group the layers that have an active adapter; the others get no noise."""
    by_shape: dict[tuple[object, ...], list[PerturbedLayer]] = defaultdict(list)
    for layer in layers:
        layer.tau = None
        layer.follow()
        if layer.names:
            kind = (bool(layer.magnitudes), layer.has_gradients(), layer.w0.dtype, layer.w0_norms.device)
            by_shape[(layer.m, layer.n, *layer.ranks(), *kind)].append(layer)
    return [_group(members) for members in by_shape.values()]


def _group(layers: list[PerturbedLayer]) -> LayerGroup:
    w0_norms = torch.stack([layer.w0_norms for layer in layers])
    s = w0_norms.new_tensor([layer.column_scaling() for layer in layers])
    return LayerGroup(layers, w0_norms, s, any(is_cut(p) for layer in layers for p in layer.trained()))


def gradient_norm_squared(layers: list[PerturbedLayer]) -> float:
    """The squared norm of all gradients that the layers hold."""
    gradients = [p.grad for layer in layers for p in layer.trained() if p.grad is not None]
    return float(sum(whole(gradient).double().square().sum() for gradient in gradients))


def clip_factor(read: float, now: float, scale: float) -> float:
    """What clipping has multiplied gradients with since they were read; 1 if they are gone.

    Args:
        read: Their squared norm as they were read, with the loss's ``scale`` on them.
        now: Their squared norm now. An optimizer of a scaler has divided the scale out; one without may not have.
        scale: The factor that is on the loss.
    """
    ratio = now / read if now and read else 1 / scale**2
    unscaled = ratio * scale**2
    return math.sqrt(ratio if unscaled > 1.01 else unscaled)  # clipping makes nothing larger
