r"""Rows of W0 + diag(tau) z in one pass over W0 on a GPU, with z made in registers (Triton).

z_ij is a function of (seed, i, j) alone. A counter-based generator, Philox-4x32 of 7 rounds (Salmon et al., 2011), with
key ``seed`` and counter (j // 8, i, 0, 0) gives four words of 32 bits, each the noise of two neighbouring entries.
A word is cut in 16, 14 and 2 bits, which are u in (0, 1), phi in (0, pi/2) and two signs, and
z = +-sqrt(-2 ln u) (cos phi, sin phi) (Box and Muller). Its tails end at 4.9; its variance is 1 within 1e-4.
"""

# mypy: disable-error-code="no-untyped-def"
# What Triton compiles is written without types: its arguments are pointers, tiles and compile-time constants by turns.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

# The tile of a program; of speed only.
_ROWS = 8
_COLUMNS = 512
_PRODUCT_ROWS = 32
_PRODUCT_COLUMNS = 64
_RANK = 128
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def perturb_rows(out: Tensor, weight: Tensor | None, tau: Tensor, seed: int, first: int) -> None:
    """Write rows ``first``, ``first + 1``, ... of W0 + diag(tau) z to ``out``.

    Args:
        out: (rows, n), contiguous, of any floating dtype; the sum is taken in float32.
        weight: The same rows of W0 (rows, n), of any strides; None is zero.
        tau: Noise size of each of these rows (rows,), float32.
        seed: Seed of the layer's draw, below 2^63.
        first: Number of the first row.
    """
    rows, columns = out.shape
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
    strides = (0, 0) if weight is None else weight.stride()
    source = out if weight is None else weight  # is not read where there is no weight
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _perturb_rows[grid](
            *(out, source, tau, seed, first, rows, columns, *strides),
            WEIGHTED=weight is not None,
            NVIDIA=out.is_cuda and torch.version.cuda is not None,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )


@triton.jit(do_not_specialize=["seed", "first"])
def _perturb_rows(
    out,
    weight,
    sizes,
    seed,
    first,
    rows,
    columns,
    row_stride,
    column_stride,
    WEIGHTED: tl.constexpr,
    NVIDIA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    tau = tl.load(sizes + row, mask=row < rows)
    value = tau * unit_tile(seed, first + row, tl.program_id(1) * (COLUMNS // 8), NVIDIA, COLUMNS)
    if WEIGHTED:
        address = weight + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
        value += tl.load(address, mask=inside).to(tl.float32)
    tl.store(out + row.to(tl.int64) * columns + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def unit_tile(seed, row, eighth, NVIDIA: tl.constexpr, COLUMNS: tl.constexpr):
    """z (rows, COLUMNS) of the rows ``row`` (rows, 1), from column 8 ``eighth`` on."""
    counter = eighth + tl.arange(0, COLUMNS // 8)[None, :] + tl.zeros_like(row)
    a, b, c, d = tl.philox(seed, counter, row + tl.zeros_like(counter), 0, 0, n_rounds=7)
    first, second = _two_of_each(tl.join(tl.join(a, c), tl.join(b, d)), NVIDIA)
    return tl.reshape(tl.join(first, second), (row.shape[0], COLUMNS))


@triton.jit
def _two_of_each(word, NVIDIA: tl.constexpr):
    u = ((word & 0xFFFF).to(tl.float32) + 0.5) * (1.0 / 65536)
    log2 = libdevice.fast_log2f(u) if NVIDIA else tl.log2(u)  # one instruction instead of ten
    half = tl.sqrt(-0.6931471805599453 * log2)  # sqrt(-2 ln u) / sqrt(2)
    # sqrt(2) (cos phi, sin phi) = (cos x - sin x, cos x + sin x) of x = phi - pi / 4, where few terms are enough.
    x = (((word >> 16) & 0x3FFF).to(tl.float32) + 0.5) * (1.5707963267948966 / 16384) - 0.7853981633974483
    square = x * x
    sine = x * (1 + square * (-1 / 6 + square * (1 / 120)))
    cosine = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720)))
    first, second = half * (cosine - sine), half * (cosine + sine)
    return _signed(first, word), _signed(second, word << 1)


@triton.jit
def _signed(value, word):
    """value, negated where the highest bit of word is set."""
    return (value.to(tl.uint32, bitcast=True) ^ (word & 0x80000000)).to(tl.float32, bitcast=True)


def w0_terms_at_once(weights: list[Tensor], sb: Tensor, a: Tensor) -> Tensor:
    """(s B_i) . (W0 A^T)_i of L layers of one shape in one launch, instead of a product a layer.

    A 16-bit W0 is read as it is: A is split in two parts of 16 bits, which lose 2^-16 of it at most.

    Args:
        weights: W0 of each layer (m, n), in 32 or 16 bits, all of one dtype and of the same strides.
        sb: s B (L, m, r), float32.
        a: A (L, r, n), float32.

    Returns:
        (L, m), float32.
    """
    layers, m, rank = sb.shape
    pointers = [weight.data_ptr() for weight in weights]
    # Not waiting for the copy keeps the processor ahead of the GPU.
    addresses = torch.tensor(pointers).to(sb.device, non_blocking=True)
    aligned = all(pointer % 16 == 0 for pointer in pointers)
    total = sb.new_zeros(layers, m)
    for first in range(0, rank, _RANK):
        b, rows = sb[..., first : first + _RANK].contiguous(), a[:, first : first + _RANK].contiguous()
        with torch.cuda.device_of(total):
            _w0_terms[triton.cdiv(m, _PRODUCT_ROWS), layers](
                *(total, addresses, b, rows, m, b.shape[-1], *weights[0].stride()),
                N=a.shape[-1],
                DTYPE=_TYPES[weights[0].dtype],
                ALIGNMENT=16 if aligned else weights[0].element_size(),
                RANK=max(16, triton.next_power_of_2(b.shape[-1])),
                ROWS=_PRODUCT_ROWS,
                COLUMNS=_PRODUCT_COLUMNS,
            )
    return total


@triton.jit
def _w0_terms(
    total,
    addresses,
    sb,
    a,
    m,
    rank,
    row_stride,
    column_stride,
    N: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    weight = tl.multiple_of(tl.load(addresses + layer).to(tl.pointer_type(DTYPE)), ALIGNMENT)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, RANK)
    products = tl.zeros((ROWS, RANK), tl.float32)
    for first in range(0, N, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        places = row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride
        w0 = tl.load(weight + places, mask=(row[:, None] < m) & (column[None, :] < N), other=0.0)
        places = (layer * rank + k[None, :]) * N + column[:, None]
        thin = tl.load(a + places, mask=(k[None, :] < rank) & (column[:, None] < N), other=0.0)
        if tl.float32 == DTYPE:
            products = tl.dot(w0, thin, products, input_precision="ieee")
        else:
            high = thin.to(DTYPE)
            products = tl.dot(w0, high, products)
            products = tl.dot(w0, (thin - high.to(tl.float32)).to(DTYPE), products)
    inside = row < m
    places = (layer * m + row[:, None]) * rank + k[None, :]
    b = tl.load(sb + places, mask=inside[:, None] & (k[None, :] < rank), other=0.0)
    place = total + layer * m + row
    tl.store(place, tl.load(place, mask=inside) + tl.sum(b * products, 1), mask=inside)
