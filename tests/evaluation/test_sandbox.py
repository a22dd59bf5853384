"""Hostile programs are contained; harmless ones run."""

import os
import platform
import socket
import time

import pytest

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation import sandbox
from lora_ggpo.evaluation.sandbox import Limits, run_isolated


def isolates():
    try:
        return run_isolated("pass").passed
    except UserError:
        return False


pytestmark = pytest.mark.skipif(not isolates(), reason="this system has no Landlock")

SHORT = Limits(seconds=2, memory=512, file=4, folder=16)
ENOUGH = Limits(seconds=20, memory=512, file=4, folder=16)


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
        "from __future__ import annotations\nassert __name__ == '__main__'",
    ],
)
def test_harmless_programs_pass(source):
    assert run_isolated(source, ENOUGH) == sandbox.Outcome(True, "passed")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended by itself with code 0"),
        ("def f(:", "ended by itself"),
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


def test_filling_the_disk_with_small_files_is_stopped():
    source = "n = 0\nwhile True:\n  open(str(n), 'wb').write(bytes(1 << 20)); n += 1"
    began = time.monotonic()
    assert run_isolated(source, Limits(seconds=20, folder=16)).detail == "wrote more than 16 MiB"
    assert time.monotonic() - began < 10


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
    with pytest.raises(UserError, match="isolation only, which needs Linux"):
        run_isolated("pass")
