"""Comparisons without workers that import the libraries again: in this process, or with workers that are forked."""

import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_ggpo.cli import app
from lora_ggpo.comparison import pool
from lora_ggpo.training.callbacks import RunCallback
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


def finished_runs(output):
    """When each run ended that has; folders may come and go meanwhile, which rglob does not bear."""
    ends = [Path(folder, "metrics.json") for folder, _, files in os.walk(output) if "metrics.json" in files]
    return {path: path.stat().st_mtime_ns for path in ends}


def forking(*arguments, output, halt):
    """`lora-ggpo` with these arguments under way in a process of its own.

    Args:
        output: Folder of its runs.
        halt: A file that is made within a step of a run once another has ended, and for which that step then waits
            until it is gone: what is to stop it cannot come too late, however slow the machine is.
    """
    return processes.Process(_fork, [str(argument) for argument in arguments], output, halt)


def _fork(arguments, output, halt):
    step_end, done, halted = RunCallback.on_step_end, len(finished_runs(output)), []

    def wait(self, args, state, control, **kwargs):
        if not halted and len(finished_runs(output)) > done:
            halted.append(state.global_step)
            halt.touch()
            while halt.exists():
                time.sleep(0.01)
        return step_end(self, args, state, control, **kwargs)

    RunCallback.on_step_end = wait
    assert threading.active_count() == 1, "a fork would lose the other threads"
    context = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method: context
    processes.call(arguments)
