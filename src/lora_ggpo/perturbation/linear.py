"""y = x (W0 + s B A + eps)^T without a pass over W0, and y = x (W0 + eps)^T without a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .noise import Factors, gaussian_rows, has_kernel, row_blocks

_KERNEL_ENTRIES = 1 << 25
"""Entries of W0 + diag(tau) z that the GPU kernel writes at a time: most layers whole, at 64 MiB in 16 bits."""


class Thin(NamedTuple):
    """A trained part s B A of a weight (m, n): ``a`` is A (r, n), ``b`` is B (m, r), ``s`` a number."""

    a: Tensor
    b: Tensor
    s: Any


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast takes products with x in: that of x where it is off."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves alone
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def autocast_dtype() -> torch.dtype | None:
    """The dtype of products under the autocast that is on; None where none is."""
    on = next((kind for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind)), None)
    return None if on is None else torch.get_autocast_dtype(on)


# --- thin factors that ride on a product with W0 -------------------------------------------------------------------


def thin_linear(
    x: Tensor,
    base: Tensor | tuple[Tensor, Tensor | None],
    adapters: Sequence[Thin],
    noise: Factors | None,
) -> Tensor:
    r"""x (W0 + sum_j s_j B_j A_j + U V)^T + bias, the adapters and the noise in one product on top of that with W0:

        h = x [A; V]^T,   y = x W0^T + bias,   y += h [s B, U]^T,

    with dL/dx, dL/dA and dL/dB. For the backward pass it saves x and x A^T, as PEFT's own forward does.

    Args:
        x: Input (..., n), in the dtype to take products in.
        base: A frozen W0 (m, n) and the frozen bias (m,); or, if W0 is not at hand, y = x W0^T + bias (..., m), which
            is written in place, so nothing else may need it.
        adapters: Trained parts, at least one.
        noise: eps, or None.

    Returns:
        y (..., m).
    """
    weights = [weight for thin in adapters for weight in (thin.a, thin.b)]
    scales = [thin.s for thin in adapters]
    y, w0, bias = (base, None, None) if isinstance(base, Tensor) else (None, *base)
    return cast(Tensor, _ThinLinear.apply(y, x, w0, bias, noise, scales, *weights))


class _ThinLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | None,
        x: Tensor,
        w0: Tensor | None,
        bias: Tensor | None,
        noise: Factors | None,
        scales: list[Any],
        *weights: Tensor,
    ) -> Tensor:
        thin, wide = _joined(weights, scales, noise, x.dtype)
        h = x.reshape(-1, x.shape[-1]) @ thin.t()
        ctx.scales, ctx.noise = scales, noise
        rank = h.shape[1] - (0 if noise is None else len(noise.v))
        if y is None:
            assert w0 is not None
            w0 = w0.to(x.dtype)
            y = functional.linear(x, w0, None if bias is None else bias.to(x.dtype))
        elif torch.compiler.is_compiling():  # which makes no copy of what it can write in place
            y = y.clone()
        else:
            ctx.mark_dirty(y)
        ctx.save_for_backward(x, w0, h[:, :rank].contiguous(), *weights)  # a part of h would keep all of it
        if y.dtype == x.dtype and y.is_contiguous():
            y.view(-1, y.shape[-1]).addmm_(h, wide)
        else:
            y.add_((h @ wide).view(y.shape))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        once = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return (_thin_gradients_once if once else _thin_gradients)(ctx, dy)


def _joined(
    weights: Sequence[Tensor], scales: Sequence[Any], noise: Factors | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[A; V] (q, n) and [s B, U]^T (q, m): products with long rows of few are the faster ones on a processor."""
    thin, wide = list(weights[::2]), [(b * s).t() for b, s in zip(weights[1::2], scales, strict=True)]
    if noise is not None:
        thin, wide = [*thin, noise.v], [*wide, noise.u.t()]
    return _rows(thin, dtype), _rows(wide, dtype)


def _rows(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    parts = [part.to(dtype) for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _thin_gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, w0, h, *weights = ctx.saved_tensors
    tokens, out = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).to(x.dtype)
    thin, wide = _joined(weights, ctx.scales, ctx.noise, x.dtype)
    dh = out @ wide.t()
    dx = None
    if ctx.needs_input_grad[1]:
        dx = (dh @ thin if w0 is None else (out @ w0).addmm_(dh, thin)).view(x.shape)
    gradients: list[Tensor] = []
    start = 0
    for a, b, s in zip(weights[::2], weights[1::2], ctx.scales, strict=True):
        part = slice(start, start := start + len(a))
        db = (h[:, part].t() @ out).mul_(s).t()
        gradients += (dh[:, part].t() @ tokens).to(a.dtype), db.to(b.dtype)
    return dy if w0 is None else None, dx, None, None, None, None, *gradients


_thin_gradients_once = once_differentiable(_thin_gradients)


# --- dense noise ---------------------------------------------------------------------------------------------------


def perturbed_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tau: Tensor,
    seed: int,
    fan_in_fan_out: bool = False,
) -> Tensor:
    r"""Apply a linear layer whose weight is perturbed row by row: y = x (W0 + diag(tau) z)^T + bias.

    z is the unit Gaussian noise of ``seed``. It is made a block of rows at a time in the forward pass and made again in
    the backward pass, where dL/dx = dL/dy (W0 + diag(tau) z): gradients that reach earlier layers are those of the
    perturbed function. Under autocast the product is taken in the autocast dtype; the perturbed block is formed in
    float32 (float64 for a float64 weight) first.

    Args:
        x: Input (..., n).
        weight: W0 (m, n), or (n, m) if ``fan_in_fan_out`` (transformers' Conv1D). None is zero: what is returned then
            is x (diag(tau) z)^T.
        bias: (m,) or None.
        tau: Noise size of each row (m,), float32 or float64.
        seed: Seed of this layer's draw.
        fan_in_fan_out: Whether ``weight`` is stored transposed.

    Returns:
        y (..., m), in the dtype of ``x`` or of autocast.
    """
    return cast(Tensor, _PerturbedLinear.apply(x.to(product_dtype(x)), weight, bias, tau, seed, fan_in_fan_out))


