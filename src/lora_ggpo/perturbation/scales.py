r"""How large the noise of each row is: row norms from thin factors, and the rules that turn them into tau.

All functions work on L layers of one shape: W0 (m, n), B (m, r), A (r, n), and the adapted weight W' = W0 + s B A. None
forms an m x n matrix: products of thin factors cost O((m + n) r^2) a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


def product_row_norms_squared(p: Tensor, q: Tensor) -> Tensor:
    """||(P Q)_i||^2 = P_i (Q Q^T) P_i^T for P (L, m, k), Q (L, k, n); returns (L, m)."""
    return ((p @ (q @ q.mT)) * p).sum(-1).clamp_min(0)


def weight_row_norms_squared(w0_norms: Tensor, w0_terms: Tensor, sb: Tensor, a: Tensor) -> Tensor:
    """||W'_i||^2 = ||W0_i||^2 + 2 (s B_i) . (W0 A^T)_i + (s B_i) (A A^T) (s B_i)^T.

    Args:
        w0_norms: ||W0_i||^2 (L, m), computed once.
        w0_terms: (s B_i) . (W0 A^T)_i (L, m).
        sb: s B (L, m, r).
        a: A (L, r, n).

    Returns:
        (L, m).
    """
    return (w0_norms + 2 * w0_terms + product_row_norms_squared(sb, a)).clamp_min(0)


# --- ||G_i||^2 from the gradients of A and B -----------------------------------------------------------------------


def lora_row_norms_squared(b: Tensor, a: Tensor, db: Tensor, da: Tensor, s: Tensor) -> Tensor:
    r"""The published estimate of ||G_i||^2, G = dL/dW' (m, n): G ~ s (B dA + dB A), which is s^2 (B B^T G + G A^T A).

    Args:
        b: B (L, m, r).
        a: A (L, r, n).
        db: dL/dB = s G A^T (L, m, r).
        da: dL/dA = s B^T G (L, r, n).
        s: The scaling of each column of B (L, r); it differs between columns of several active adapters.

    Returns:
        (L, m).
    """
    p = torch.cat([b, db], -1) * torch.cat([s, s], -1).unsqueeze(-2)
    return product_row_norms_squared(p, torch.cat([da, a], -2))


def lstsq_row_norms_squared(a: Tensor, db: Tensor, s: Tensor) -> Tensor:
    r"""||G_i||^2 of the least-norm G (m, n) that satisfies dB = s G A^T, i.e. of dL/dW' projected on the rows of A:
    dB_i (s^2 A A^T)^+ dB_i^T. Never larger than the exact norm. Arguments and result are those of
    :func:`lora_row_norms_squared`.
    """
    sa = s.unsqueeze(-1) * a
    return ((db @ torch.linalg.pinv(sa @ sa.mT, hermitian=True)) * db).sum(-1).clamp_min(0)


def sketch_row_norms_squared(sketches: Tensor) -> Tensor:
    """||(G R^T)_i||^2 / k of G R^T (L, m, k) with R (k, n) standard normal: unbiased for any layer, without A and B.
    Its standard deviation is sqrt(2 / k) of it. Returns (L, m)."""
    return sketches.square().mean(-1)


class Readings(Protocol):
    """What an estimator may read of L layers. Each method reads its tensors anew."""

    s: Tensor

    def a(self) -> Tensor: ...
    def b(self) -> Tensor: ...
    def da(self) -> Tensor: ...
    def db(self) -> Tensor: ...
    def sketches(self) -> Tensor: ...


ESTIMATORS: dict[str, Callable[[Readings], Tensor]] = {
    "lora": lambda of: lora_row_norms_squared(of.b(), of.a(), of.db(), of.da(), of.s),
    "lstsq": lambda of: lstsq_row_norms_squared(of.a(), of.db(), of.s),
    "sketch": lambda of: sketch_row_norms_squared(of.sketches()),
}
"""``GGPOConfig.gradient``: estimators of ||G_i||^2 (L, m)."""


# --- tau -----------------------------------------------------------------------------------------------------------


class Norms(NamedTuple):
    """What a rule may read of L layers of one shape.

    Attributes:
        weight: ||W'_i||^2 (L, m).
        gradient: ||G_i||^2 (L, m); None before the first optimizer step.
        w0: ||W0_i||^2 (L, m).
        product: Function that returns ||(B A)_i||^2 (L, m), without s.
        n: Entries of a row.
    """

    weight: Tensor
    gradient: Tensor | None
    w0: Tensor
    product: Callable[[], Tensor]
    n: int


class Rule(NamedTuple):
    """How row norms become the variance of each row's noise.

    Attributes:
        tau_squared: Function of sigma, beta and the norms, at the full size of sigma. It returns tau_i^2 (L, m) and the
            part of it that the gradient makes.
        shares: Whether beta is a share, in [0, 1], so that only the ratios of gradient norms count.
        clipped: Whether the gradient is meant after clipping: it is read again as the optimizer step is counted.
    """

    tau_squared: Callable[[float, float, Norms], tuple[Tensor, Tensor]]
    shares: bool = False
    clipped: bool = False


def _gradient_of(norms: Norms) -> Tensor:
    return torch.zeros_like(norms.weight) if norms.gradient is None else norms.gradient


def paper(sigma: float, beta: float, norms: Norms) -> tuple[Tensor, Tensor]:
    """As published (arXiv 2502.14538v1): tau_i^2 = (sigma^2 / n) (||W'_i||^2 + beta ||G_i||^2)."""
    unit = sigma**2 / norms.n
    guided = unit * beta * _gradient_of(norms)
    return unit * norms.weight + guided, guided


def relative(sigma: float, beta: float, norms: Norms) -> tuple[Tensor, Tensor]:
    """The total noise energy of beta = 0, shared out by rows; <.> is the mean over a layer's rows:

    tau_i^2 = (sigma^2 / n) <||W'||^2> ((1 - beta) ||W'_i||^2 / <||W'||^2> + beta ||G_i||^2 / <||G||^2>).
    """
    weight, gradient = norms.weight, _gradient_of(norms)
    unit, mean = sigma**2 / norms.n, gradient.mean(-1, keepdim=True)
    # A layer that got no gradient at all (an unused expert) is shared out by weight alone.
    share = beta * (mean > 0).to(mean.dtype)
    guided = unit * share * weight.mean(-1, keepdim=True) * gradient / mean.clamp_min(torch.finfo(mean.dtype).tiny)
    return unit * (1 - share) * weight + guided, guided


def sd_scripts(sigma: float, beta: float, norms: Norms) -> tuple[Tensor, Tensor]:
    """As public code has it: tau_i = (sigma sqrt(wbar^2 + ||(B A)_i||^2) + beta ||G_i||^2) / sqrt(m), nothing before
    the first optimizer step. wbar is the layer's mean ||W0_i||, B A is without s, and G is the clipped gradient."""
    if norms.gradient is None:
        return torch.zeros_like(norms.weight), torch.zeros_like(norms.weight)
    root_m = math.sqrt(norms.weight.shape[-1])
    alone = sigma * (norms.w0.sqrt().mean(-1, keepdim=True).square() + norms.product()).sqrt() / root_m
    variance = (alone + beta * norms.gradient / root_m).square()
    return variance, variance - alone.square()


RULES: dict[str, Rule] = {
    "paper": Rule(paper),
    "relative": Rule(relative, shares=True),
    "sd-scripts": Rule(sd_scripts, clipped=True),
}
"""``GGPOConfig.rule``."""

RAMPS: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: progress,
}
"""``GGPOConfig.schedule``: the factor on sigma at a progress through the run from 0 to 1."""


def ramp(schedule: str, step: int, total_steps: int | None) -> float:
    """The factor on sigma at optimizer step ``step`` of ``total_steps``.

    Raises:
        ValueError: the schedule is a ramp and ``total_steps`` is unknown.
    """
    if schedule == "constant":
        return 1.0
    if not total_steps:
        raise ValueError(f'schedule="{schedule}" needs total_steps, the number of optimizer steps of the run')
    return RAMPS[schedule](min(step / total_steps, 1.0))
