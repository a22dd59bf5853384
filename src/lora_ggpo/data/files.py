"""Tables from local files. Whatever is in the file, the one exception is UserError."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lora_ggpo.data.separated import Records, csv_records, tsv_records, with_header
from lora_ggpo.data.spool import PIECE
from lora_ggpo.data.table import Table, is_id
from lora_ggpo.errors import UserError, first_line

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

LONG = 2**26
"""Bytes of a file of JSON lines above which it is read piece by piece."""

GZIP = b"\x1f\x8b"
BINARY = {b"PAR1": "a parquet file", b"PK\x03\x04": "a zip archive", b"BZh": "a bzip2 file", b"\xfd7zXZ": "an xz file"}
BINARY |= {b"\x28\xb5\x2f\xfd": "a zstandard file", b"ARROW1": "an Arrow file"}
"""What a file that is no text begins with."""


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
    if columns is not None:
        if reader not in (parse_csv, parse_tsv):
            raise UserError(f"data.columns is for CSV and TSV files without a header, but {path} is none; drop it.")
        reader = partial(reader, columns=columns)
    table = _long_table(path) if reader is parse_jsonl and _is_long(path) else reader(path, _content(path))
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
    text = _decoded(path, content)
    found = [(number, line) for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1) if line.strip()]
    if not found:
        return Table(str(path), {}, "line", [])
    first, whole = _is_json(found[0][1]), _is_json(text)
    if (first or not whole) if lines else (first and not whole and text.lstrip().startswith("{")):
        places = [f"{path}, line {number}" for number, _ in found]
        rows = [_object(_json(line, place), place) for (_, line), place in zip(found, places, strict=True)]
        return _from_rows(path, rows, "line", [number for number, _ in found])
    values = _json(text, str(path))
    if isinstance(values, dict):
        inner = [values[name] for name in WRAPPERS if _are_objects(values.get(name))]
        values = inner[0] if len(inner) == 1 else [values]
    if not isinstance(values, list):
        raise UserError(f"{path} must hold a list of objects, but it holds a {type(values).__name__}.")
    rows = [_object(value, f"{path}, row {number}") for number, value in enumerate(values, start=1)]
    return _from_rows(path, rows, "row", range(1, len(rows) + 1))


parse_jsonl = partial(parse_json, lines=True)


def parse_csv(path: Path, content: bytes, columns: Sequence[str] | None = None) -> Table:
    """Return one row for each record after the header; a record is placed by its first line."""
    return _from_records(path, csv_records(path, _decoded(path, content)), columns)


def parse_tsv(path: Path, content: bytes, columns: Sequence[str] | None = None) -> Table:
    """Return the rows of a tab-separated file, quoted as in CSV or, as GLUE's files are, not at all."""
    return _from_records(path, tsv_records(path, _decoded(path, content)), columns)


def parse_parquet(path: Path, content: bytes) -> Table:
    """Return the rows of a parquet file, with the class names if `datasets` wrote it."""
    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)).read()
        table.validate(full=True)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable parquet file ({first_line(error)}); write it again.") from None
    _refuse_repeated(path, table.column_names)
    return Table.of_arrow(table, str(path))


# --- long files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LongTable(Table):
    """The rows of a long file of JSON lines, which are parsed as they are looked at.

    Attributes:
        path: The file.
        starts: Where each row begins in it, and its end.
    """

    path: Path = Path()
    starts: Sequence[int] = ()

    def pieces(self) -> Iterator[Table]:
        with self.path.open("rb") as file:
            for begin in range(0, len(self), PIECE):
                positions = self.positions[begin : begin + PIECE]
                file.seek(self.starts[begin])
                content = file.read(self.starts[begin + len(positions)] - self.starts[begin])
                lines = (line for line in content.split(b"\n") if line.strip())
                rows = [_parsed(self.path, *one) for one in zip(positions, lines, strict=True)]
                columns = {name: [row.get(name) for row in rows] for name in self.columns}
                yield Table(self.origin, columns, self.unit, positions)


class _Columns(Mapping[str, list[Any]]):
    """Columns that are read from their file when they are asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], list[Any]]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> list[Any]:
        self._names[name]
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _is_long(path: Path) -> bool:
    """Whether a file is long and begins with a line of JSON."""
    if path.stat().st_size <= LONG:
        return False
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    return not first.startswith(GZIP) and _is_json(first.decode("utf-8-sig", "replace"))


def _long_table(path: Path) -> LongTable:
    starts, positions, names, place, named = array("q"), array("q"), dict[str, None](), 0, True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = _parsed(path, number, line)
                names.update(dict.fromkeys(row))
                named = named and is_id(row.get("id"))
                starts.append(place)
                positions.append(number)
            place += len(line)
    starts.append(place)
    if not named:  # ids are for all rows or none
        names.pop("id", None)
    table = LongTable(str(path), {}, "line", positions, path=path, starts=starts)

    def read(name: str) -> list[Any]:
        return [value for piece in replace(table, columns={name: []}).pieces() for value in piece.columns[name]]

    return replace(table, columns=_Columns(names, read))


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    place = f"{path}, line {number}"
    return _object(_json(_decoded(path, line, number), place), place)


READERS: dict[str, Callable[[Path, bytes], Table]] = {
    ".jsonl": parse_jsonl,
    ".json": parse_json,
    ".csv": parse_csv,
    ".tsv": parse_tsv,
    ".parquet": parse_parquet,
}


def _reader(path: Path) -> Callable[[Path, bytes], Table] | None:
    name = path.name.lower().removesuffix(".gz")
    return next((reader for suffix, reader in READERS.items() if name.endswith(suffix)), None)


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
        raise UserError(f"{path} is truncated or no gzip file ({error}); fetch or compress it again.") from None


def _decoded(path: Path, content: bytes, first: int = 1) -> str:
    """Bytes as text; `first` is the number of their first line."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = next((kind for magic, kind in BINARY.items() if content.startswith(magic)), None)
        if kind:
            raise UserError(f"{path} is {kind}, not what its name says; unpack it, or rename it.") from None
        line = content.count(b"\n", 0, error.start) + first
        raise UserError(f"{path}, line {line}: the text is not UTF-8; save the file as UTF-8.") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise UserError(f"{where}: malformed JSON ({error.msg} at {place}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: JSON that cannot be read ({error}).") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _are_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f'{where}: a JSON object like {{"text": ..., "label": ...}} must be here.')
    return value


def _from_rows(path: Path, rows: list[dict[str, Any]], unit: str, positions: Iterable[int]) -> Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(str(path), {name: [row.get(name) for row in rows] for name in names}, unit, list(positions))


def _from_records(path: Path, records: Records, columns: Sequence[str] | None) -> Table:
    if not records.fields:
        return Table(str(path), {}, "line", [])
    header, rows = with_header(path, records, columns)
    _refuse_repeated(path, header, "; if the file has no header, name its columns with data.columns")
    values = {name: [fields[index] for fields in rows.fields] for index, name in enumerate(header)}
    return Table(str(path), values, "line", rows.lines)


def _refuse_repeated(path: Path, names: list[str], hint: str = "") -> None:
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise UserError(f"{path} has more than one column named {min(repeated)!r}; rename one{hint}.")
