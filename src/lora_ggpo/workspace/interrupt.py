"""Ctrl-C and SIGTERM, which schedulers and spot machines send, in two stages: the first signal asks for a clean stop,
the second stops at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lora_ggpo.errors import causes

TOGETHER = 2.0
"""Seconds in which several SIGTERM are one: a scheduler signals a launcher and its processes, to which the launcher
passes it on."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised in the main thread as Ctrl-C would be."""


class Interrupted(KeyboardInterrupt):
    """A clean stop on request; the message says how to go on."""


def exit_code(error: KeyboardInterrupt) -> int:
    """128 plus the number of the signal behind `error`, as in shells."""
    terminated = any(isinstance(one, Terminated) for one in causes(error))
    return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


def raise_terminated(*_: Any) -> None:
    """A handler of SIGTERM.

    Raises:
        Terminated: always.
    """
    raise Terminated("Terminated.")


class StopRequest:
    """Whether a clean stop has been asked for.

    Attributes:
        reason: What is to be raised `from`: what came to this process.
    """

    def __init__(self) -> None:
        self.made = False
        self.reason: KeyboardInterrupt | None = None


@contextmanager
def two_stage_interrupt(on_first: Callable[[], None]) -> Iterator[StopRequest]:
    """Catch the first SIGINT and the first SIGTERM: they set `made` and call `on_first`. The second of a kind does what
    it would elsewhere: KeyboardInterrupt, or what SIGTERM did before.

    Signals belong to the main thread; in any other this does nothing.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}
    second = before | {signal.SIGINT: signal.default_int_handler}
    came: dict[int, float] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        again = number in came
        if again and number == signal.SIGTERM and time.monotonic() - came[number] < TOGETHER:
            return
        if again:
            signal.signal(number, second[signal.Signals(number)])
            signal.raise_signal(number)
            return
        came[number] = time.monotonic()
        request.made = True
        request.reason = request.reason or (Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
        on_first()

    for number in before:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
