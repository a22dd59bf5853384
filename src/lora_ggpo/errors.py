"""The exceptions that a user can do something about."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from traceback import walk_tb


class UserError(Exception):
    """Bad input: its message says in one sentence what is wrong, where, and what to do.

    The command line prints the message alone and exits with code 2; library callers may catch it. The message is one
    line whatever it quotes: line breaks and other control characters of a file's content are shown as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


class DivergedError(UserError):
    """Training went to values that are not finite: the settings of this one run are at fault."""


def first_line(error: BaseException, text: str | None = None) -> str:
    """The first line of what `error` says that is not blank, or else the name of its type.

    Args:
        text: What it says, where that is not ``str(error)``.
    """
    lines = (str(error) if text is None else text).splitlines()
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what it came from, each once: ``raise error from error`` makes an error its own cause."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def first_sentence(error: BaseException) -> str:
    """The first sentence of what `error` says, with its full stop."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else None
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", first_line(error, text))[0].rstrip(".:") + "."


def count(number: int, what: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def lacks_memory(error: BaseException) -> bool:
    """Whether `error` is Python's or torch's for a lack of memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


@contextmanager
def explain_rejection(section: str, settings: Collection[str] | None = None) -> Iterator[None]:
    """Say in one sentence what a library does not take in a `section` of the recipe, and in which of its `settings`.

    The setting is named if the library names it (None: `section` is the setting). A lack of memory, what the system is
    at fault for, and what is raised by this package itself pass as they are.

    Raises:
        UserError: instead of what a library raises.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        library, _, part = _raised_by(error).partition(".")
        if library == __package__ and part.startswith("perturbation") and isinstance(error, ValueError):
            raise UserError(f"ggpo: {first_sentence(error)}") from error  # what the method documents that it raises
        if library == __package__ or lacks_memory(error):
            raise
        named = next((word for word in re.findall(r"\w+", str(error)) if word in (settings or ())), None)
        subject = f"{section}.{named}" if named else section
        where = "" if named or settings is None else " (--debug shows where)"
        text = f"{error} is none of its choices" if isinstance(error, KeyError) else first_sentence(error).rstrip(".")
        raise UserError(f"{subject} is rejected by {library}: {text}{where}.") from error


def _raised_by(error: BaseException) -> str:
    """The module whose code raised `error`, by itself or in Python's own library."""
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in walk_tb(error.__traceback__)]
    return next((name for name in reversed(modules) if name.partition(".")[0] not in sys.stdlib_module_names), "Python")
