r"""Row norms of the weight and of its gradient from thin factors, and the rules that turn them into noise sizes.

All functions work on a batch of L layers of one shape: W0 (m, n), B (m, r), A (r, n), and the adapted weight
W' = W0 + s B A. None forms an m x n matrix: products of thin factors cost O((m + n) r^2) a layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import GGPOConfig, Schedule


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
    dB_i (s^2 A A^T)^+ dB_i^T. Never larger than the exact norm.

    Args:
        a: A (L, r, n).
        db: dL/dB (L, m, r).
        s: The scaling of each column of B (L, r).

    Returns:
        (L, m).
    """
    sa = s.unsqueeze(-1) * a
    return ((db @ torch.linalg.pinv(sa @ sa.mT, hermitian=True)) * db).sum(-1).clamp_min(0)


def tau_squared(config: GGPOConfig, weight: Tensor, gradient: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    r"""Variance of each row's noise, and the part of it that is due to the gradient.

    ``"paper"`` (arXiv 2502.14538v1):
        tau_i^2 = (sigma^2 / n) (||W'_i||^2 + beta ||G_i||^2)
    ``"relative"``, the same total noise energy as beta = 0, shared out by rows; with <.> the mean over a layer's rows:
        tau_i^2 = (sigma^2 / n) <||W'||^2> ((1 - beta) ||W'_i||^2 / <||W'||^2> + beta ||G_i||^2 / <||G||^2>)
    ``"sd-scripts"``, as public code has it:
        tau_i = (sigma ||W'_i|| + beta ||G_i||^2) / sqrt(m)

    Args:
        config: sigma, beta and rule.
        weight: ||W'_i||^2 (L, m).
        gradient: ||G_i||^2 (L, m), or None before the first optimizer step: the gradient term is then 0, and
            ``"relative"`` keeps its energy by sharing it out by weight alone.
        n: in_features.

    Returns:
        tau^2 (L, m) and its gradient part (L, m); sigma is at its full size (no schedule).
    """
    sigma, beta = config.sigma, config.beta
    if config.rule == "sd-scripts":
        root_m = math.sqrt(weight.shape[-1])
        alone = sigma * weight.sqrt() / root_m
        tau = alone if gradient is None else alone + beta * gradient / root_m
        return tau.square(), tau.square() - alone.square()
    unit = sigma**2 / n
    if gradient is None:
        return unit * weight, torch.zeros_like(weight)
    if config.rule == "paper":
        guided = unit * beta * gradient
        return unit * weight + guided, guided
    mean = gradient.mean(-1, keepdim=True)
    # A layer that got no gradient at all (an unused expert) is shared out by weight alone.
    share = beta * (mean > 0).to(mean.dtype)
    guided = unit * share * weight.mean(-1, keepdim=True) * gradient / mean.clamp_min(torch.finfo(mean.dtype).tiny)
    return unit * (1 - share) * weight + guided, guided


def ramp(schedule: Schedule, step: int, total_steps: int | None) -> float:
    """The factor on sigma at optimizer step ``step`` of ``total_steps``.

    Raises:
        ValueError: the schedule is a ramp and ``total_steps`` is unknown.
    """
    if schedule == "constant":
        return 1.0
    if not total_steps:
        raise ValueError(f'schedule="{schedule}" needs total_steps, the number of optimizer steps of the run')
    progress = min(step / total_steps, 1.0)
    return progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
