"""Tables from local files. Whatever is in the file, the one exception is UserError."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow

from lora_ggpo.data import long
from lora_ggpo.data.decode import check_object, decode, is_json, read_json
from lora_ggpo.data.long import GZIP
from lora_ggpo.data.parquet import read_parquet
from lora_ggpo.data.separated import Records, csv_records, tsv_records, with_header
from lora_ggpo.data.table import Table, refuse_repeated
from lora_ggpo.errors import UserError

SPLIT_NAMES = {
    "train": "train",
    "test": "test",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    # MNLI has a second validation split, from other domains than the training rows; GLUE's own folders call it dev.
    **dict.fromkeys(("validation_matched", "dev_matched"), "validation"),
    "test_matched": "test",
    **dict.fromkeys(("validation_mismatched", "dev_mismatched"), "validation_mismatched"),
}
WRAPPERS = ("data", "rows", "examples", "records", "items", "instances")
"""Keys under which a JSON file may hold its rows."""


def read_file(path: Path, columns: Sequence[str] | None = None) -> Table:
    """Return the rows of a .jsonl, .json, .csv, .tsv (each also with .gz) or .parquet file.

    Args:
        columns: What the columns of a .csv or .tsv file without a header are called.
    """
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; check the path.")
    reader = _reader(path)
    if reader is None:
        raise UserError(f"{path} is of an unknown type; give a {', '.join(READERS)} file.")
    if columns is not None and reader not in (parse_csv, parse_tsv):
        raise UserError(f"data.columns is for CSV and TSV files without a header, but {path} is none; drop it.")
    table = _read_long(path, reader, columns)
    if table is None:
        table = _read_whole(path, reader, columns)
    if not len(table):
        raise UserError(f"{path} has no rows; give a file with data in it.")
    return table


def read_folder(folder: Path, columns: Sequence[str] | None = None) -> dict[str, Table]:
    """Return the tables of a folder's train, validation (also valid, val, dev) and test files, by split.

    MNLI's names, and the hub's for files in one part (train-00000-of-00001.parquet), are understood as well. `columns`
    are as `read_file` takes them.
    """
    paths: dict[str, Path] = {}
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}.") from None
    for path in entries:
        split = SPLIT_NAMES.get(path.name.partition(".")[0].lower().removesuffix("-00000-of-00001"))
        if split is None or _reader(path) is None:
            continue
        if split in paths:
            raise UserError(f"{folder} has two files for {split}, {paths[split].name} and {path.name}; keep one.")
        paths[split] = path
    if not paths:
        raise UserError(f"{folder} has no train, validation or test file; name them train.jsonl, test.csv and so on.")
    return {split: read_file(path, columns) for split, path in paths.items()}


def has_known_suffix(source: str) -> bool:
    """Tell whether a source is named like a data file."""
    return _reader(Path(source)) is not None


def parse_json(path: Path, content: bytes, *, lines: bool = False) -> Table:
    """Return one row for each object of a JSON list, of the list in `{"data": [...]}`, or of lines that are not blank.

    Args:
        lines: What the name of the file says that it holds; files that clearly hold the other are recognised.
    """
    text = decode(path, content)
    found = [(number, line) for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1) if line.strip()]
    if not found:
        return Table(str(path), {}, "line", [])
    first, whole = is_json(found[0][1]), is_json(text)
    if (first or not whole) if lines else (first and not whole and text.lstrip().startswith("{")):
        places = [f"{path}, line {number}" for number, _ in found]
        rows = [check_object(read_json(line, place), place) for (_, line), place in zip(found, places, strict=True)]
        return _from_rows(path, rows, "line", [number for number, _ in found])
    values = read_json(text, str(path))
    if isinstance(values, dict):
        inner = [values[name] for name in WRAPPERS if _are_objects(values.get(name))]
        values = inner[0] if len(inner) == 1 else [values]
    if not isinstance(values, list):
        raise UserError(f"{path} must hold a list of objects, but it holds a {type(values).__name__}.")
    rows = [check_object(value, f"{path}, row {number}") for number, value in enumerate(values, start=1)]
    return _from_rows(path, rows, "row", range(1, len(rows) + 1))


parse_jsonl = partial(parse_json, lines=True)


def parse_csv(path: Path, content: bytes, columns: Sequence[str] | None = None) -> Table:
    """Return one row for each record after the header; a record is placed by its first line."""
    return _from_records(path, csv_records(path, decode(path, content)), columns)


def parse_tsv(path: Path, content: bytes, columns: Sequence[str] | None = None) -> Table:
    """Return the rows of a tab-separated file, quoted as in CSV or, as GLUE's files are, not at all."""
    return _from_records(path, tsv_records(path, decode(path, content)), columns)


def parse_parquet(path: Path, content: bytes) -> Table:
    """Return the rows of a parquet file, with the class names if `datasets` wrote it."""
    return read_parquet(path, pyarrow.BufferReader(content))


Reader = Callable[..., Table]
"""Takes the path and the content of a file, and the columns of one that may have no header."""

READERS: dict[str, Reader] = {
    ".jsonl": parse_jsonl,
    ".json": parse_json,
    ".csv": parse_csv,
    ".tsv": parse_tsv,
    ".parquet": parse_parquet,
}

LONG_READERS: dict[Reader, Callable[[Path, Sequence[str] | None], Table | None]] = {
    parse_jsonl: long.read_json_lines,
    parse_csv: long.read_csv,
    parse_tsv: long.read_tsv,
    parse_parquet: long.read_parquet_file,
}
"""What reads files piece by piece; None is given for one that must be read whole."""


def _reader(path: Path) -> Reader | None:
    name = path.name.lower().removesuffix(".gz")
    return next((reader for suffix, reader in READERS.items() if name.endswith(suffix)), None)


def _read_whole(path: Path, reader: Reader, columns: Sequence[str] | None) -> Table:
    given: dict[str, Any] = {"columns": columns} if columns else {}
    return reader(path, _content(path), **given)


def _read_long(path: Path, reader: Reader, columns: Sequence[str] | None) -> Table | None:
    """The rows of a long file, piece by piece; None of one that must be read whole."""
    read = LONG_READERS.get(reader)
    try:
        return read(path, columns) if read and long.is_long(path) else None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, error) from None


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from None
    if path.suffix.lower() != ".gz" and not content.startswith(GZIP):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is truncated or no gzip file ({error}); fetch or compress it again.")


def _are_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _from_rows(path: Path, rows: list[dict[str, Any]], unit: str, positions: Iterable[int]) -> Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(str(path), {name: [row.get(name) for row in rows] for name in names}, unit, list(positions))


def _from_records(path: Path, records: Records, columns: Sequence[str] | None) -> Table:
    if not records.fields:
        return Table(str(path), {}, "line", [])
    header, rows = with_header(path, records, columns)
    refuse_repeated(path, header, "; if the file has no header, name its columns with data.columns")
    values = {name: [fields[index] for fields in rows.fields] for index, name in enumerate(header)}
    return Table(str(path), values, "line", rows.lines)
