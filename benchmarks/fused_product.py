"""x (W0 + eps)^T on a GPU: noise made inside the product, against one pass that writes W0 + eps and a library product.

    python benchmarks/fused_product.py --output docs/results/fused_product.json

The fused kernel keeps nothing, but makes the noise of each weight again for every block of tokens; the two-pass way of
the package makes it once. Ratios are to the library's product of x and W0 without noise.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_ggpo.perturbation.kernel import perturb_rows, unit_tile


@triton.jit
def _fused(
    out,
    x,
    weight,
    scale,
    seed,
    TOKENS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    NVIDIA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tau = tl.load(scale + row)[:, None]
    y = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    for first in range(0, N, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        z = unit_tile(seed, row[:, None], first // 8, True, NVIDIA, BLOCK_N)
        w = tl.load(weight + row[:, None] * N + column[None, :]).to(tl.float32) + tau * z
        tile = tl.load(x + token[:, None] * N + column[None, :], mask=token[:, None] < TOKENS, other=0.0)
        y = tl.dot(tile, tl.trans(w.to(tile.dtype)), y)
    tl.store(out + token[:, None] * M + row[None, :], y.to(out.dtype.element_ty), mask=token[:, None] < TOKENS)


def fused(x: Tensor, weight: Tensor, scale: Tensor, seed: int) -> Tensor:
    """One kernel for all of x (W0 + diag(scale) z)^T; m must be a multiple of 128 and n of 64."""
    (tokens, n), m = x.shape, len(weight)
    out = x.new_empty(tokens, m)
    block = 128 if tokens > 64 else 16
    grid = (m // 128, triton.cdiv(tokens, block))
    _fused[grid](out, x, weight, scale, seed, tokens, m, n, x.is_cuda, block, 128, 64, num_warps=8, num_stages=3)
    return out


def two_passes(x: Tensor, weight: Tensor, scale: Tensor, seed: int) -> Tensor:
    """As the package does it."""
    block = torch.empty_like(weight)
    perturb_rows(block, weight, scale, "gaussian", seed, 0)
    return x @ block.t()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[5632, 2048], metavar=("M", "N"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 256, 2048, 16384])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    weights = [torch.randn(args.shape, device="cuda", dtype=torch.bfloat16) for _ in range(8)]  # more than the cache
    scale = torch.rand(args.shape[0], device="cuda")
    rows = []
    print("| tokens | library, no noise, us | two passes | fused |\n|---|---|---|---|")
    for tokens in args.tokens:
        x = torch.randn(tokens, args.shape[1], device="cuda", dtype=torch.bfloat16)
        reference = two_passes(x, weights[0], scale, 7).double()
        error = (fused(x, weights[0], scale, 7).double() - reference).norm() / reference.norm()
        assert error < 1e-2, f"the fused product is off by {error:.1e}"
        ways = (
            lambda w, x=x: x @ w.t(),
            lambda w, x=x: two_passes(x, w, scale, 7),
            lambda w, x=x: fused(x, w, scale, 7),
        )
        plain, separate, together = (_microseconds(way, weights) for way in ways)
        rows.append({"tokens": tokens, "library_us": plain, "two_passes_us": separate, "fused_us": together})
        print(f"| {tokens} | {plain:.0f} | {separate / plain:.2f}x | {together / plain:.2f}x |", flush=True)
    if args.output:
        facts = {
            "command": shlex.join(["python", "benchmarks/fused_product.py", *sys.argv[1:]]),
            "hardware": torch.cuda.get_device_name(),
            "versions": {name: version(name) for name in ("torch", "triton", "lora-ggpo")},
        }
        args.output.write_text(json.dumps({**facts, "shape": args.shape, "rows": rows}, indent=1) + "\n")


def _microseconds(way, weights: list[Tensor]) -> float:
    """Of one call, as a graph of one call for each weight: launches cost nothing and no weight stays in the cache."""
    for _ in range(2):
        way(weights[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            way(weight)
    return 1000 * triton.testing.do_bench(graph.replay, return_mode="median") / len(weights)


if __name__ == "__main__":
    main()
