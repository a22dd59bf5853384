"""What takes long to make, kept in the user's cache folder for as long as what it is made from stays the same."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
    file = cache_folder() / "files" / name
    if not file.is_file():
        with new_file(file) as made:
            write(made)
    os.utime(file)
    make_room(file, ALL)
    return file


@contextmanager
def new_file(file: Path) -> Iterator[BinaryIO]:
    """Yield a file to write, which becomes `file` in one move when all went well; other processes may make it too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=file.parent, suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, file)
    except BaseException:
        os.unlink(partial)
        raise


def make_room(latest: Path, limit: int) -> None:
    """Delete files beside `latest` until all are `limit` bytes at most, those that were used the longest ago first.

    `latest` stays, with what has its name but for the suffix. Who has mapped a file keeps it.
    """
    with suppress(FileNotFoundError):  # another process deletes as well
        files = [(of.st_mtime, of.st_size, path) for path in latest.parent.iterdir() if (of := path.stat())]
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= limit:
                return
            if path.stem != latest.stem:
                path.unlink()
                total -= size


@cache
def package_state() -> str:
    """A digest of the versions and of when each file of this package was last changed."""
    own = sorted(Path(__file__).parents[1].rglob("*.py"))
    facts = [*((name, version(name)) for name in _MADE_FROM), *((str(one), one.stat().st_mtime_ns) for one in own)]
    return sha256(repr(facts).encode()).hexdigest()
