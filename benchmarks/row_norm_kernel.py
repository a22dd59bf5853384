"""Row norms of all layers of one shape in one launch, against the package's one library product a layer, on a GPU.

    python benchmarks/row_norm_kernel.py

What is compared is (s B_i) . (W0 A^T)_i, the part of ||W'_i||^2 that reads all of W0, once an optimizer step.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32
_COLUMNS = 64
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def cross_terms(weights: list[Tensor], sb: Tensor, a: Tensor) -> Tensor:
    """(s B_i) . (W0 A^T)_i of L layers of one shape, in one launch.

    A 16-bit W0 is read as it is: A is split in two parts of 16 bits, which lose 2^-16 of it at most.

    Args:
        weights: W0 of each layer (m, n), all of one dtype and of the same strides.
        sb: s B (L, m, r), float32; r is at most 128.
        a: A (L, r, n), float32.

    Returns:
        (L, m), float32.
    """
    layers, m, rank = sb.shape
    sb, a, out = sb.contiguous(), a.contiguous(), sb.new_empty(layers, m)
    addresses = torch.tensor([weight.data_ptr() for weight in weights], device=sb.device)
    with torch.cuda.device_of(out):
        _cross_terms[triton.cdiv(m, _ROWS), layers](
            *(out, addresses, sb, a, m, rank, *weights[0].stride()),
            N=a.shape[-1],
            DTYPE=_TYPES[weights[0].dtype],
            WIDE=weights[0].dtype == torch.float32,
            RANK=max(16, triton.next_power_of_2(rank)),
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )
    return out


@triton.jit
def _cross_terms(
    out,
    addresses,
    sb,
    a,
    m,
    rank,
    row_stride,
    column_stride,
    N: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)
    weight = tl.multiple_of(tl.load(addresses + layer).to(tl.pointer_type(DTYPE)), 16)  # torch aligns to 64 bytes
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, RANK)
    products = tl.zeros((ROWS, RANK), tl.float32)
    for first in range(0, N, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        places = row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride
        w0 = tl.load(weight + places, mask=(row[:, None] < m) & (column[None, :] < N), other=0.0)
        places = (layer * rank + k[None, :]) * N + column[:, None]
        thin = tl.load(a + places, mask=(k[None, :] < rank) & (column[:, None] < N), other=0.0)
        if WIDE:
            products = tl.dot(w0, thin, products, input_precision="ieee")
        else:
            high = thin.to(DTYPE)
            products = tl.dot(w0, high, products)
            products = tl.dot(w0, (thin - high.to(tl.float32)).to(DTYPE), products)
    places = (layer * m + row[:, None]) * rank + k[None, :]
    b = tl.load(sb + places, mask=(row[:, None] < m) & (k[None, :] < rank), other=0.0)
    tl.store(out + layer * m + row, tl.sum(b * products, 1), mask=row < m)


def one_product_a_layer(weights: list[Tensor], sb: Tensor, a: Tensor) -> Tensor:
    """As the package does it for 16-bit weights."""
    high = a.mT.to(weights[0].dtype)
    parts = torch.cat([high, (a.mT - high).to(high.dtype)], -1)
    products = a.new_empty(len(weights), len(weights[0]), parts.shape[-1])
    for weight, part, out in zip(weights, parts, products, strict=True):
        torch.mm(weight, part, out_dtype=torch.float32, out=out)
    return (sb * products.unflatten(-1, (2, -1)).sum(-2)).sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    print("| W0 | a product a layer, us | one launch, us | relative difference |\n|---|---|---|---|")
    for m, n in ((256, 2048), (2048, 2048), (5632, 2048), (2048, 5632)):
        weights = [torch.randn(m, n, device="cuda", dtype=torch.bfloat16) for _ in range(args.layers)]
        sb = torch.randn(args.layers, m, args.rank, device="cuda")
        a = torch.randn(args.layers, args.rank, n, device="cuda")
        exact = torch.stack(
            [(b * (w.double() @ c.double().mT)).sum(-1) for w, b, c in zip(weights, sb, a, strict=True)]
        )
        error = (cross_terms(weights, sb, a) - exact).norm() / exact.norm()
        inputs = (weights, sb, a)
        times = [1000 * triton.testing.do_bench(partial(way, *inputs)) for way in (one_product_a_layer, cross_terms)]
        print(f"| {m} x {n} | {times[0]:.0f} | {times[1]:.0f} | {error:.1e} |", flush=True)


if __name__ == "__main__":
    main()
