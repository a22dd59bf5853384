"""Comparisons without workers that import the libraries again: in this process, or with workers that are forked."""

import multiprocessing
import sys
import threading
from concurrent.futures import Future

import pytest
from typer.testing import CliRunner

from lora_ggpo.cli import app
from lora_ggpo.comparison import pool
from tests import processes


class Here:
    """A pool that carries calls out as they are submitted."""

    width = 1

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def stop(self): ...

    def close(self): ...

    def abandon(self): ...


def here(*arguments):
    """`lora-ggpo` with these arguments."""
    command = [str(argument) for argument in arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "LocalPool", lambda jobs: Here())
        patch.setattr(sys, "argv", ["lora-ggpo", *command])
        return CliRunner().invoke(app, command)


def forking(*arguments):
    """`lora-ggpo` with these arguments under way in a process of its own."""
    return processes.Process(_fork, [str(argument) for argument in arguments])


def _fork(arguments):
    assert threading.active_count() == 1, "a fork would lose the other threads"
    context = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method: context
    processes.call(arguments)
