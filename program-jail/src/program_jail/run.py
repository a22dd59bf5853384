"""The parent's side: start a program in a process of its own, watch it, and say how it ended."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from program_jail import inside

_POLL = 0.02
_MIB = 1 << 20
_START = 60.0
"""Seconds that a busy machine may take to start the interpreter."""


class IsolationError(RuntimeError):
    """This system cannot isolate a process; nothing was run."""


@dataclass(frozen=True)
class Limits:
    """What a program may use; times in seconds, sizes in MiB.

    Attributes:
        seconds: Of CPU time, and of wall-clock time.
        memory: Address space, the interpreter's own included.
        file: Size of one file.
        written: Written in all; looked at some fifty times a second.
        entries: Files and folders in its folder; looked at as often.
    """

    seconds: float = 5.0
    memory: int = 1024
    file: int = 16
    written: int = 64
    entries: int = 4096


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end, and if not, why."""

    passed: bool
    detail: str


def run_isolated(source: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program: standard library only, no network, no other process, no file outside its own folder.

    `program_jail.inside` says how. The folder is a temporary one that is deleted afterwards.

    Raises:
        IsolationError: this system cannot isolate a process.
    """
    if sys.platform != "linux" or platform.machine() not in inside.CALLS:
        raise IsolationError(_UNSUPPORTED)
    limits = limits or Limits()
    reader, writer = os.pipe()
    token = secrets.token_hex(16)
    with _temporary_folder() as folder, os.fdopen(reader, "rb", buffering=0) as results:
        try:
            # Of the environment nothing is passed on: it may hold keys.
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", inside.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"LANG": "C.UTF-8"},
                pass_fds=[writer],
                start_new_session=True,
            )
            request = {"source": source, "token": token, "result": writer, "limits": _rlimits(limits)}
        finally:
            os.close(writer)
        try:
            begun = _begin(process, json.dumps(request), results)
            killed = _watch(process, folder, limits) if begun == inside.READY else None
        finally:
            process.kill()
            process.wait()
        # The pipe holds no more than the kernel's buffer, and every writer is gone.
        said = results.read().decode(errors="replace")
    if begun != inside.READY:  # what was not run is not wrong
        raise IsolationError(f"{_UNSUPPORTED} ({begun.decode(errors='replace') + said or 'It could not be started.'})")
    if said == token and not killed:
        return Outcome(True, "passed")
    return Outcome(False, killed or said or f"ended by itself with code {process.returncode}")


def check_isolation(limits: Limits | None = None) -> None:
    """Raise an IsolationError if this system cannot isolate a process, or `limits` are too tight for any program."""
    outcome = run_isolated("pass", limits)
    if not outcome.passed:
        raise IsolationError(f"{_UNSUPPORTED} (A program that does nothing {outcome.detail}.)")


_UNSUPPORTED = "Isolation needs Linux 5.13 or newer with Landlock, on x86-64 or arm64."


def _rlimits(limits: Limits) -> dict[str, int]:
    return {
        "RLIMIT_CPU": int(limits.seconds) + 1,
        "RLIMIT_AS": limits.memory * _MIB,
        "RLIMIT_FSIZE": limits.file * _MIB,
        "RLIMIT_NOFILE": 64,
    }


def _begin(process: subprocess.Popen[bytes], request: str, results: io.FileIO) -> bytes:
    """Hand over the request; return what the process says when it is locked down, or why it is not."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(request.encode())
        process.stdin.close()
    began = select.select([results], [], [], _START)[0]
    return os.read(results.fileno(), len(inside.READY)) if began else b""


def _watch(process: subprocess.Popen[bytes], folder: Path, limits: Limits) -> str | None:
    """Wait for the end; return why the program had to be killed, if it had to."""
    deadline = time.monotonic() + limits.seconds
    while process.poll() is None:
        if time.monotonic() > deadline:
            return f"took more than {limits.seconds:g} s"
        if _written(process) > limits.written * _MIB:
            return f"wrote more than {limits.written} MiB"
        if not _few_entries(folder, limits.entries):
            return f"made more than {limits.entries} files, or folders that cannot be looked into"
        time.sleep(_POLL)
    return None


def _written(process: subprocess.Popen[bytes]) -> int:
    """Bytes that the process has written, whatever has become of the files."""
    try:
        with open(f"/proc/{process.pid}/io") as file:
            return int(next(line for line in file if line.startswith("wchar:")).split()[1])
    except (OSError, StopIteration) as error:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)  # a process at its end can no longer be looked into
            return 0
        raise IsolationError(f"{_UNSUPPORTED} (What a process writes cannot be watched: {error}.)") from error


def _few_entries(folder: Path, most: int) -> bool:
    found, unseen = 0, [str(folder)]
    while unseen:
        try:
            with os.scandir(unseen.pop()) as entries:
                for entry in entries:
                    found += 1
                    if found > most:
                        return False
                    if entry.is_dir(follow_symlinks=False):
                        unseen.append(entry.path)
        except FileNotFoundError:  # it has just been deleted
            continue
        except OSError:  # without the right to read it, or too deep for a path
            return False
    return True


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="program-jail-"))
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Delete a folder in which a program may have nested folders without end, or taken rights away."""
    while names := os.listdir(folder):
        for name in names:
            here = folder / name
            if not here.is_dir():
                here.unlink()
                continue
            here.chmod(0o700)
            for inner in here.iterdir():
                if inner.is_dir():  # to the top, where paths are short
                    inner.chmod(0o700)
                    inner.rename(folder / secrets.token_hex(16))
                else:
                    inner.unlink()
            here.rmdir()
    folder.rmdir()
