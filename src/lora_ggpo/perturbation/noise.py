r"""Unit-variance noise that can be made again from a seed, a block of rows at a time.

The method needs eps with uncorrelated rows, E eps = 0 and Var eps_ij = tau_i^2: to second order in eps nothing else
enters the objective, E L(W + eps) = L(W) + 1/2 tr(H diag(tau^2)) + ... . With unit noise z, eps = tau z. ``NOISES`` has

``"table"``
    One standardised table of 2^21 (CPU) or 2^23 (elsewhere) Gaussian draws, shared by all layers and read at a random
    offset for each block (as OpenAI's evolution strategies do, arXiv 1703.03864), with a fresh random sign for each
    row. Each row begins 64 entries behind the one before, so a block's noise stays in the processor's cache; rows
    overlap, and it is the signs that make any two rows, of one layer or of two, exactly uncorrelated. Within a row
    entries are those of the table. No draw is made in the inner loop.
``"gaussian"``
    Fresh N(0, 1) draws. The law of the paper; the slowest on a CPU and, by a kernel that makes the draws in registers
    (:mod:`~lora_ggpo.perturbation.kernel`), the fastest on a GPU.
``"rademacher"``
    Fresh random signs, one random bit an entry. Same two moments, lighter tails.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_TABLE_SEED = 0x6767_706F
_MASK = (1 << 64) - 1
_ROW_SHIFT = 64


@dataclass(frozen=True)
class Noise:
    """A kind of unit noise z.

    Attributes:
        rows: Function of (seed, start, rows, columns, device) that makes rows [start, start + rows) of a layer's z,
            (rows, columns) in float32, and the same ones for the same arguments: forward and backward each call it,
            and nothing is kept between them. What it returns is read-only.
        signs: Function of (seed, rows, device) that makes a factor for each row, (rows,), once for a draw; None where
            rows are fresh anyway.
        table: What all layers on a device read; None is nothing.
        in_kernel: Whether a GPU draws it by :mod:`~lora_ggpo.perturbation.kernel` instead.
    """

    rows: Callable[[int, int, int, int, torch.device], Tensor]
    signs: Callable[[int, int, torch.device], Tensor] | None = None
    table: Callable[[torch.device], Tensor] | None = None
    in_kernel: bool = False


# --- table ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)  # a view made by a layer's forward pass serves its backward pass
def _table_rows(seed: int, start: int, rows: int, columns: int, device: torch.device) -> Tensor:
    table, shift = noise_table(device), min(_ROW_SHIFT, columns)
    span = (rows - 1) * shift + columns
    if span > table.numel():
        raise ValueError(f'a row of {columns} entries is longer than the noise table; use noise="gaussian"')
    offset = mix(seed, start) % (table.numel() - span + 1)
    return table.as_strided((rows, columns), (shift, 1), offset)


def _row_signs(seed: int, rows: int, device: torch.device) -> Tensor:
    generator = _generator(device).manual_seed(seed)
    return torch.randint(0, 2, (rows,), generator=generator, device=device, dtype=torch.float32).mul_(2).sub_(1)


@lru_cache(maxsize=8)
def noise_table(device: torch.device) -> Tensor:
    """The shared table: N(0, 1) draws, shifted and scaled to mean 0 and variance 1; float32, made once a device."""
    generator = torch.Generator().manual_seed(_TABLE_SEED)
    table = torch.randn(_table_entries(device), generator=generator, dtype=torch.float64)
    return table.sub_(table.mean()).div_(table.std(correction=0)).float().to(device)


def _table_entries(device: torch.device) -> int:
    return 1 << (21 if device.type == "cpu" else 23)


# --- fresh draws ---------------------------------------------------------------------------------------------------


def _gaussian_rows(seed: int, start: int, rows: int, columns: int, device: torch.device) -> Tensor:
    generator = _generator(device).manual_seed(mix(seed, start))
    return torch.randn(rows, columns, generator=generator, device=device)


def _random_signs(seed: int, start: int, rows: int, columns: int, device: torch.device) -> Tensor:
    entries, generator = rows * columns, _generator(device).manual_seed(mix(seed, start))
    packed = torch.randint(0, 256, (-(-entries // 8),), generator=generator, device=device)
    return _sign_bytes(device).index_select(0, packed).view(-1)[:entries].view(rows, columns)


@lru_cache(maxsize=8)
def _sign_bytes(device: torch.device) -> Tensor:
    """All 256 bytes as 8 signs: one look-up turns 8 random bits into 8 entries."""
    bits = torch.arange(256)[:, None] >> torch.arange(8)
    return (bits & 1).mul(2).sub(1).float().to(device)


@lru_cache(maxsize=8)
def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device)


# --- all of them ---------------------------------------------------------------------------------------------------


NOISES: dict[str, Noise] = {
    "table": Noise(_table_rows, _row_signs, noise_table),
    "gaussian": Noise(_gaussian_rows, in_kernel=True),
    "rademacher": Noise(_random_signs, in_kernel=True),
}
"""``GGPOConfig.noise``, beside ``"auto"``."""


def noise_kind(choice: str, device: torch.device) -> str:
    """The name in ``NOISES`` of what ``choice`` is on ``device``: ``"auto"`` is what costs least there."""
    return choice if choice != "auto" else "gaussian" if has_kernel(device) else "table"


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


def row_blocks(rows: int, columns: int, device: torch.device) -> tuple[tuple[int, int], ...]:
    """Split rows into blocks of at most half the noise table: the only m x n storage the method ever uses."""
    return split_rows(rows, columns, _table_entries(device) // 2)


@lru_cache(maxsize=256)
def split_rows(rows: int, columns: int, entries: int) -> tuple[tuple[int, int], ...]:
    """Split rows into blocks [start, stop) of at most so many entries, or of one row."""
    step = max(1, entries // columns)
    return tuple((start, min(start + step, rows)) for start in range(0, rows, step))
