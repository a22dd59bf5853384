"""How much memory is used and free: on a CUDA device by tensors, elsewhere (on Linux) by the process."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lora_ggpo.errors import UserError, lacks_memory
from lora_ggpo.recipe.recipe import Recipe

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_MACHINE = Path("/proc/meminfo")


def reset_peak(device: torch.device) -> None:
    """Start measuring anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _release_freed_memory()
        _CLEAR.write_text("5")  # sets the high-water mark to what is resident now


def peak(device: torch.device) -> int | None:
    """Bytes at the peak since `reset_peak`; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kilobytes(_STATUS, "VmHWM")


def in_use(device: torch.device) -> int | None:
    """Bytes in use now; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    _release_freed_memory()
    return _kilobytes(_STATUS, "VmRSS")


def available(device: torch.device) -> int | None:
    """Bytes that this process can have, those in use included; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free, own = _kilobytes(_MACHINE, "MemAvailable"), _kilobytes(_STATUS, "VmRSS")
    return None if free is None or own is None else free + own


@contextmanager
def memory_errors(recipe: Recipe, batch_size: str) -> Iterator[None]:
    """Turn a lack of memory into one sentence that says what to lower.

    Args:
        batch_size: The setting of ``training`` that decides how many rows are computed at once.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        trains = batch_size == "per_device_train_batch_size"
        checkpointing = ", or set training.gradient_checkpointing: true" if trains else ""
        raise UserError(
            f"The memory is full with training.{batch_size} {recipe.training_fields[batch_size]} and task.max_length "
            f"{recipe.task.max_length}; lower one of them{checkpointing}."
        ) from error


def _kilobytes(file: Path, name: str) -> int | None:
    """The bytes that a line ``name: N kB`` of `file` states."""
    if not file.exists():
        return None
    marks = [line.split() for line in file.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(marks[0][1]) * 1024 if marks else None


def _release_freed_memory() -> None:
    """Hand back to the system what earlier work has freed; it would count as in use."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return
