import errno
import os
import subprocess
import sys

import pytest

from lora_ggpo.errors import UserError
from lora_ggpo.workspace.files import (
    disk_errors,
    mend_json_lines,
    new_folder,
    read_json,
    read_json_lines,
    write_text,
)
from lora_ggpo.workspace.folder import lock


def test_a_failed_write_leaves_the_old_content(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "f") as folder:
        (folder / "absent" / "x").write_text("x")
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "f" / "x").read_text() == "x"


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b'{"a": 1}\n{"a": 2}\n{"a"', [1, 2]),  # cut by a crash
        (b'{"a": 1}\n\0\0\0\0', [1]),  # as a power cut may leave it
        (b'{"a": 1}\n{"a": 2}', [1, 2]),
        (b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}\r\n', [1, 2]),
        (b'\n\xef\xbb\xbf\n{"a": 1}\n', [1]),
        (b"", []),
    ],
)
def test_lines_of_json_are_read_whole(tmp_path, content, rows):
    (tmp_path / "log").write_bytes(content)
    assert [row["a"] for row in read_json_lines(tmp_path / "log")] == rows
    mend_json_lines(tmp_path / "log")
    with (tmp_path / "log").open("ab") as file:
        file.write(b'{"a": 9}\n')
    assert [row["a"] for row in read_json_lines(tmp_path / "log")] == [*rows, 9]
    assert read_json_lines(tmp_path / "absent") == []


@pytest.mark.parametrize("damaged", [b'{"a"', b"7", b"\xff", b'{"a": "\xff"}', b"[" * 100_000])
def test_a_damaged_line_is_named(tmp_path, damaged):
    (tmp_path / "log").write_bytes(b'{"a": 1}\n\n' + damaged + b'\n{"a": 3}\n')
    with pytest.raises(UserError, match=r"log, line 3 is damaged: it holds no JSON object; mend that line or delete"):
        read_json_lines(tmp_path / "log")


def test_damaged_json(tmp_path):
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(UserError, match=r"m.json is damaged"):
        read_json(tmp_path / "m.json")


def test_another_process_is_kept_out(tmp_path):
    code = (
        "from pathlib import Path\nfrom lora_ggpo.workspace.folder import lock\n"
        f"with lock(Path({str(tmp_path)!r})): pass"
    )
    with lock(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "is in use by another process" in other.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/3"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path, error):
    with pytest.raises(UserError, match="is full; free some space"), disk_errors(tmp_path):
        raise error


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EROFS, r"a\.txt cannot be read or written: Read-only file system"),
        (errno.ENAMETOOLONG, r"a\.txt cannot be read or written: File name too long"),
        (errno.EACCES, r"a\.txt cannot be read or written: Permission denied"),
        (errno.EIO, r"a\.txt cannot be read or written: Input/output error"),
        (errno.ENOENT, r"absent cannot be made: No such file or directory; choose another output"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, number, message):
    with pytest.raises(UserError, match=message), disk_errors(tmp_path / "absent"):
        raise OSError(number, os.strerror(number), str(tmp_path / "a.txt"))


def test_other_errors_pass(tmp_path):
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(ZeroDivisionError), disk_errors(tmp_path):
        raise ZeroDivisionError
