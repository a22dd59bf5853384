"""Run Python programs that nobody trusts, such as those a model wrote, in isolated processes with limits."""

from __future__ import annotations

import json
import os
import platform
import secrets
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation import jail

_POLL = 0.02
_MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a program may use; times in seconds, sizes in MiB.

    Attributes:
        seconds: Of CPU time, and of wall-clock time.
        memory: Address space, the interpreter's own included.
        file: Size of one file.
        folder: Size of all files in its folder, looked at some fifty times a second.
    """

    seconds: float = 5.0
    memory: int = 1024
    file: int = 16
    folder: int = 64


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end, and if not, why."""

    passed: bool
    detail: str


def run_isolated(source: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program: standard library only, no network, no other process, no file outside its own folder.

    How is told in `lora_ggpo.evaluation.jail`. The folder is a temporary one that is deleted afterwards.

    Raises:
        UserError: this system cannot isolate a process.
    """
    check_system()
    limits = limits or Limits()
    reader, writer = os.pipe()
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="lora-ggpo-") as folder, os.fdopen(reader, "rb") as results:
        try:
            # Of the environment nothing is passed on: it may hold keys.
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", jail.__file__],
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
            assert process.stdin is not None
            killed = _feed(process, json.dumps(request)) or _watch(process, Path(folder), limits)
        finally:
            process.kill()
            process.wait()
        # The pipe holds no more than the kernel's buffer, and every writer is gone.
        said = results.read().decode(errors="replace")
    if process.returncode == jail.LANDLOCK_MISSING:
        raise UserError(_UNSUPPORTED)
    if said == token and not killed:
        return Outcome(True, "passed")
    return Outcome(False, killed or said or f"ended by itself with code {process.returncode}")


def check_system() -> None:
    """Raise a UserError if this system cannot isolate a process, as far as that shows from outside."""
    if sys.platform != "linux" or platform.machine() not in jail._CALLS:
        raise UserError(_UNSUPPORTED)


_UNSUPPORTED = (
    "Generated code is run in isolation only, which needs Linux 5.13 or newer with Landlock, on x86-64 or arm64; "
    "generate the answers here and score them on such a system."
)


def _rlimits(limits: Limits) -> dict[str, int]:
    return {
        "RLIMIT_CPU": int(limits.seconds) + 1,
        "RLIMIT_AS": limits.memory * _MIB,
        "RLIMIT_FSIZE": limits.file * _MIB,
        "RLIMIT_NOFILE": 64,
    }


def _feed(process: subprocess.Popen[bytes], request: str) -> str | None:
    assert process.stdin is not None
    try:
        process.stdin.write(request.encode())
        process.stdin.close()
    except BrokenPipeError:
        return "could not be started"
    return None


def _watch(process: subprocess.Popen[bytes], folder: Path, limits: Limits) -> str | None:
    """Wait for the end; why the program had to be killed, if it had to."""
    deadline = time.monotonic() + limits.seconds
    while process.poll() is None:
        if time.monotonic() > deadline:
            return f"took more than {limits.seconds:g} s"
        if _size(folder) > limits.folder * _MIB:
            return f"wrote more than {limits.folder} MiB"
        time.sleep(_POLL)
    return None


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except FileNotFoundError:  # it has just been deleted
                continue
    return total
