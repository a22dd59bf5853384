"""Ctrl-C in two stages: the first asks for a clean stop, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A clean stop that was asked for; its message says how to go on."""


class StopRequest:
    """Whether a clean stop has been asked for."""

    def __init__(self) -> None:
        self.made = False


@contextmanager
def two_stage_interrupt(on_first: Callable[[], None]) -> Iterator[StopRequest]:
    """Catch the first SIGINT: it sets `made` and calls `on_first`. The second raises KeyboardInterrupt, as usual.

    Signals belong to the main thread; in any other this does nothing.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        request.made = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        on_first()

    signal.signal(signal.SIGINT, handle)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, previous)
