"""Files that are written whole or not at all, and what a file system refuses, in one sentence."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_ggpo.errors import UserError, causes

_LONGEST_NAME = 100

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ELOOP, errno.ENAMETOOLONG),
)
# What safetensors and torch.save say instead of raising an OSError with its number.
_NO_SPACE_WORDS = (
    *("No space left on device", "os error 28", "Disk quota exceeded"),
    *("PytorchStreamWriter failed", "basic_ios::clear: iostream error"),
)


def file_name(name: str) -> str:
    """`name`, which may be a path or a hub id, as the name of a file."""
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "set"
    short = f"{plain[-_LONGEST_NAME:]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return plain if len(plain) <= _LONGEST_NAME else short


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, which holds either its old content or all of the new one at any time."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, as `write_text` does."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, as `write_text` does."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not JSON.") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line; a missing file is empty.

    Byte order marks and blank lines are passed over, and so is a last line that a crash has cut short.

    Raises:
        UserError: another line holds something else; it is named by its number.
    """
    return [row for _, row in numbered_json_lines(path)]


def numbered_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """`read_json_lines`, with the number of each line, from 1 on."""
    rows: list[tuple[int, dict[str, Any]]] = []
    lines = (path.read_bytes() if path.is_file() else b"").split(b"\n")  # strings may hold Unicode's other line breaks
    for number, line in enumerate(lines, 1):
        row = _object(line)
        if row is not None:
            rows.append((number, row))
        elif number < len(lines) and line.removeprefix(codecs.BOM_UTF8).strip():
            raise UserError(f"{path}, line {number} is damaged: it holds no JSON object; mend that line or delete it.")
    return rows


def mend_json_lines(path: Path) -> None:
    """Make the file ready for its next line: drop a last line that a crash cut short, or end one that has no end."""
    with path.open("r+b") as file:
        last = file.read().rpartition(b"\n")[2]
        if last and _object(last) is None:
            file.truncate(file.tell() - len(last))
        elif last:
            file.write(b"\n")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def flush_to_disk(path: Path) -> None:
    """Wait until what was written to `path` is on the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def settle(folder: Path) -> None:
    """Wait until all files in `folder` are on the disk, and give them the permissions that any new file there gets.

    safetensors makes its files for their owner alone, whatever the umask says.
    """
    mode = new_file_mode(folder)
    for file in folder.rglob("*"):
        if file.is_file():
            if file.stat().st_mode & 0o666 != mode:
                with suppress(OSError):  # some file systems know no permissions
                    file.chmod(mode)
            flush_to_disk(file)


def new_file_mode(folder: Path) -> int:
    """Permissions of a new file in `folder`: what the umask, or the default of the place, left of the folder's own."""
    return folder.stat().st_mode & 0o666


def digests(paths: Iterable[Path], folder: Path) -> dict[str, str]:
    """The sha256 of each of `paths`, by its place in `folder`."""
    found = {}
    for path in paths:
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def json_digest(value: Any) -> str:
    """Sixteen hexadecimal digits that tell values which JSON holds apart."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `path` in one move when all went well."""
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        settle(temporary)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses in work on `folder`, such as a full disk, into one sentence."""
    try:
        yield
    except Exception as error:
        refused = refusal(error, folder)
        if refused:
            raise UserError(refused) from error
        if isinstance(error, FileNotFoundError) and not os.path.exists(folder):  # as in /proc
            raise UserError(f"{folder} cannot be made: {error.strerror}; choose another output.") from error
        if isinstance(error, (NotADirectoryError, FileExistsError)):
            raise UserError(f"{error.filename or folder} is not a folder; choose another output.") from error
        raise


def refusal(error: BaseException, place: Path | None = None) -> str | None:
    """What the file system refuses, in one sentence; None if `error` is of another kind.

    Args:
        place: What was worked on, if the error does not say.
    """
    if is_disk_full(error):
        return f"The disk{f' of {place}' if place else ''} is full; free some space and give the same command again."
    if not isinstance(error, OSError) or error.errno not in _REFUSED:
        return None
    return f"{error.filename or place or 'A file'} cannot be read or written: {error.strerror}."


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or what caused it, says that the disk is full."""
    return any(
        (isinstance(cause, OSError) and cause.errno in _NO_SPACE)
        or any(words in str(cause) for words in _NO_SPACE_WORDS)
        for cause in causes(error)
    )
