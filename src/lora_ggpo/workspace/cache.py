"""What takes long to make, kept in the user's cache folder for as long as what it is made from stays the same."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from lora_ggpo.workspace.files import write_text

_MADE_FROM = ("jinja2", "peft", "pydantic", "tokenizers", "transformers")

LARGEST, ALL = 2**32, 2**34
"""Bytes of a file that `kept_file` keeps, and of all of them, at most."""


def cached(name: str, make: Callable[[], str]) -> str:
    """What `make` returns: a function of this package and of `_MADE_FROM`. A cache that cannot be used is passed over.

    Args:
        name: Of the file.
    """
    file, state = cache_folder() / name, package_state()
    with suppress(OSError, UnicodeDecodeError):
        of, _, text = file.read_text(encoding="utf-8").partition("\n")
        if of == state:
            return text
    text = make()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, f"{state}\n{text}")
    return text


def cache_folder() -> Path:
    """The user's, of this package; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lora-ggpo"


def fits(size: int) -> bool:
    """Whether a file of `size` bytes is kept: one that is not too large, and leaves half of the disk that is free."""
    place = next(folder for folder in (cache_folder(), *cache_folder().parents) if folder.is_dir())
    return size <= min(LARGEST, shutil.disk_usage(place).free // 2)


def kept_file(name: str, write: Callable[[BinaryIO], None]) -> Path:
    """The file `name`, which says all that decides what is in it; `write` makes it if it is not there.

    Those that were not used for longest are deleted where all together would be too large.
    """
    folder = cache_folder() / "files"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    if not file.is_file():
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", delete=False) as made:
            try:
                write(made)  # type: ignore[arg-type]
                made.flush()
                os.replace(made.name, file)
            except BaseException:
                os.unlink(made.name)
                raise
    os.utime(file)
    _make_room(folder)
    return file


def _make_room(folder: Path) -> None:
    """Delete the files that were used first, until the others are no more than `ALL`; who has mapped one keeps it."""
    size = 0
    for stat, file in sorted(((file.stat(), file) for file in folder.iterdir()), key=lambda one: -one[0].st_mtime):
        size += stat.st_size
        if size > ALL:
            file.unlink(missing_ok=True)


@cache
def package_state() -> str:
    """A digest of the versions and of when each file of this package was last changed."""
    own = sorted(Path(__file__).parents[1].rglob("*.py"))
    facts = [*((name, version(name)) for name in _MADE_FROM), *((str(one), one.stat().st_mtime_ns) for one in own)]
    return sha256(repr(facts).encode()).hexdigest()
