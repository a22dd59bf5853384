"""Records of comma- and tab-separated text, and what their columns are called."""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_ggpo.errors import UserError, count

_LINE_END = re.compile(r"\r\n|\n|\r")
_TAB_FIELD = re.compile(r'(?:"([^"]*(?:""[^"]*)*)"|(?!")([^\t\r\n]*))(\t|\r\n|\n|\r|\Z)')
_CONVENTIONS = (re.compile(r'[\t"\r\n]'), re.compile(r'[\t",\r\n]'))
"""What a field must hold to be quoted: csv's and pandas' rule, and Excel's."""


_FEW_VALUES, _MOST_PLACES = 50, 1000


class Records(NamedTuple):
    """Fields of each record, and the line on which it begins, counted from 1."""

    fields: list[list[str]]
    lines: list[int]


class _Field(NamedTuple):
    text: str
    quoted: bool
    line: int


# --- records -------------------------------------------------------------------------------------------------------


def csv_records(path: Path, text: str) -> Records:
    """Records of comma-separated text, quoted as RFC 4180 has it."""
    rows = list(csv_rows(path, io.StringIO(text, newline=""), len(text)))
    return Records([fields for fields, _ in rows], [line for _, line in rows])


def csv_rows(path: Path, lines: Iterable[str], longest: int) -> Iterator[tuple[list[str], int]]:
    """As `csv_records`, of lines with their ends: the fields of each record, and the line on which it begins.

    Args:
        longest: Characters that a field may have.
    """
    # csv refuses fields of more than 131,072 characters, for the whole process: a document may be as long as its file.
    csv.field_size_limit(max(csv.field_size_limit(), longest))
    read: list[str] = []  # the lines of the record
    reader, previous, enclosed = csv.reader(_noted(lines, read), strict=True), 0, _Enclosed(path)
    try:
        for record in reader:
            if record:
                enclosed.look(record, read, previous + 1)
                yield record, previous + 1
            previous = reader.line_num
            read.clear()
    except csv.Error as error:
        raise UserError(f"{path}, line {previous + 1}: malformed CSV ({error}); check the quotes.") from None
    enclosed.report()


def _noted(lines: Iterable[str], read: list[str]) -> Iterator[str]:
    """The `lines`, each of which is put in `read` as it is read."""
    for line in lines:
        read.append(line)
        yield line


