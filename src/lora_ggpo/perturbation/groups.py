"""Row statistics of all layers, computed together for layers of one shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import GGPOConfig, GradientEstimator
from .layers import PerturbedLayer, gradient, whole
from .noise import has_kernel
from .scales import lora_row_norms_squared, lstsq_row_norms_squared, tau_squared, weight_row_norms_squared
from .zero import gathered, is_cut


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
        layers = (tensor for layer in self.layers for tensor in (layer.w0_norms, layer.tau, layer.scale))
        return [tensor for tensor in (*own, *layers) if tensor is not None]

    def refresh(self, config: GGPOConfig, factor: float) -> None:
        """Noise sizes from the weights as they are now; ``factor`` is the schedule's, on sigma."""
        with torch.no_grad(), self._gathered():
            sb, a = self._columns(whole) * self.s[:, None], self._rows(whole)
            dora = [whole(layer.magnitudes[0].weight) for layer in self.layers if layer.magnitudes]
            magnitudes = torch.stack(dora) if dora else None
        lora = weight_row_norms_squared(self.w0_norms, w0_terms(self.layers, sb, a), sb, a)
        if magnitudes is not None:
            # DoRA trains W' = diag(g) (W0 + sBA) with g = magnitude / ||W0 + sBA||, so that dL/d(W0 + sBA) = diag(g) G,
            # and noise put on W0 reaches W' times g.
            self.weight = magnitudes.to(lora).square()
            self.gain = (self.weight / lora).clamp_min(torch.finfo(lora.dtype).tiny)
            on_base = self.gain if self.layers[0].dora_scales_base_noise() else torch.ones_like(lora)
        else:
            self.weight, on_base = lora, torch.ones_like(lora)
        tau2, guided = tau_squared(config, self.weight, self.gradient, self.n)
        self.tau2, self.guided = tau2 * factor**2, guided * factor**2
        # Of weights whose squares overflow no noise is made; Watch says that training diverges.
        sizes = (self.tau2 / on_base).sqrt().nan_to_num(0.0, 0.0)
        for layer, tau in zip(self.layers, sizes, strict=True):
            layer.tau = tau if factor > 0 else None

    def capture(self, config: GGPOConfig) -> None:
        """Take the estimate of ||G_i||^2 from the gradients that A and B hold now."""
        norms = self.estimate(config.gradient)
        self.pending = norms if self.gain is None else norms / self.gain

    def estimate(self, estimator: GradientEstimator) -> Tensor:
        """||dL/d(W0 + sBA)_i||^2 (L, m) by the estimator, from the gradients that A and B hold now."""
        with self._gathered():
            a = self._rows(whole)
            b = self._columns(whole) if estimator == "lora" else None
        db = self._columns(gradient)
        if b is None:
            return lstsq_row_norms_squared(a, db, self.s)
        return lora_row_norms_squared(b, a, db, self._rows(gradient), self.s)

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

    def _gathered(self) -> AbstractContextManager[None]:
        if not self.cut:
            return nullcontext()
        # To read each from its module anew is what makes ZeRO wait for those that it fetches ahead already.
        return gathered(parameter for layer in self.layers for parameter in layer.trained())

    def _columns(self, read: Callable[[Tensor], Tensor]) -> Tensor:
        """B of all layers (L, m, r), or its gradients; active adapters side by side."""
        return self._stacked((layer.b for layer in self.layers), read, 1)

    def _rows(self, read: Callable[[Tensor], Tensor]) -> Tensor:
        """A of all layers (L, r, n), or its gradients; active adapters one upon the other."""
        return self._stacked((layer.a for layer in self.layers), read, 0)

    def _stacked(self, factors: Iterable[list[Any]], read: Callable[[Tensor], Tensor], dim: int) -> Tensor:
        parts = ([read(module.weight) for module in modules] for modules in factors)
        joined = [part[0] if len(part) == 1 else torch.cat(part, dim) for part in parts]
        return torch.stack(joined).to(self.w0_norms.dtype)


def w0_terms(layers: list[PerturbedLayer], sb: Tensor, a: Tensor) -> Tensor:
    """(s B_i) . (W0 A^T)_i (L, m) of layers of one shape, for s B (L, m, r) and A (L, r, n)."""
    if has_kernel(a.device) and a.dtype == torch.float32 and all(layer.has_whole_w0() for layer in layers):
        weights = [layer.w0() for layer in layers]
        if {(w.device, w.dtype, w.stride()) for w in weights} == {(a.device, weights[0].dtype, weights[0].stride())}:
            from .kernel import w0_terms_at_once

            return w0_terms_at_once(weights, sb, a)
    # W0's product takes the view A^T as it is: a copy with rows of r entries takes twice the time.
    products = torch.stack([layer.times(rows.t()) for layer, rows in zip(layers, a, strict=True)])
    return (sb * products).sum(-1)


def grouped(layers: list[PerturbedLayer]) -> list[LayerGroup]:
    """Group the layers that have an active adapter; the others get no noise."""
    by_shape: dict[tuple[object, ...], list[PerturbedLayer]] = defaultdict(list)
    for layer in layers:
        layer.tau = None
        layer.follow()
        if layer.a:
            kind = (bool(layer.magnitudes), layer.dora_scales_base_noise(), layer.dtype, layer.w0_norms.device)
            by_shape[(layer.m, layer.n, *layer.ranks(), *kind)].append(layer)
    return [_group(members) for members in by_shape.values()]


def _group(layers: list[PerturbedLayer]) -> LayerGroup:
    w0_norms = torch.stack([layer.w0_norms for layer in layers])
    s = w0_norms.new_tensor([layer.column_scaling() for layer in layers])
    cut = any(is_cut(parameter) for layer in layers for parameter in layer.trained())
    return LayerGroup(layers, w0_norms, s, cut)


def summary(groups: list[LayerGroup], reached: Set[int]) -> dict[str, float]:
    """Size of the noise and share of the gradient in it, over all layers and over each group of equally named ones.

    A layer whose index is not in ``reached`` had none: its weight counts, with noise of size 0.
    """
    sums: dict[str, Tensor] = {}
    for group in groups:
        if group.tau2 is None or group.guided is None or group.weight is None:
            continue
        there = group.tau2.new_tensor([[layer.index in reached] for layer in group.layers])
        tau2, guided = group.tau2 * there, group.guided * there
        parts = (guided, tau2, group.n * tau2, group.weight, torch.ones_like(tau2))
        table = torch.stack([part.sum(-1) for part in parts], -1).double().cpu()
        for layer, row in zip(group.layers, table, strict=True):
            for key in ("", layer.name.rpartition(".")[2] + "/"):
                sums[key] = sums.get(key, torch.zeros(5, dtype=torch.float64)) + row
    metrics = {}
    for key, total in sums.items():
        guided_sum, tau2_sum, energy, weight, rows = total.tolist()
        metrics[f"ggpo/{key}gradient_share"] = guided_sum / tau2_sum if tau2_sum else 0.0
        metrics[f"ggpo/{key}relative_noise"] = (energy / weight) ** 0.5 if weight else 0.0
        metrics[f"ggpo/{key}tau"] = (tau2_sum / rows) ** 0.5
    return metrics
