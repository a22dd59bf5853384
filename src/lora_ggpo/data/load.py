"""From a DataConfig to the splits that training and evaluation use.

There is one way for all tasks; they differ in the `Reader` of their columns.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow
from numpy.typing import NDArray

from lora_ggpo.data.bundled import BUNDLED
from lora_ggpo.data.config import DataConfig
from lora_ggpo.data.sampling import Indices, carve, stratified_order
from lora_ggpo.data.sources import ALL, FURTHER_TESTS, read_tables
from lora_ggpo.data.spool import PIECE, spooled, taken
from lora_ggpo.data.table import Table
from lora_ggpo.errors import UserError

Columns = dict[str, list[Any]]
Tables = Mapping[str, Table]
STRING = datasets.Value("string")
_as_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode
_WITHHELD = {"-1", "-1.0", "None", "nan", ""}


@dataclass(frozen=True)
class Splits:
    """Data ready for a task; every split has a column "id".

    Attributes:
        train, validation, test: Rows in the order of the source.
        labels: The classes' names, which "label" indexes; None where there are no classes.
        out_of_domain: Extra test sets, by the name of their source, or by split if they come with the training data.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    labels: list[str] | None = None
    out_of_domain: dict[str, datasets.Dataset] = field(default_factory=dict)


class Reader(ABC):
    """Reads the columns that a task learns from.

    Attributes:
        features: Arrow types of these columns.
        labels: The classes' names, once the training table has been read; None where there are none.
    """

    features: ClassVar[Mapping[str, Any]]
    labels: list[str] | None = None

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    @classmethod
    def load(cls, config: DataConfig) -> Splits:
        """Load the data.

        Missing validation and test splits are taken from train, stratified by class; rows with the same text stay
        together. Then train is cut to `train_size`, and its labels are corrupted.
        """
        reader, tables = cls(config), _main_tables(config)
        _check_ignored(config, tables)
        origin = next(iter(tables.values())).origin
        read = reader.read_all(reader.learn(tables))
        further = {split: read.pop(split) for split in FURTHER_TESTS if split in read}
        parts = reader._three_splits(read)
        train = reader.corrupt(reader._cut(parts["train"], origin))
        for source, name in config.set_names.items():
            further[name] = reader.read_other(read_tables(source, None, config.columns))
        return Splits(train, parts["validation"], parts["test"], reader.labels, further)

    @abstractmethod
    def learn(self, tables: Tables) -> Tables:
        """Look at the table to train on, which comes first; return the tables that can be used."""

    @abstractmethod
    def read(self, table: Table) -> Columns:
        """The columns of a table."""

    @abstractmethod
    def read_other(self, tables: Tables) -> datasets.Dataset:
        """The rows of the test set of another source."""

    def read_all(self, tables: Tables) -> dict[str, datasets.Dataset]:
        """The rows of each table."""
        return {split: self.read_whole(table) for split, table in tables.items()}

    def read_whole(self, table: Table) -> datasets.Dataset:
        """The rows of a table, piece by piece if it is long."""
        return spooled(self.arrow(self.read(piece)) for piece in table.pieces())

    def strata(self, rows: datasets.Dataset) -> Indices:
        """Each row's class, of which every split has its share."""
        return np.zeros(len(rows), dtype=np.int64)

    def corrupt(self, train: datasets.Dataset) -> datasets.Dataset:
        """The training rows with the noise that the settings ask for."""
        return train

    def arrow(self, columns: Columns) -> pyarrow.Table:
        """The columns in their types."""
        schema = datasets.Features({name: self.features[name] for name in columns}).arrow_schema
        return pyarrow.Table.from_pydict(columns, schema)

    def _three_splits(self, read: dict[str, datasets.Dataset]) -> dict[str, datasets.Dataset]:
        """Take the splits that are missing from the first of the given ones."""
        wanted = {"validation": self.config.validation_fraction, "test": self.config.test_fraction}
        fractions = {split: fraction for split, fraction in wanted.items() if split not in read}
        if not fractions:
            return read
        whole = next(iter(read.values()))
        texts = _keys(whole)
        chosen = carve(self.strata(whole), texts, fractions, self.config.split_seed)
        if min(len(part) for part in chosen.values()) == 0:
            raise UserError(
                f"{self.config.source} has {len(np.unique(texts))} different texts, too few to split into train, "
                "validation and test."
            )
        given = {split: rows for split, rows in read.items() if split in wanted}
        return given | {split: taken(whole, part) for split, part in chosen.items()}

    def _cut(self, train: datasets.Dataset, origin: str) -> datasets.Dataset:
        size, rows = self.config.train_size, len(train)
        if size is None:
            return train
        if size > rows:
            raise UserError(
                f"data.train_size is {size}, but {origin} gives {rows} rows to train on; ask for at most {rows}."
            )
        return taken(train, np.sort(stratified_order(self.strata(train), self.config.split_seed)[:size]))


def _check_ignored(config: DataConfig, tables: Tables) -> None:
    unknown = [name for name in config.ignore if not any(name in table.columns for table in tables.values())]
    if unknown:
        raise UserError(f"{config.source} has no column {unknown[0]!r}, which data.ignore names; leave it out.")


PAIR = "text_pair"
"""The column of a second text."""