def largest_block(m: int, n: int, device: torch.device) -> tuple[int, bool]:
    """Entries of the largest block of an (m, n) weight that is formed at a time, and whether the GPU kernel does it."""
    by_kernel = has_kernel(device)
    return max(stop - start for start, stop in _blocks(m, n, by_kernel)) * n, by_kernel


class _PerturbedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        tau: Tensor,
        seed: int,
        fan_in_fan_out: bool,
    ) -> Tensor:
        # x is needed for dL/dW0 only, and W0 is frozen in every LoRA run: then nothing the size of x is kept.
        ctx.save_for_backward(weight, tau, x if weight is not None and weight.requires_grad else None)
        ctx.seed, ctx.fan_in_fan_out, ctx.n = seed, fan_in_fan_out, x.shape[-1]
        ctx.by_kernel = tau.dtype == torch.float32 and has_kernel(tau.device)
        bias = None if bias is None else bias.to(x.dtype)
        blocks = _blocks(len(tau), ctx.n, ctx.by_kernel)
        if len(blocks) == 1:
            return functional.linear(x, _perturbed_rows(weight, tau, ctx, x.dtype, *blocks[0]), bias)
        tokens = x.reshape(-1, ctx.n)
        y = tokens.new_empty(len(tokens), len(tau))
        for start, stop in blocks:
            rows = _perturbed_rows(weight, tau, ctx, x.dtype, start, stop)
            if bias is None:
                torch.mm(tokens, rows.t(), out=y[:, start:stop])
            else:
                torch.addmm(bias[start:stop], tokens, rows.t(), out=y[:, start:stop])
        return y.view(*x.shape[:-1], len(tau))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (_gradients_once if torch.is_grad_enabled() else _gradients)(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, tau, x = ctx.saved_tensors
    dx = dweight = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _input_gradient(dy, weight, tau, ctx)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        out = dy.reshape(-1, len(tau))
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                tokens = x.reshape(-1, x.shape[-1])
                dweight = (tokens.t() @ out if ctx.fan_in_fan_out else out.t() @ tokens).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                dbias = out.sum(0)
    return dx, dweight, dbias, None, None, None


_gradients_once = once_differentiable(_gradients)


# Products with out= are taken as they are under autocast too, in the dtype that the forward pass had.
def _input_gradient(dy: Tensor, weight: Tensor | None, tau: Tensor, ctx: Any) -> Tensor:
    blocks = _blocks(len(tau), ctx.n, ctx.by_kernel)
    if len(blocks) == 1:
        return dy @ _perturbed_rows(weight, tau, ctx, dy.dtype, *blocks[0])
    out = dy.reshape(-1, len(tau))
    dx = dy.new_empty(len(out), ctx.n)
    for start, stop in blocks:
        rows = _perturbed_rows(weight, tau, ctx, dy.dtype, start, stop)
        torch.addmm(dx, out[:, start:stop], rows, beta=1 if start else 0, out=dx)
    return dx.view(*dy.shape[:-1], ctx.n)


def _perturbed_rows(weight: Tensor | None, tau: Tensor, ctx: Any, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of W0 + diag(tau) z."""
    w0 = None if weight is None else (weight.detach().t() if ctx.fan_in_fan_out else weight.detach())[start:stop]
    if ctx.by_kernel:
        rows = torch.empty(stop - start, ctx.n, dtype=dtype, device=tau.device)
        _kernel()(rows, w0, tau[start:stop], ctx.seed, start)
        return rows
    z = gaussian_rows(ctx.seed, start, stop - start, ctx.n, tau.device).to(tau.dtype)
    eps = z.mul_(tau[start:stop, None])
    return (eps if w0 is None else eps.add_(w0)).to(dtype)


@lru_cache(maxsize=1)
def _kernel() -> Callable[..., None]:
    from .kernel import perturb_rows

    return perturb_rows


def _blocks(rows: int, n: int, by_kernel: bool) -> tuple[tuple[int, int], ...]:
    """The blocks of rows [start, stop) of a weight that are formed one after the other."""
    return row_blocks(rows, n, _KERNEL_ENTRIES) if by_kernel else row_blocks(rows, n)
