"""Peak memory: of the accelerator's tensors, or on Linux without one, of the process."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak() -> None:
    """Start measuring anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _release_freed_memory()
        _CLEAR.write_text("5")  # sets the high-water mark to what is resident now


def peak() -> int | None:
    """Bytes at the peak since `reset_peak`; None where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if not _STATUS.exists():
        return None
    marks = [line.split() for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(marks[0][1]) * 1024 if marks else None


def _release_freed_memory() -> None:
    """Hand back what earlier work in this process has freed: it would count as resident."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return
