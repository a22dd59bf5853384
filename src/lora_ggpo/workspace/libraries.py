"""The libraries that a run is made with: which ones, on what device, and how to keep them from talking."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import platform
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version

_DECIDING = ("lora-ggpo", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy", "scipy")


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a run computes."""
    return {"python": platform.python_version()} | {name: version(name) for name in _DECIDING}


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Imports in the block are not searched for garbage, neither meanwhile nor ever after: their 500,000 objects stay
    as long as the process does. A run so begins 1.5 s of processor time earlier."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def device_name() -> str:
    """The accelerator that runs are on, or "CPU"."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def quiet_bitsandbytes() -> None:
    """Keep back the notes of bitsandbytes: as peft imports it, and on each cast of an 8-bit layer."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Keep the progress bars and notes of all libraries out of ours."""
    quiet_bitsandbytes()
    import datasets
    import transformers

    for log in (transformers.logging, datasets.logging):
        log.set_verbosity_error()
        log.disable_progress_bar()


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers and datasets in the block, and give them back as they were.

    stderr is taken away as well: the progress bar of transformers' GGUF reader obeys no switch.
    """
    import datasets
    import transformers

    logs = (transformers.logging, datasets.logging)
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    quiet_libraries()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for log, verbosity, bars in before:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
