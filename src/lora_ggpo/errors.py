"""The exceptions that a user can do something about."""

from __future__ import annotations

from collections.abc import Iterator


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