class TextReader(Reader):
    """Reads "id", "text", "text_pair" where the source has that column or names another, and a value of each row.

    A split whose values are withheld (no such column, or -1 throughout) counts as missing, with a warning; the
    validation split then stands in for the test split.

    Attributes:
        value: Name of the value's column.
        defaults: The source's column of it, where `label` names none: the first of these that is there.
        known: Values of the training table, as text.
    """

    value: ClassVar[str]
    defaults: ClassVar[tuple[str, ...]] = ("label",)
    known: Collection[str]

    @abstractmethod
    def study(self, table: Table, column: str) -> None:
        """Look at the values to train on; set `known`, and `labels` if they are classes."""

    @abstractmethod
    def values(self, table: Table, column: str) -> list[Any]:
        """The value of each row."""

    def learn(self, tables: Tables) -> Tables:
        train = next(iter(tables.values()))
        self._column = self.config.label or self._default([train])
        self._has_pair = PAIR in train.columns and PAIR not in self.config.ignore
        self.study(train, self._column)
        unlabelled = [split for split in list(tables)[1:] if self._is_withheld(tables[split], self._column)]
        if not unlabelled:
            return tables
        labelled = {split: table for split, table in tables.items() if split not in unlabelled}
        consequence = "is left out; what is missing is split off the training rows."
        if "test" in unlabelled and "validation" in labelled:
            labelled["test"] = labelled.pop("validation")
            consequence = (
                "is left out: the validation split is the test set, and validation rows are split off the training "
                "rows. Set data.test_split to validation to say so yourself."
            )
        origins = " and ".join(tables[split].origin for split in unlabelled)
        warnings.warn(f"{origins} has no labels and {consequence}", stacklevel=3)
        return labelled

    def read(self, table: Table) -> Columns:
        return self._read(table, self._texts, self._column)

    def read_other(self, tables: Tables) -> datasets.Dataset:
        # Another source may have the default names of the columns instead.
        here = [name for table in tables.values() for name in table.columns]
        column = self._column if here.count(self._column) == len(tables) else self._default(tables.values())
        texts = {name: given if here.count(given) == len(tables) else name for name, given in self._texts.items()}
        usable = {s: t for s, t in tables.items() if column not in t.columns or not self._is_withheld(t, column)}
        pieces = find_test_table(usable, tables).pieces()
        return spooled(self.arrow(self._read(piece, texts, column)) for piece in pieces)

    @property
    def _texts(self) -> dict[str, str]:
        pair = self.config.text_pair or (PAIR if self._has_pair else None)
        return {"text": self.config.text or "text"} | ({PAIR: pair} if pair else {})

    def _default(self, tables: Collection[Table]) -> str:
        found = (name for name in self.defaults if any(name in table.columns for table in tables))
        return next(found, self.defaults[-1])

    def _read(self, table: Table, texts: Mapping[str, str], column: str) -> Columns:
        read = {name: table.texts(given, name) for name, given in texts.items()}
        return {"id": table.ids(), **read, self.value: self.values(table, column)}

    def _is_withheld(self, table: Table, column: str) -> bool:
        """Whether a table has no such column, or one of -1 or nothing, unless that is a value to train on."""
        values = {str(value) for value in table.values(column)} if column in table.columns else set()
        return values <= _WITHHELD and not values & set(self.known)


def find_test_table(usable: Tables, tables: Tables) -> Table:
    """The test split; without one, the validation split, or all there is."""
    for split in ("test", "validation", ALL, "train"):
        if split in usable and len(usable[split]):
            return usable[split]
    raise UserError(f"{next(iter(tables.values())).origin} has no labelled rows to test on.")


def digest(dataset: datasets.Dataset) -> str:
    """The sha256 over the rows, each as JSON with sorted keys: equal for equal rows in equal order."""
    sha = hashlib.sha256()
    for begin in range(0, len(dataset), PIECE):
        for row in dataset.select(range(begin, min(begin + PIECE, len(dataset)))).to_list():
            sha.update(_as_json(row).encode() + b"\n")
    return sha.hexdigest()


def _keys(rows: datasets.Dataset) -> NDArray[np.uint64]:
    """A number for each row, the same for the same text."""
    name = next(name for name in ("text", "messages", "prompt") if name in rows.column_names)
    values = chain.from_iterable(piece[name] for piece in rows.select_columns(name).iter(PIECE))
    texts = (value if isinstance(value, str) else json.dumps(value) for value in values)
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.fromiter((int.from_bytes(one) for one in digests), dtype=np.uint64, count=len(rows))


def _main_tables(config: DataConfig) -> dict[str, Table]:
    """The tables of the source, the one to train on first."""
    if config.subset is not None and config.source in BUNDLED:
        raise UserError(f"data.subset is for hub data, but {config.source} is bundled; leave it out.")
    tables = read_tables(config.source, config.subset, config.columns)
    if config.test_split is not None:
        if config.test_split not in tables:
            raise UserError(f"{config.source} has no validation split to test on; leave out data.test_split.")
        tables["test"] = tables.pop(config.test_split)
    if ALL in tables:
        return tables
    if "train" not in tables:
        raise UserError(f"{config.source} has no train split, only {', '.join(tables)}.")
    if not len(tables["train"]):
        raise UserError(f"{tables['train'].origin} has no rows; give data with rows in it.")
    return {split: tables[split] for split in ("train", "validation", "test", *FURTHER_TESTS) if split in tables}
