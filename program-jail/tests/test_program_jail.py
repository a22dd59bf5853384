"""Hostile programs are contained; harmless ones run."""

import os
import platform
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest
from program_jail import IsolationError, Limits, Outcome, check_isolation, inside, run_isolated


def isolates():
    try:
        check_isolation()
    except IsolationError:
        return False
    return True


pytestmark = pytest.mark.skipif(not isolates(), reason="this system has no Landlock")

SHORT = Limits(seconds=2, memory=512, file=4, written=16)
ENOUGH = Limits(seconds=20, memory=512, file=4, written=16)


@pytest.mark.parametrize(
    "source",
    [
        "print('x' * 10**7)",  # more output than a pipe holds
        "import sys; sys.stdin.read()",
        "open('a', 'w').write('b'); assert open('a').read() == 'b'",
        "import os; os.mkdir('d'); os.rename('d', 'e'); os.rmdir('e')",
        "import tempfile; tempfile.TemporaryFile().write(b'x')",
        "import threading; t = threading.Thread(target=print); t.start(); t.join()",
        "import time; time.sleep(0.1)",
        "import random, hashlib, decimal, datetime, json, re, functools; random.random(); datetime.datetime.now()",
        "if __name__ == '__main__': input()",  # a demonstration behind an answer
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n  x: int\nA(1)",
        "import fcntl; file = open('a', 'w'); fcntl.flock(file, fcntl.LOCK_EX); fcntl.lockf(file, fcntl.LOCK_UN)",
        "import mmap; mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE).write(b'x')",
    ],
)
def test_harmless_programs_pass(source):
    assert run_isolated(source, ENOUGH) == Outcome(True, "passed")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended by itself with code 0"),
        ("import os; os._exit(97)", "ended by itself with code 97"),
        ("def f(:", "SyntaxError"),
        ("import ctypes; ctypes.string_at(0)", "ended by itself with code -11"),
        ("f = lambda n: f(n + 1); f(0)", "RecursionError"),
        ("x = bytearray(2**31)", "MemoryError"),
        ("while True: pass", "took more than 2 s"),
        ("import time; time.sleep(3600)", "took more than 2 s"),
        ("import signal, time; signal.signal(15, signal.SIG_IGN)\nwhile True: time.sleep(1)", "took more than 2 s"),
        ("open('big', 'wb').write(bytes(8 << 20))", "File too large"),
        ("import os\nos.fork()", "Operation not permitted"),
        ("import os\nos.system('true') == 0 or 1 / 0", "ZeroDivisionError"),
        ("import subprocess; subprocess.run(['true'])", "Operation not permitted"),
        ("import multiprocessing as m; m.Process(target=print).start()", "Operation not permitted"),
        ("import os; os.execv('/bin/true', ['true'])", "Operation not permitted"),
        ("import socket; socket.create_connection(('127.0.0.1', 80))", "Operation not permitted"),
        ("import socket; socket.socket(socket.AF_UNIX)", "Operation not permitted"),
        ("import urllib.request as u; u.urlopen('http://127.0.0.1')", "Operation not permitted"),
        ("open('/etc/passwd').read()", "Permission denied"),
        ("open('/proc/self/environ').read()", "Permission denied"),
        ("import os; os.listdir('/')", "Permission denied"),
        ("import os; os.listdir(os.path.expanduser('~root'))", "Permission denied"),
        ("open('/dev/shm/x', 'w')", "Permission denied"),
        ("import os; os.truncate('/etc/hostname', 0)", "Operation not permitted"),
        ("import os; os.posix_fallocate(os.open('a', os.O_CREAT | os.O_RDWR), 0, 4096)", "Operation not permitted"),
        ("import mmap; mmap.mmap(-1, 4096)", "Operation not permitted"),
        ("import fcntl, os; fcntl.fcntl(os.pipe()[1], fcntl.F_SETOWN, os.getppid())", "Operation not permitted"),
        ("import fcntl, os; fcntl.fcntl(os.pipe()[1], 10, 9)", "Operation not permitted"),  # F_SETSIG
        ("import os; os.chmod('.', 0o777)", "Operation not permitted"),
        ("import os; os.symlink('/etc', 'etc')", "Operation not permitted"),
        ("import os; os.link('/etc/passwd', 'p')", "Operation not permitted"),
        ("import os; os.setuid(0)", "Operation not permitted"),
        ("import os; os.chroot('.')", "Operation not permitted"),
        ("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "not allowed to raise"),
    ],
)
def test_hostile_and_wrong_programs_fail(source, why):
    outcome = run_isolated(source, SHORT if "took" in why else ENOUGH)
    assert not outcome.passed
    assert why in outcome.detail


def test_fork_bomb_starts_nothing():
    source = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    before = len(os.listdir("/proc"))
    assert run_isolated(source, Limits(seconds=1)).detail == "took more than 1 s"
    assert len(os.listdir("/proc")) < before + 50


