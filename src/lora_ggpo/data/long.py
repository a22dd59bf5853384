"""Tables from long files, which are read piece by piece: the same rows and errors as of short ones.

Lines of JSON are parsed as they are looked at, since each may have keys of its own; the columns of other files are put
where rows go that are more than memory holds.
"""

from __future__ import annotations

import gzip
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow

from lora_ggpo.data.decode import decode, is_json, parse_line
from lora_ggpo.data.parquet import read_parquet
from lora_ggpo.data.separated import check_fields, csv_rows, known_header
from lora_ggpo.data.spool import PIECE, spooled_table
from lora_ggpo.data.table import Table, is_id, refuse_repeated

LONG = 2**26
"""Bytes of a file above which it is read piece by piece, and of the longest field in it."""

GZIP = b"\x1f\x8b"

UNPACKED = 4
"""How many times its size a compressed file of text has at least, as a rule."""

Rows = Iterator[tuple[list[str], int]]
"""Fields of each record, and the line on which it begins."""


def is_long(path: Path) -> bool:
    """Whether a file is long; a compressed one is reckoned as what is in it."""
    size = path.stat().st_size
    return size > LONG or (size > LONG // UNPACKED and is_compressed(path))


def is_compressed(path: Path) -> bool:
    """Whether gzip has made a file, whatever its name."""
    with path.open("rb") as file:
        return file.read(len(GZIP)) == GZIP


def _open(path: Path, mode: str = "rb", **options: Any) -> IO[Any]:
    """Open a file to read what is in it; a compressed one is unpacked again each time, as it is read."""
    open_any: Callable[..., IO[Any]] = gzip.open if is_compressed(path) else open
    return open_any(path, mode, **options)


def read_parquet_file(path: Path, columns: Sequence[str] | None = None) -> Table | None:
    """The rows of a parquet file; None of one in a .gz, which cannot be mapped."""
    return None if is_compressed(path) else read_parquet(path, pyarrow.memory_map(str(path)))


# --- CSV and TSV ---------------------------------------------------------------------------------------------------


def read_csv(path: Path, columns: Sequence[str] | None = None) -> Table | None:
    """The rows of a CSV file."""
    return _from_rows(path, csv_rows(path, _lines(path), LONG), columns)


def read_tsv(path: Path, columns: Sequence[str] | None = None) -> Table | None:
    """The rows of a TSV file; None of one with quotes, whose meaning hangs on all lines."""
    with _open(path) as file:
        if any(b'"' in block for block in iter(lambda: file.read(2**20), b"")):
            return None
    lines = ((line.rstrip("\r\n"), number) for number, line in enumerate(_lines(path), start=1))
    return _from_rows(path, ((line.split("\t"), number) for line, number in lines if line), columns)


def _lines(path: Path) -> Iterator[str]:
    try:
        with _open(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                decode(path, line, number)  # raises at the line
        raise


def _from_rows(path: Path, rows: Rows, columns: Sequence[str] | None) -> Table | None:
    first = next(rows, None)
    if first is None or (not columns and known_header([first[0]])):
        return None
    header, lines = list(columns or first[0]), array("q")
    refuse_repeated(path, header, "; if the file has no header, name its columns with data.columns")
    rows = rows if first[0] == header else chain([first], rows)

    def pieces() -> Iterator[pyarrow.Table]:
        schema = pyarrow.schema([(name, pyarrow.string()) for name in header])
        yield schema.empty_table()
        while piece := list(islice(rows, PIECE)):
            for fields, line in piece:
                check_fields(path, fields, line, header, columns)
                lines.append(line)
            of_columns = zip(*(fields for fields, _ in piece), strict=True)
            yield pyarrow.Table.from_pydict(dict(zip(header, map(list, of_columns), strict=True)), schema)

    table = spooled_table(pieces())
    return Table(str(path), dict(zip(header, table.columns, strict=True)), "line", lines)


# --- lines of JSON -------------------------------------------------------------------------------------------------


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
        with _open(self.path) as file:
            for begin in range(0, len(self), PIECE):
                positions = self.positions[begin : begin + PIECE]
                file.seek(self.starts[begin])
                content = file.read(self.starts[begin + len(positions)] - self.starts[begin])
                lines = (line for line in content.split(b"\n") if line.strip())
                rows = [parse_line(self.path, *one) for one in zip(positions, lines, strict=True)]
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


def read_json_lines(path: Path, columns: Sequence[str] | None = None) -> LongTable | None:
    """The rows of a file of JSON lines; None of one that does not begin with a line of JSON."""
    with _open(path) as file:
        if not is_json(next((line for line in file if line.strip()), b"").decode("utf-8-sig", "replace")):
            return None
    starts, positions, names, place, named = array("q"), array("q"), dict[str, None](), 0, True
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = parse_line(path, number, line)
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
