"""Bytes of files as text and as JSON. Whatever they are, the one exception is UserError, which names the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_ggpo.errors import UserError

BINARY = {b"PAR1": "a parquet file", b"PK\x03\x04": "a zip archive", b"BZh": "a bzip2 file", b"\xfd7zXZ": "an xz file"}
BINARY |= {b"\x28\xb5\x2f\xfd": "a zstandard file", b"ARROW1": "an Arrow file"}
"""What a file that is no text begins with."""


def decode(path: Path, content: bytes, first: int = 1) -> str:
    """Bytes as text; `first` is the number of their first line."""
    try:
        return content.decode().removeprefix("\ufeff")  # a quarter of the time of "utf-8-sig"
    except UnicodeDecodeError as error:
        kind = next((kind for magic, kind in BINARY.items() if content.startswith(magic)), None)
        if kind:
            raise UserError(f"{path} is {kind}, not what its name says; unpack it, or rename it.") from None
        line = content.count(b"\n", 0, error.start) + first
        raise UserError(f"{path}, line {line}: the text is not UTF-8; save the file as UTF-8.") from None


def read_json(text: str, where: str) -> Any:
    """The value of JSON; `where` it stands, errors say."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise UserError(f"{where}: malformed JSON ({error.msg} at {place}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: JSON that cannot be read ({error}).") from None


def is_json(text: str) -> bool:
    """Whether `text` is JSON."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def check_object(value: object, where: str) -> dict[str, Any]:
    """Return a value of JSON if it is an object, or else raise a UserError."""
    if not isinstance(value, dict):
        raise UserError(f'{where}: a JSON object like {{"text": ..., "label": ...}} must be here.')
    return value


def parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """The object in a line of JSON."""
    place = f"{path}, line {number}"
    return check_object(read_json(decode(path, line, number), place), place)