def test_thread_bomb_is_bounded_by_memory():
    source = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()"
    outcome = run_isolated(source, ENOUGH)
    assert not outcome.passed
    assert "thread" in outcome.detail


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("while True:\n  open(str(n), 'wb').write(bytes(1 << 20)); n += 1", "wrote more than 16 MiB"),
        ("while True:\n  open('a', 'wb').write(bytes(1 << 20)); os.unlink('a')", "wrote more than 16 MiB"),
        ("os.mkdir('d', 0o300)\nwhile True:\n  open(f'd/{n}', 'wb').write(bytes(1 << 20)); n += 1", "wrote|looked"),
        ("while True:\n  open(str(n), 'wb'); n += 1", "made more than 100 files"),
        ("while True:\n  os.mkdir('d' * 200); os.chdir('d' * 200)", "made more than 100 files"),
    ],
)
def test_filling_the_disk_is_stopped(source, why, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    began = time.monotonic()
    outcome = run_isolated(f"import os\nn = 0\n{source}", Limits(seconds=20, written=16, entries=100))
    assert re.search(why, outcome.detail)
    assert time.monotonic() - began < 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("depth", [30, 1500])
def test_folders_too_deep_for_a_path_are_removed(depth, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    name = "d" * (200 if depth < 100 else 1)
    source = f"import os\nfor _ in range({depth}): os.mkdir({name!r}); os.chdir({name!r})\nopen('file', 'w')"
    run_isolated(source, ENOUGH)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("abi", [1, 2, 3, 5])
def test_an_older_kernel_isolates_as_well(abi, monkeypatch, tmp_path):
    """Its Landlock knows no truncation, no network and no signals."""
    old = tmp_path / "old.py"
    old.write_text(
        f"import importlib.util\nspec = importlib.util.spec_from_file_location('jail', {inside.__file__!r})\n"
        "jail = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(jail)\n"
        f"jail._landlock_abi = lambda: {abi}\njail.main()\n"
    )
    monkeypatch.setattr(inside, "__file__", str(old))
    assert run_isolated("open('a', 'w').write('b')", ENOUGH).passed
    victim, secret = subprocess.Popen(["sleep", "60"]), tmp_path / "secret"
    secret.write_text("key")
    set_owner = (
        "import fcntl, os\nr, w = os.pipe()\n"
        f"for command, value in ((fcntl.F_SETOWN, {victim.pid}), (10, 9), (fcntl.F_SETFL, os.O_ASYNC)):\n"
        "  try: fcntl.fcntl(r, command, value)\n  except OSError: pass\nos.write(w, b'x')"
    )
    for source in (f"import os; os.truncate({str(secret)!r}, 0)", f"open({str(secret)!r}, 'w')", set_owner):
        run_isolated(source, ENOUGH)
    assert secret.read_text() == "key"
    assert victim.poll() is None
    victim.kill()
    victim.wait()


@pytest.mark.parametrize("broken", ["_restrict_files", "_restrict_calls"])
def test_what_cannot_be_locked_down_is_not_run(broken, monkeypatch, tmp_path):
    """Nor is it graded: an answer that was not run is not wrong."""
    script = tmp_path / "broken.py"
    text = Path(inside.__file__).read_text()
    script.write_text(text.replace(f"    {broken}(", "    raise OSError(38, 'absent')\n    ("))
    monkeypatch.setattr(inside, "__file__", str(script))
    with pytest.raises(IsolationError, match=r"needs Linux .* \(OSError: .*absent"):
        run_isolated("pass")
    with pytest.raises(IsolationError, match="needs Linux"):
        check_isolation()


def test_files_outside_are_neither_read_nor_written_nor_removed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    for action in (
        "open({0!r}).read()",
        "open({0!r}, 'a')",
        "os.remove({0!r})",
        "os.rename({0!r}, 'x')",
        "os.truncate({0!r}, 0)",
    ):
        outcome = run_isolated("import os\n" + action.format(str(secret)), ENOUGH)
        assert not outcome.passed
        assert any(
            words in outcome.detail for words in ("Permission denied", "Operation not permitted", "cross-device")
        )
    assert secret.read_text() == "key"


def test_nothing_of_the_environment_is_passed_on(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    assert run_isolated("import os; assert 'OPENAI_API_KEY' not in os.environ", ENOUGH).passed


def test_a_listening_server_is_not_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        assert not run_isolated(f"import socket; socket.create_connection(('127.0.0.1', {port}))", ENOUGH).passed
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("number", [0, 9, 15, 19])
def test_the_parent_cannot_be_signalled(number):
    source = f"import os\nfor pid in (os.getppid(), {os.getpid()}, -1): os.kill(pid, {number})"
    assert "Operation not permitted" in run_isolated(source, ENOUGH).detail


def test_the_result_pipe_cannot_be_flooded():
    source = "import os\nfor n in range(3, 64):\n  try: os.write(n, bytes(1 << 20))\n  except OSError: pass"
    assert not run_isolated(source, Limits(seconds=1)).passed


def test_the_folder_is_gone_afterwards(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    run_isolated("import os; os.makedirs('a/b'); open('a/b/c', 'w').write('d')", ENOUGH)
    assert list(tmp_path.iterdir()) == []


def test_a_system_that_cannot_isolate_is_refused(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "sparc")
    with pytest.raises(IsolationError, match="Isolation needs Linux"):
        run_isolated("pass")
