"""Labels of any kind become class names, and class names become indices."""

from __future__ import annotations

import re

import datasets
import pyarrow

from lora_ggpo.data.load import STRING, TextReader
from lora_ggpo.data.sampling import Indices, flip_labels
from lora_ggpo.data.spool import numbers, spooled
from lora_ggpo.data.table import Table
from lora_ggpo.errors import UserError


class LabelReader(TextReader):
    """Reads texts with "label", an index into `labels`; train has "noisy" (bool) as well.

    Labels may be names, integers or booleans. The classes are as the data declares them, or else the labels of train,
    sorted as numbers if they are.
    """

    value = "label"
    features = dict.fromkeys(("id", "text", "text_pair"), STRING) | {
        "label": datasets.Value("int64"),
    }
    labels: list[str]

    def study(self, table: Table, column: str) -> None:
        names = read_label_names(table, column)
        if len(set(names)) < 2:
            raise UserError(
                f"{table.origin}: every row has the label {names[0]!r} in column {column!r}; "
                "classification needs at least two classes."
            )
        numbers = all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names)
        found = sorted(set(names), key=lambda name: (int(name) if numbers else 0, name))
        self.known = self.labels = list(table.label_names.get(column, found))

    def values(self, table: Table, column: str) -> list[int]:
        index = {name: position for position, name in enumerate(self.labels)}
        names = read_label_names(table, column)
        for row, name in enumerate(names):
            if name not in index:
                raise UserError(
                    f"{table.where(row)}: the label {name!r} is not among the labels of the training data, "
                    f"{', '.join(self.labels)}."
                )
        return [index[name] for name in names]

    def strata(self, rows: datasets.Dataset) -> Indices:
        return numbers(rows, "label")

    def corrupt(self, train: datasets.Dataset) -> datasets.Dataset:
        fraction, seed = self.config.label_noise, self.config.noise_seed
        labels, noisy = flip_labels(numbers(train, "label").tolist(), len(self.labels), fraction, seed)
        columns = {name: train.data.table[name] for name in train.column_names} | {"label": labels, "noisy": noisy}
        return spooled([pyarrow.table(columns)])


def read_label_names(table: Table, column: str) -> list[str]:
    """Return each row's class name."""
    values = table.column(column, "label")
    names = table.label_names.get(column)
    if names is None:
        return [_class_name(value, table, column, row) for row, value in enumerate(values)]
    for row, value in enumerate(values):
        if type(value) is not int or not 0 <= value < len(names):
            raise UserError(
                f"{table.where(row)}: label {value!r} in column {column!r} is outside 0 to {len(names) - 1} "
                f"({', '.join(names)})."
            )
    return [names[value] for value in values]


def _class_name(value: object, table: Table, column: str, row: int) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]+\.[0-9]*\s*", value):
        value = float(value)  # CSV files hold 1.0 where a column of integers has passed through floats
    if isinstance(value, float) and value == value:
        if not value.is_integer():
            raise UserError(
                f"{table.where(row)}: label {value} in column {column!r} is a fraction, not a class; "
                "labels must be integers, booleans or names."
            )
        value = int(value)
    if isinstance(value, int):
        return str(value)
    return table.require_text(value, column, row).strip()
