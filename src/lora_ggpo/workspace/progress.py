"""Progress and time left on stderr: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

PLAIN_SECONDS, PLAIN_SHARE = 5.0, 0.02
"""Plain lines are as far apart as the longer of these: seconds, and a share of the time since the work began."""

LEAST = 0.25
"""Steps that are done before the time left is told."""


class Reporter:
    """Says what a run is doing.

    Args:
        console: Where to say it; default is stderr.
        quiet: Say nothing.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(file=sys.stderr, highlight=False, quiet=quiet, soft_wrap=True)
        self._bar: Progress | None = None

    def say(self, message: str) -> None:
        """Print one line, above the bar if there is one."""
        self.console.print(message, markup=False)

    @contextmanager
    def task(self, description: str) -> Iterator[Task]:
        """Report on a piece of work."""
        if not self.console.is_terminal:
            yield Task(self, description)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TextColumn("{task.fields[left]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            yield Task(self, description, bar, bar.add_task(description, total=None, note="", left=""))


class Task:
    """A piece of work under way; made by `Reporter.task`."""

    def __init__(self, reporter: Reporter, description: str, bar: Progress | None = None, row: int = 0) -> None:
        self._reporter, self._description, self._bar, self._row = reporter, description, bar, row
        self._start = self._said = time.monotonic()
        self._first = 0.0
        self._last: tuple[float | str, ...] = ()

    def begin(self, done: int) -> None:
        """Start the clock of the time left, with `done` steps done before."""
        self._first = done
        self._start = self._said = time.monotonic()

    def skip(self, steps: float) -> None:
        """Leave out of the time left what turns out to have been done before; the clock runs on."""
        self._first += steps

    def update(self, done: int, total: int, note: str = "", part: float = 0.0) -> None:
        """Report that `done` of `total` steps are done; `note` is a few words such as the loss.

        Args:
            part: What is done of the steps under way, in steps: for the time left.
        """
        now = time.monotonic()
        gone, to_come = done + part - self._first, total - done - part
        left = f"{duration((now - self._start) * to_come / gone)} left" if gone > LEAST and done < total else ""
        if self._bar is not None:
            self._bar.update(TaskID(self._row), completed=done, total=total, note=note, left=left)
            return
        said = (done, total, note, part)
        early = now - self._said < max(PLAIN_SECONDS, PLAIN_SHARE * (now - self._start))
        if (early or said == self._last) and done < total:
            return
        self._said, self._last = now, said
        self._reporter.say(f"{self._description}: {', '.join(filter(None, [f'{done}/{total}', note, left]))}")


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
