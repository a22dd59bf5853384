"""Processes of their own that have the libraries at once: each is forked from one that has imported them."""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

_FORKING = multiprocessing.get_context("forkserver")
_FORKING.set_forkserver_preload(["tests.preloaded"])


class Process:
    """Calls `function(*arguments)` in a process of its own, whose output it keeps in files."""

    def __init__(self, function, *arguments, folder=None, **environment):
        self._temporary = tempfile.TemporaryDirectory()  # goes with this object
        self._files = [Path(self._temporary.name, name) for name in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        place, settings = folder or os.getcwd(), {**os.environ, **environment}
        self._process = _FORKING.Process(target=_begin, args=(self._files, place, settings, function, arguments))
        self._process.start()

    @property
    def stdout(self):
        """What it has written so far."""
        return self._files[0].read_text(errors="replace")

    @property
    def stderr(self):
        """What it has written so far."""
        return self._files[1].read_text(errors="replace")

    @property
    def returncode(self):
        """As `subprocess` has it: None while it runs."""
        return self._process.exitcode

    def send_when(self, ready, number, timeout=120):
        """Wait until `ready()`, then send it signal `number`, unless it has ended before."""
        deadline = time.monotonic() + timeout
        while self.returncode is None and not ready():
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.01)
        if self.returncode is None:
            os.kill(self._process.pid, number)

    def wait(self, timeout=300):
        """Wait for its end and return its exit code."""
        self._process.join(timeout)
        assert self.returncode is not None, f"still running after {timeout} s"
        return self.returncode


def command(*arguments, **options):
    """`lora-ggpo` with these arguments, under way."""
    return Process(call, [str(argument) for argument in arguments], **options)


def run(*arguments, **options):
    """`lora-ggpo` with these arguments, which has ended."""
    process = command(*arguments, **options)
    process.wait()
    return process


def spawn(function, arguments, count):
    """Call `function(rank, *arguments)` in each of `count` processes, and wait; what is raised there is raised here."""
    from torch.multiprocessing import start_processes

    settings = dict(os.environ)  # the process that forks may be an older one, and have others
    start_processes(_call, (settings, function, arguments), count, start_method=_FORKING.get_start_method())


def _call(rank, settings, function, arguments):
    _take_over(settings)
    function(rank, *arguments)


def call(arguments):
    """`lora-ggpo` with these arguments, as the whole of this process."""
    from lora_ggpo.__main__ import main

    sys.argv = ["lora-ggpo", *arguments]
    main()


def _begin(files, place, settings, function, arguments):
    for number, path in enumerate(files, 1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    _take_over(settings)
    os.chdir(place)
    function(*arguments)


def _take_over(settings):
    """The environment of the tests; and Ctrl-C is heard, also where a shell has put the tests into the background."""
    os.environ.clear()
    os.environ.update(settings)
    signal.signal(signal.SIGINT, signal.default_int_handler)
