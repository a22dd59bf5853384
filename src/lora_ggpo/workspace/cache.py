"""What takes long to make, kept in the user's cache folder for as long as what it is made from stays the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from lora_ggpo.workspace.files import write_text

_MADE_FROM = ("jinja2", "peft", "pydantic", "tokenizers", "transformers")


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


@cache
def package_state() -> str:
    """A digest of the versions and of when each file of this package was last changed."""
    own = sorted(Path(__file__).parents[1].rglob("*.py"))
    facts = [*((name, version(name)) for name in _MADE_FROM), *((str(one), one.stat().st_mtime_ns) for one in own)]
    return sha256(repr(facts).encode()).hexdigest()
