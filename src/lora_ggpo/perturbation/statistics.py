"""Row statistics of all layers, computed together for layers of one shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import GGPOConfig
from .layers import PerturbedLayer
from .scales import gradient_row_norms_squared, tau_squared, weight_row_norms_squared
from .zero import gathered


@dataclass
class LayerGroup:
    """L layers of one shape and rank on one device; all row statistics are (L, m)."""

    layers: list[PerturbedLayer]
    w0_norms: Tensor  # ||W0_i||^2
    s: Tensor  # (L, r) scaling of each column of B
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
        with self._whole():
            b, a = self._stacked([layer.factors() for layer in self.layers])
            found = [magnitude for layer in self.layers if (magnitude := layer.magnitude()) is not None]
            magnitudes = torch.stack(found) if found else None
        lora = weight_row_norms_squared(self.w0_norms, w0_times(self.layers, a.mT), b * self.s[:, None], a)
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
        for layer, tau in zip(self.layers, (self.tau2 / on_base).sqrt(), strict=True):
            layer.tau = tau if factor > 0 else None

    def capture(self, config: GGPOConfig) -> None:
        """Estimate ||G_i||^2 from the gradients that A and B hold now."""
        with self._whole():
            b, a = self._stacked([layer.factors() for layer in self.layers])
        db, da = self._stacked([layer.gradients() for layer in self.layers])
        norms = gradient_row_norms_squared(config.gradient, b, a, db, da, self.s)
        self.pending = norms if self.gain is None else norms / self.gain

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

    def _whole(self) -> AbstractContextManager[None]:
        return gathered(parameter for layer in self.layers for parameter in layer.trained())

    def _stacked(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        b, a = (torch.stack(list(parts)).to(self.w0_norms.dtype) for parts in zip(*pairs, strict=True))
        return b, a


def w0_times(layers: list[PerturbedLayer], columns: Tensor) -> Tensor:
    """W0 C of each layer (L, m, k), for C (L, n, k).

    A 16-bit W0 on a GPU is read once and as it is: C is split in two 16-bit parts, which lose 2^-16 of it at most.
    """
    halves = [columns]
    if all(layer.takes_halves() for layer in layers):
        high = columns.to(layers[0].base.weight.dtype)
        halves = [high, (columns - high).to(high.dtype)]
    # Of whole columns W0's product takes the view A^T as it is: a copy with rows of r entries takes twice the time.
    parts = columns if len(halves) == 1 else torch.cat(halves, -1)
    products = columns.new_empty(len(layers), layers[0].m, parts.shape[-1])
    for layer, part, out in zip(layers, parts, products, strict=True):
        layer.times(part, out)
    return products if len(halves) == 1 else products.unflatten(-1, (2, -1)).sum(-2)


def grouped(layers: list[PerturbedLayer]) -> list[LayerGroup]:
    """Group the layers that have an active adapter; the others get no noise."""
    by_shape: dict[tuple[object, ...], list[PerturbedLayer]] = defaultdict(list)
    for layer in layers:
        layer.tau = None
        if layer.adapters():
            kind = (layer.magnitude() is None, layer.dora_scales_base_noise(), layer.dtype, layer.w0_norms.device)
            by_shape[(layer.m, layer.n, *layer.ranks(), *kind)].append(layer)
    return [_group(members) for members in by_shape.values()]


def _group(layers: list[PerturbedLayer]) -> LayerGroup:
    w0_norms = torch.stack([layer.w0_norms for layer in layers])
    return LayerGroup(layers, w0_norms, w0_norms.new_tensor([layer.column_scaling() for layer in layers]))


def summary(groups: list[LayerGroup]) -> dict[str, float]:
    """Size of the noise and share of the gradient in it, over all layers and over each group of equally named ones."""
    sums: dict[str, Tensor] = {}
    for group in groups:
        if group.tau2 is None or group.guided is None or group.weight is None:
            continue
        parts = (group.guided, group.tau2, group.n * group.tau2, group.weight, torch.ones_like(group.tau2))
        table = torch.stack([part.sum(-1) for part in parts], -1).double().cpu()
        for layer, row in zip(group.layers, table, strict=True):
            for key in ("", layer.name.rpartition(".")[2] + "/"):
                sums[key] = sums.get(key, torch.zeros(5, dtype=torch.float64)) + row
    metrics = {}
    for key, total in sums.items():
        guided, tau2, energy, weight, rows = total.tolist()
        metrics[f"ggpo/{key}gradient_share"] = guided / tau2 if tau2 else 0.0
        metrics[f"ggpo/{key}relative_noise"] = (energy / weight) ** 0.5 if weight else 0.0
        metrics[f"ggpo/{key}tau"] = (tau2 / rows) ** 0.5
    return metrics
