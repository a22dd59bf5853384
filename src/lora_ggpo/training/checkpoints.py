"""Checkpoints that are known to be whole.

Trainer writes a checkpoint file by file. A seal, written last, lists the files and their sizes; only a checkpoint that
agrees with its seal is resumed from, and older ones go only when a newer one is sealed.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from lora_ggpo.training.files import write_json

SEAL = "sealed.json"


def seal(checkpoint: Path, keep: int | None) -> None:
    """Mark `checkpoint` as whole and delete all but the `keep` newest (None or 0 keeps all)."""
    # Trainer pickles its arguments beside the weights; nothing here reads them, and nobody should.
    (checkpoint / "training_args.bin").unlink(missing_ok=True)
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}
    write_json(checkpoint / SEAL, sizes)
    rotate_checkpoints(str(checkpoint.parent), save_total_limit=keep)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that was sealed is there, in full length."""
    try:
        sizes = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done in `checkpoint`."""
    return int(checkpoint.name.rpartition("-")[2])


def last_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, if any."""
    return max(filter(is_whole, _checkpoints(folder)), key=step_of, default=None)


def remove_broken(folder: Path) -> None:
    """Delete checkpoints that are not whole: they would count when older ones are deleted."""
    for checkpoint in _checkpoints(folder):
        if not is_whole(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    found = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir() else ()
    return [path for path in found if path.is_dir() and path.name.rpartition("-")[2].isdigit()]


def _files(folder: Path) -> list[Path]:
    return [Path(parent) / name for parent, _, names in os.walk(folder) for name in names if name != SEAL]
