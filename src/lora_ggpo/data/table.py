"""Rows of data that know where they came from."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import datasets
import pyarrow
from pydantic import TypeAdapter, ValidationError

from lora_ggpo.data.spool import PIECE
from lora_ggpo.errors import UserError

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Table:
    """Columns of equal length.

    Attributes:
        origin: File or hub split, as error messages name it.
        columns: Column name -> values, one for each row.
        unit: What `positions` counts: "line" or "row".
        positions: Where each row is in its origin, counted from 1.
        label_names: Column name -> class names, for integer columns that come with names.
    """

    origin: str
    columns: Mapping[str, Sequence[Any] | pyarrow.ChunkedArray]
    unit: str
    positions: Sequence[int]
    label_names: Mapping[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of_arrow(cls, table: pyarrow.Table, origin: str) -> Self:
        """Return a view of an Arrow table, with the class names that `datasets` keeps in its schema."""
        names = {}
        for one in table.schema:
            # The schema may be of another version of datasets, or hold types that it does not know.
            with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, NotImplementedError):
                schema = pyarrow.schema([one], table.schema.metadata)
                feature = datasets.Features.from_arrow_schema(schema)[one.name]
                if isinstance(feature, datasets.ClassLabel):
                    names[one.name] = feature.names
        columns = dict(zip(table.column_names, table.columns, strict=True))
        return cls(origin, columns, "row", range(1, table.num_rows + 1), names)

    def __len__(self) -> int:
        return len(self.positions)

    def pieces(self) -> Iterator[Table]:
        """The table in parts that can be held, one behind the other; columns of Arrow may be more than memory holds."""
        if not any(isinstance(column, pyarrow.ChunkedArray) for column in self.columns.values()):
            yield self
            return
        whole = self if self._named else self.without(["id"])  # ids are for all rows or none
        for begin in range(0, max(len(self), 1), PIECE):
            yield whole._part(slice(begin, begin + PIECE))

    def _part(self, rows: slice) -> Table:
        columns = {name: column[rows] for name, column in self.columns.items()}
        return dataclasses.replace(self, columns=columns, positions=self.positions[rows])

    @property
    def _named(self) -> bool:
        """Whether each row has an id."""
        column = self.columns.get("id", ())
        parts = (self._part(slice(begin, begin + PIECE)) for begin in range(0, len(column), PIECE))
        return all(is_id(value) for part in parts for value in part.values("id"))

    def where(self, row: int) -> str:
        """Return the place of a row, as in "reviews.csv, line 3"."""
        return f"{self.origin}, {self.unit} {self.positions[row]}"

    def parse(self, kind: TypeAdapter[Kind], hint: str) -> list[Kind]:
        """Return each row as what `kind` makes of it; `hint` says what the file should be."""
        parsed = []
        for index, row in enumerate(zip(*map(self.values, self.columns), strict=True)):
            try:
                parsed.append(kind.validate_python(dict(zip(self.columns, row, strict=True))))
            except ValidationError as error:
                first = error.errors()[0]
                place = f"{self.where(index)}: {'.'.join(map(str, first['loc']))}"
                raise UserError(f"{place}: {first['msg'].removeprefix('Value error, ')}; {hint}.") from error
        return parsed

    def column(self, name: str, setting: str) -> list[Any]:
        """Return a column's values."""
        if name not in self.columns:
            near = difflib.get_close_matches(name, self.columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            like_a_row = any(re.fullmatch(r"[\d.]*", name) or len(name.split()) > 4 for name in self.columns)
            header = " If the file has no header, name its columns with data.columns." if like_a_row else ""
            raise UserError(
                f"{self.origin} has no column {name!r}, its columns are {', '.join(self.columns)}{hint} "
                f"Name the column with data.{setting}.{header}"
            )
        return self.values(name)

    def values(self, name: str) -> list[Any]:
        """Return the values of a column that is there."""
        column = self.columns[name]
        if not isinstance(column, pyarrow.ChunkedArray):
            return list(column)
        try:
            return [_as_written(value) for value in column.to_pylist()]
        except (pyarrow.ArrowException, OverflowError, ValueError, ImportError) as error:  # some dates need a library
            raise UserError(f"{self.origin}: the values of column {name!r} cannot be read ({error}).") from error

    def without(self, names: Sequence[str]) -> Table:
        """Return the table without some of its columns."""
        kept = {name: values for name, values in self.columns.items() if name not in names}
        return dataclasses.replace(self, columns=kept)

    def texts(self, name: str, setting: str) -> list[str]:
        """Return a column of text."""
        return [self.require_text(value, name, row) for row, value in enumerate(self.column(name, setting))]

    def require_text(self, value: object, name: str, row: int) -> str:
        """Return a value of column `name` if it is text that is not blank, or else raise a UserError naming the row."""
        if value is None or value != value:
            problem = "has no value; fill it in or remove the row"
        elif not isinstance(value, str):
            problem = f"must hold text, but here it holds {type(value).__name__} {reprlib.repr(value)}"
        elif not value.strip():
            problem = "is empty; fill it in or remove the row"
        elif not _encodable(value):
            problem = "holds half of a surrogate pair, which is no character"
        else:
            return value
        raise UserError(f"{self.where(row)}: column {name!r} {problem}.")

    def ids(self) -> list[str]:
        """Return the "id" column as text if every row has one, else "origin:position"."""
        given = self.values("id") if "id" in self.columns else [None] * len(self)
        if all(map(is_id, given)):
            return [str(value) for value in given]
        name = self.origin.replace("\\", "/").rpartition("/")[2]
        return [f"{name}:{position}" for position in self.positions]


def refuse_repeated(path: Path, names: Sequence[str], hint: str = "") -> None:
    """Raise a UserError if two columns of a file have one name."""
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise UserError(f"{path} has more than one column named {min(repeated)!r}; rename one{hint}.")


def is_id(value: object) -> bool:
    """Whether `value` can name a row."""
    return isinstance(value, int | str) and _encodable(str(value))


def _as_written(value: Any) -> Any:
    """`value` without the nulls that Arrow puts where an object of a column lacks a key that others have."""
    if isinstance(value, list):
        return [_as_written(one) for one in value]
    if isinstance(value, dict):
        return {key: _as_written(one) for key, one in value.items() if one is not None}
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