class _Enclosed:
    """Finds records of several lines that look like a row each: a stray pair of quotes may have made one of them.

    A line looks like a row if it has as many fields, and in each column that has few values one of them. Where no
    column has, only a record of three lines and more is told from a text that happens to hold commas.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._rows = path, 0
        self._kinds: dict[int, set[str]] | None = None  # the values of each column, if they are few
        self._found: list[tuple[int, list[list[str]]]] = []

    def look(self, record: list[str], lines: list[str], first: int) -> None:
        """Look at a record; `first` is the number of its first line."""
        if self._kinds is None:  # the header
            self._kinds = {column: set() for column in range(len(record))}
        elif len(lines) == 1:
            self._rows += 1
            for column in [column for column in self._kinds if column < len(record)]:
                self._kinds[column].add(record[column])
                if len(self._kinds[column]) > _FEW_VALUES:
                    del self._kinds[column]
        elif len(self._found) < _MOST_PLACES and all(line.count(",") == len(record) - 1 > 0 for line in lines):
            self._found.append((first, [[part.strip('"\r\n') for part in line.split(",")] for line in lines]))

    def report(self) -> None:
        """Name the first such record in one warning, with the number of all."""
        kinds = {column: of for column, of in (self._kinds or {}).items() if 2 * len(of) <= self._rows}
        found = [
            range(first, first + len(lines))
            for first, lines in self._found
            if (kinds or len(lines) > 2) and all(line[column] in of for column, of in kinds.items() for line in lines)
        ]
        if found:
            others = f" So do {count(len(found) - 1, 'other record')}." if len(found) > 1 else ""
            warnings.warn(
                f"{self._path}, line {found[0][0]}: a quote opens here and closes on line {found[0][-1]}, and what it "
                f"encloses is read as one row, though each of these lines looks like one; if they are, double the "
                f"quotes that belong to the text.{others}",
                stacklevel=2,
            )


def tsv_records(path: Path, text: str) -> Records:
    """Records of tab-separated text, whose quotes enclose fields in some files and are part of the text in others.

    Quotes enclose fields if every record then has as many fields as the first, and they stand where a writer of such
    files puts them: around every field of a column, or around those fields alone that hold a quote (which is doubled),
    a tab or a line break (Excel: or a comma). Where lines are records without them, a quote that would enclose some of
    these lines whole is part of the text; a warning names its line.
    """
    plain = _plain(text)
    if '"' not in text or known_header(plain.fields):
        return plain
    quoted = _quoted(text)
    if not quoted or _ragged(quoted) is not None:
        return plain  # what is wrong with its records, if anything, is said when they meet their header
    enclosed = Records([[field.text for field in record] for record in quoted], [record[0].line for record in quoted])
    if _surely_quoted(quoted):
        return enclosed
    ragged, rows = _ragged(plain.fields), _enclosed_rows(quoted, text)
    if ragged is None and rows:
        warnings.warn(
            f"{path}, line {rows[0]}: the quote is read as part of the text, since each line to {rows[-1]} is a row "
            "like the others; if it encloses them, save the file with every field in quotes.",
            stacklevel=2,
        )
        return plain
    if ragged is None:
        return enclosed if any(_as_written(quoted, needing) for needing in _CONVENTIONS) else plain
    if len(rows) > 2:
        there, first = (count(len(plain.fields[place]), "field") for place in (ragged, 0))
        raise UserError(
            f"{path}, line {rows[0]}: a quote opens here and closes on line {rows[-1]}, with what looks like rows in "
            f"between, but without quotes line {plain.lines[ragged]} has {there} and the first {first}; correct that "
            "line, or save the file with every field in quotes."
        )
    return enclosed


def _plain(text: str) -> Records:
    """A record for each line that is not blank; quotes are characters like any other."""
    lines = [(number, line) for number, line in enumerate(_LINE_END.split(text), start=1) if line]
    return Records([line.split("\t") for _, line in lines], [number for number, _ in lines])


def _quoted(text: str) -> list[list[_Field]] | None:
    """Records in which quotes enclose fields; None where one is not closed, or closed within a field."""
    records: list[list[_Field]] = []
    record: list[_Field] = []
    position, line = 0, 1
    while position < len(text) or record:
        match = _TAB_FIELD.match(text, position)
        if match is None:
            return None
        enclosed, bare, end = match.groups()
        if enclosed is None:
            record.append(_Field(bare, False, line))
        else:
            record.append(_Field(enclosed.replace('""', '"'), True, line))
            line += len(_LINE_END.findall(enclosed))
        position = match.end()
        if end != "\t":
            line += 1
            if len(record) > 1 or record[0].text or record[0].quoted:
                records.append(record)
            record = []
    return records


def _ragged(records: Sequence[Sequence[object]]) -> int | None:
    """The first record of another number of fields than the first has."""
    return next((index for index, record in enumerate(records) if len(record) != len(records[0])), None)


def _surely_quoted(records: list[list[_Field]]) -> bool:
    """Whether a column is quoted throughout, or a quoted field holds a quote, which in the file is doubled."""
    rows = records[1:]
    throughout = rows and any(all(row[column].quoted for row in rows) for column in range(len(records[0])))
    return bool(throughout) or any(field.quoted and '"' in field.text for record in records for field in record)


def _as_written(records: list[list[_Field]], needing: re.Pattern[str]) -> bool:
    fields = [field for record in records for field in record if field.text]  # an empty one is quoted at pleasure
    return all(field.quoted == bool(needing.search(field.text)) for field in fields)


def _enclosed_rows(records: list[list[_Field]], text: str) -> range:
    """The lines of the first quoted field that encloses tabs of a line with as many tabs as a row has.

    Lines that a field only begins or ends on count where all lines do; a longer range has whole ones in between.
    """
    lines = _LINE_END.split(text)
    for record in records:
        for field in record:
            parts = _LINE_END.split(field.text) if field.quoted else [""]
            touched = range(field.line, field.line + len(parts))
            like = [lines[n - 1].count("\t") == len(record) - 1 for n in touched]
            if len(parts) > 1 and "\t" in field.text and (all(like) or any(like[1:-1])):
                return touched
    return range(0)


# --- names of columns ----------------------------------------------------------------------------------------------

# Files that are distributed without a header: the names of their columns, and what tells their records.
_HEADERLESS: dict[tuple[str, ...], Callable[[list[str]], bool]] = {
    ("source", "label", "mark", "sentence"): lambda fields: (  # CoLA
        len(fields) == 4 and fields[1] in ("0", "1") and not fields[2].strip("*?# ")
    ),
    ("genre", "filename", "year", "old_index", "score", "sentence1", "sentence2"): lambda fields: (  # STS benchmark
        len(fields) >= 7 and fields[0].startswith("main-") and bool(re.fullmatch(r"[0-5](\.\d+)?", fields[4]))
    ),
}


def with_header(path: Path, records: Records, columns: Sequence[str] | None) -> tuple[list[str], Records]:
    """The names of the columns, and the records that are rows.

    Args:
        columns: Names for a file without a header; None takes the first record, or for a file in the form of CoLA or
            the STS benchmark, which have no header, names in the manner of GLUE's other files.
    """
    known = None if columns else known_header(records.fields)
    header = list(columns or known or records.fields[0])
    if known:  # some rows of the STS benchmark end in the addresses of their sources
        records = Records([fields[: len(known)] for fields in records.fields], records.lines)
    for fields, line in zip(*records, strict=True):
        check_fields(path, fields, line, header, columns)
    own = records.fields[0] == header
    return header, Records(records.fields[own:], records.lines[own:])


def check_fields(
    path: Path, fields: list[str], line: int, header: Sequence[str], columns: Sequence[str] | None
) -> None:
    """Raise a UserError if a record has another number of fields than the header, or than `columns` names."""
    if len(fields) != len(header):
        there = f"data.columns names {len(header)}" if columns else f"the header has {len(header)}"
        raise UserError(f"{path}, line {line}: {count(len(fields), 'field')}, but {there}.")


def known_header(records: list[list[str]]) -> tuple[str, ...] | None:
    """The names of the columns of a file that is distributed without a header; None for any other."""
    return next((names for names, fits in _HEADERLESS.items() if records and all(map(fits, records))), None)
