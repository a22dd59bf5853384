"""y = x (W0 + eps)^T as one autograd function that keeps a seed and a scale a row, and never writes W0."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .noise import NOISES, has_kernel, row_blocks, split_rows

_KERNEL_ENTRIES = 1 << 25
"""Entries of W0 + diag(scale) z that the GPU kernel writes at a time: most layers whole, at 64 MiB in 16 bits."""


def perturbed_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    noise: str,
    seed: int,
    fan_in_fan_out: bool = False,
) -> Tensor:
    r"""Apply a linear layer whose weight is perturbed row by row: y = x (W0 + diag(scale) z)^T + bias.

    z is the unit noise of ``seed`` (:mod:`~lora_ggpo.perturbation.noise`). It is made a block of rows at a time in the
    forward pass and made again in the backward pass, where dL/dx = dL/dy (W0 + diag(scale) z): gradients that reach
    earlier layers are those of the perturbed function. Under autocast the product is taken in the autocast dtype;
    the perturbed block is formed in float32 (float64 for a float64 weight) first.

    Args:
        x: Input (..., n).
        weight: W0 (m, n), or (n, m) if ``fan_in_fan_out`` (transformers' Conv1D). None is zero: what is returned then
            is x (diag(scale) z)^T, which a quantised layer adds to its own output.
        bias: (m,) or None.
        scale: Factor of each row's noise (m,), float32 or float64: tau, times the signs of a noise that has them.
        noise: Name of the noise.
        seed: Seed of this layer's draw.
        fan_in_fan_out: Whether ``weight`` is stored transposed.

    Returns:
        y (..., m), in the dtype of ``x`` or of autocast.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves alone
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return cast(Tensor, _PerturbedLinear.apply(x, weight, bias, scale, noise, seed, fan_in_fan_out))


def largest_block(m: int, n: int, noise: str, device: torch.device) -> tuple[int, bool]:
    """Entries of the largest block of an (m, n) weight that is formed at a time, and whether the GPU kernel does it."""
    by_kernel = _by_kernel(noise, device)
    return max(stop - start for start, stop in _blocks(m, n, by_kernel, device)) * n, by_kernel


class _PerturbedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor,
        noise: str,
        seed: int,
        fan_in_fan_out: bool,
    ) -> Tensor:
        # x is needed for dL/dW0 only, and W0 is frozen in every LoRA run: then nothing the size of x is kept.
        ctx.save_for_backward(weight, scale, x if weight is not None and weight.requires_grad else None)
        ctx.noise, ctx.seed, ctx.fan_in_fan_out, ctx.n = noise, seed, fan_in_fan_out, x.shape[-1]
        ctx.by_kernel = scale.dtype == torch.float32 and _by_kernel(noise, scale.device)
        bias = None if bias is None else bias.to(x.dtype)
        blocks = _blocks(len(scale), ctx.n, ctx.by_kernel, scale.device)
        if len(blocks) == 1:
            return functional.linear(x, _perturbed_rows(weight, scale, ctx, x.dtype, *blocks[0]), bias)
        tokens = x.reshape(-1, ctx.n)
        y = tokens.new_empty(len(tokens), len(scale))
        for start, stop in blocks:
            rows = _perturbed_rows(weight, scale, ctx, x.dtype, start, stop)
            if bias is None:
                torch.mm(tokens, rows.t(), out=y[:, start:stop])
            else:
                torch.addmm(bias[start:stop], tokens, rows.t(), out=y[:, start:stop])
        return y.view(*x.shape[:-1], len(scale))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, x = ctx.saved_tensors
    dx = dweight = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _input_gradient(dy, weight, scale, ctx)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        out = dy.reshape(-1, len(scale))
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                tokens = x.reshape(-1, x.shape[-1])
                dweight = (tokens.t() @ out if ctx.fan_in_fan_out else out.t() @ tokens).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                dbias = out.sum(0)
    return dx, dweight, dbias, None, None, None, None


_gradients_once = once_differentiable(_gradients)


# Products with out= are taken as they are under autocast too, in the dtype that the forward pass had.
def _input_gradient(dy: Tensor, weight: Tensor | None, scale: Tensor, ctx: Any) -> Tensor:
    blocks = _blocks(len(scale), ctx.n, ctx.by_kernel, scale.device)
    if len(blocks) == 1:
        return dy @ _perturbed_rows(weight, scale, ctx, dy.dtype, *blocks[0])
    out = dy.reshape(-1, len(scale))
    dx = dy.new_empty(len(out), ctx.n)
    for start, stop in blocks:
        rows = _perturbed_rows(weight, scale, ctx, dy.dtype, start, stop)
        torch.addmm(dx, out[:, start:stop], rows, beta=1 if start else 0, out=dx)
    return dx.view(*dy.shape[:-1], ctx.n)


# Between two large products caches are cold, and every small operation costs tens of microseconds: what runs twice a
# layer and step is kept to as few of them as it can do with.
def _perturbed_rows(
    weight: Tensor | None, scale: Tensor, ctx: Any, dtype: torch.dtype, start: int, stop: int
) -> Tensor:
    """Rows [start, stop) of W0 + diag(scale) z. They may lie in a scratch buffer that the next call overwrites."""
    w0 = None if weight is None else weight.detach().t() if ctx.fan_in_fan_out else weight.detach()
    if stop - start < len(scale):
        w0, scale = None if w0 is None else w0[start:stop], scale[start:stop]
    if ctx.by_kernel:
        rows = torch.empty(stop - start, ctx.n, dtype=dtype, device=scale.device)
        _kernel()(rows, w0, scale, ctx.noise, ctx.seed, start)
        return rows
    z = NOISES[ctx.noise].rows(ctx.seed, start, stop - start, ctx.n, scale.device)
    rows = _scratch_rows(stop - start, ctx.n, scale.device, scale.dtype)
    if w0 is None:
        torch.mul(scale.unsqueeze(1), z, out=rows)
    else:
        torch.addcmul(w0.to(scale.dtype), scale.unsqueeze(1), z, out=rows)
    return rows.to(dtype)


def _by_kernel(noise: str, device: torch.device) -> bool:
    return NOISES[noise].in_kernel and has_kernel(device)


@lru_cache(maxsize=1)
def _kernel() -> Callable[..., None]:
    from .kernel import perturb_rows

    return perturb_rows


def _blocks(rows: int, n: int, by_kernel: bool, device: torch.device) -> tuple[tuple[int, int], ...]:
    """The blocks of rows [start, stop) of a weight that are formed one after the other."""
    return split_rows(rows, n, _KERNEL_ENTRIES) if by_kernel else row_blocks(rows, n, device)


@lru_cache(maxsize=256)
def _scratch_rows(rows: int, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A view (rows, n) of the scratch buffer."""
    buffer = _scratch(device, dtype)
    if buffer.numel() < rows * n:
        buffer.resize_(rows * n)  # views made before keep to the storage, which is what grows
    return buffer.as_strided((rows, n), (n, 1))


@lru_cache(maxsize=16)
def _scratch(device: torch.device, dtype: torch.dtype) -> Tensor:
    """A buffer kept between calls: fresh memory for each block would cost more in page faults than the noise."""
    return torch.empty(0, device=device, dtype=dtype)
