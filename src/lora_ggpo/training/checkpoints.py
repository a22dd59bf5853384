"""Checkpoints that are known to be whole.

Trainer writes a checkpoint file by file. A seal, written last, lists the files and their digests; only a checkpoint
that agrees with its seal is resumed from, and older ones go only when a newer one is sealed.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from lora_ggpo.errors import UserError
from lora_ggpo.workspace.files import digests, settle, write_json

SEAL = "sealed.json"


def seal(checkpoint: Path, keep: int | None) -> None:
    """Mark `checkpoint` as whole and delete all but the `keep` newest (None or 0 keeps all)."""
    # Trainer pickles its arguments beside the weights; nothing here reads them, and nobody should.
    (checkpoint / "training_args.bin").unlink(missing_ok=True)
    settle(checkpoint)  # Trainer leaves that to the system, and the older checkpoints are about to go
    write_json(checkpoint / SEAL, digests(_files(checkpoint), checkpoint))
    rotate_checkpoints(str(checkpoint.parent), save_total_limit=keep)


def is_whole(checkpoint: Path) -> bool:
    """Whether the files hold what was sealed. Their content is compared: after a power cut a size proves nothing."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        return bool(sealed == digests(_files(checkpoint), checkpoint))
    except (OSError, ValueError, RecursionError):
        return False


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done in `checkpoint`."""
    return int(checkpoint.name.rpartition("-")[2])


def last_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, if any."""
    newest_first = sorted(_checkpoints(folder), key=step_of, reverse=True)
    return next(filter(is_whole, newest_first), None)


def remove_broken(folder: Path) -> None:
    """Delete broken checkpoints, which would count when older ones are deleted."""
    for checkpoint in _checkpoints(folder):
        if not is_whole(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)


@contextmanager
def expect_tensors(checkpoint: Path | None) -> Iterator[None]:
    """Say in one sentence that `checkpoint` cannot be read, for somebody else made it and its seal.

    torch loads with ``weights_only``, which raises UnpicklingError where a pickle would run code.
    """
    try:
        yield
    except (pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"{checkpoint} holds more or less than tensors and is not read; delete it to go on from the one before."
        ) from error


def remove_unsealed(folder: Path) -> None:
    """Delete the checkpoint that was being written when training stopped: its disk space may be needed."""
    for checkpoint in _checkpoints(folder):
        if not (checkpoint / SEAL).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    found = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir() else ()
    return [path for path in found if path.is_dir() and path.name.rpartition("-")[2].isdigit()]


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL]
