"""Paths as users write them. This is the one place where ``~`` is expanded."""

from __future__ import annotations

import os


def expand_home(text: str) -> str:
    """`text` with ``~`` or ``~user`` at its beginning expanded as a shell does.

    Raises:
        ValueError: there is no such user, or no path can be like that; the message has no subject.
    """
    if "\0" in text:
        raise ValueError("holds a NUL character, which no path can")
    path = os.path.expanduser(text)
    if text.startswith("~") and path == text:
        raise ValueError(
            f"begins with {text.split('/')[0]}, but there is no such user; a name like that needs ./ first"
        )
    return path
