r"""eps, drawn anew for each forward pass, and never kept longer than its backward pass needs it.

Each row of eps is N(0, tau_i^2 I), and any two rows are uncorrelated: so E eps = 0, Cov eps = diag(tau^2), and
E L(W + eps) = L(W) + 1/2 tr(H diag(tau^2)) + ... whatever the rest of the law. ``NOISES`` has two:

``"factored"``
    eps = U V with U (m, k) = diag(tau) signs / sqrt(k) and V (k, n) standard normal. Given the signs, a row of eps is a
    sum of k independent normal rows, N(0, tau_i^2 I) exactly; two rows are uncorrelated, since their signs are
    independent, but not independent: the less so the larger k. x eps^T = (x V^T) U^T costs what an adapter of rank k
    costs, and W0 is neither read nor written. (Low-rank evolution strategies, arXiv 2511.16652, rest on the same law.)
``"dense"``
    Independent N(0, tau_i^2) entries, the joint law of the paper. It is made a block of rows at a time from a seed,
    once in the forward pass and again in the backward pass (:mod:`~lora_ggpo.perturbation.linear`).
"""

from __future__ import annotations

import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, distributed

_MASK = (1 << 64) - 1
_BLOCK_ENTRIES = 1 << 20


class Factors(NamedTuple):
    """eps = U V of a layer: ``v`` is V (k, n), ``u`` is U (m, k), tau in it."""

    v: Tensor
    u: Tensor

    def matrix(self) -> Tensor:
        """eps (m, n)."""
        return self.u @ self.v


class Seeded(NamedTuple):
    """eps = diag(tau) z of a layer, with z a function of the seed: tau is (m,), of n columns."""

    seed: int
    tau: Tensor
    n: int

    def matrix(self) -> Tensor:
        """eps (m, n)."""
        blocks = row_blocks(len(self.tau), self.n)
        z = [gaussian_rows(self.seed, start, stop - start, self.n, self.tau.device) for start, stop in blocks]
        return torch.cat(z).to(self.tau.dtype) * self.tau[:, None]


class Sized(Protocol):
    """A layer that noise is drawn for: W0 (m, n), its number and row norms, and tau (m,) or None."""

    index: int
    m: int
    n: int
    w0_norms: Tensor
    tau: Tensor | None


Noise = Factors | Seeded | None


def draw_factors(layers: Sequence[Sized], seed: int, number: int, rank: int, dtype: torch.dtype | None) -> list[Noise]:
    """The factors of all layers."""
    perturbed = [layer for layer in layers if layer.tau is not None]
    return split_factors(layers, perturbed, joint_factors(perturbed, seed, number, rank, dtype), rank)


def joint_factors(
    layers: Sequence[Sized], seed: int, number: int, rank: int, dtype: torch.dtype | None
) -> list[Tensor]:
    """All V, flattened, and all U^T, side by side, of the layers of each bucket: a few launches for all."""
    joint = []
    for (device, size_dtype), members in buckets(layers).items():
        generator = _generator(device).manual_seed(mix(seed, number))
        v = torch.randn(rank * sum(layer.n for layer in members), generator=generator, device=device)
        u = _signs(rank, sum(layer.m for layer in members), generator).to(size_dtype)
        taus = [layer.w0_norms.new_zeros(layer.m) if layer.tau is None else layer.tau for layer in members]
        u.mul_(torch.cat(taus).div_(math.sqrt(rank)))
        joint += [v.to(dtype or size_dtype), u.to(dtype or size_dtype)]
    return joint


def split_factors(
    layers: Sequence[Sized], perturbed: Sequence[Sized], joint: Sequence[Tensor], rank: int
) -> list[Noise]:
    """Each layer's part of the factors of those that are ``perturbed``."""
    parts: dict[int, Noise] = {}
    for members, v, u in zip(buckets(perturbed).values(), joint[::2], joint[1::2], strict=True):
        of_v, of_u = v.split([rank * layer.n for layer in members]), u.split([layer.m for layer in members], 1)
        for layer, flat, rows in zip(members, of_v, of_u, strict=True):
            parts[layer.index] = Factors(flat.view(rank, layer.n), rows.t())
    return [parts.get(layer.index) for layer in layers]


def buckets(layers: Sequence[Sized]) -> dict[tuple[torch.device, torch.dtype], list[Sized]]:
    """The layers by the device and dtype of their row norms."""
    found = defaultdict(list)
    for layer in layers:
        found[layer.w0_norms.device, layer.w0_norms.dtype].append(layer)
    return found


def draw_seeds(layers: Sequence[Sized], seed: int, number: int, rank: int, dtype: torch.dtype | None) -> list[Noise]:
    """A seed for each layer."""
    return [
        None if layer.tau is None else Seeded(mix(seed, number, layer.index), layer.tau, layer.n) for layer in layers
    ]


NOISES: dict[str, Callable[[Sequence[Sized], int, int, int, torch.dtype | None], list[Noise]]] = {
    "factored": draw_factors,
    "dense": draw_seeds,
}
"""``GGPOConfig.noise``: functions of the layers, the seed, the number of the draw, k, and the dtype that products are
taken in (None is that of tau). The draw is a function of these alone, and never touches torch's global generators."""


def own_number(draw: int, agree: bool) -> int:
    """This process's number of the run's ``draw``-th draw: all have the same if they must ``agree``."""
    if agree or not (distributed.is_available() and distributed.is_initialized()):
        return draw
    return draw * distributed.get_world_size() + distributed.get_rank()


def mean_over_processes(tensor: Tensor) -> Tensor:
    """Put in place of a tensor its mean over all processes, and return it."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)
        tensor /= distributed.get_world_size()
    return tensor


def gaussian_rows(seed: int, start: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Rows [start, start + rows) of z in float32, the same ones for the same arguments."""
    return torch.randn(rows, columns, generator=_generator(device).manual_seed(mix(seed, start)), device=device)


def _signs(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random signs (rows, columns), a random bit each."""
    packed = torch.randint(0, 256, (-(-rows * columns // 8),), generator=generator, device=generator.device)
    return _sign_bytes(generator.device).index_select(0, packed).view(-1)[: rows * columns].view(rows, columns)


@lru_cache(maxsize=8)
def _sign_bytes(device: torch.device) -> Tensor:
    """All 256 bytes as 8 signs: one look-up turns 8 random bits into 8 entries."""
    bits = torch.arange(256)[:, None] >> torch.arange(8)
    return (bits & 1).mul(2).sub(1).float().to(device)


@lru_cache(maxsize=8)
def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device)


@lru_cache(maxsize=8)
def has_kernel(device: torch.device) -> bool:
    """Whether a device has the Triton kernels: GPUs have; CUDA builds of torch come with Triton."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def mix(*parts: int) -> int:
    """Hash integers to a seed of 63 bits (SplitMix64 finaliser, folded over the parts)."""
    state = 0
    for part in parts:
        state = (state + (part & _MASK) + 0x9E37_79B9_7F4A_7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
        state ^= state >> 31
    return state >> 1


@lru_cache(maxsize=256)
def row_blocks(rows: int, columns: int, entries: int = _BLOCK_ENTRIES) -> tuple[tuple[int, int], ...]:
    """Split rows into blocks [start, stop) of at most so many entries, or of one row."""
    step = max(1, entries // columns)
    return tuple((start, min(start + step, rows)) for start in range(0, rows, step))
