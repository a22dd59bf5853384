"""Regression: a number for each text or pair of texts, such as their similarity.

The model has a head of one output, trained by the mean squared error over the rows; it starts at their mean.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import scipy
from datasets import Dataset, Value
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ggpo.data.load import STRING, TextReader
from lora_ggpo.data.table import Table
from lora_ggpo.errors import UserError
from lora_ggpo.models.architecture import HEADED
from lora_ggpo.statistics.measured import RESAMPLES, SEED, Floats, Measured, measure_mean
from lora_ggpo.tasks.base import Row, Score, Task
from lora_ggpo.tasks.classification import encode_texts, head_scorer

_BLOCK = 1_000_000


class TargetReader(TextReader):
    """Reads texts with "target" (float64): the numbers in column `label`, else in "score", if there is one, or "label".

    Text that says a number is one.
    """

    value = "target"
    defaults = ("score", "label")
    features: ClassVar = {**dict.fromkeys(("id", "text", "text_pair"), STRING), "target": Value("float64")}

    def study(self, table: Table, column: str) -> None:
        targets = self.values(table, column)
        if min(targets) == max(targets):
            raise UserError(f"{table.origin}: every row has {targets[0]:g} in column {column!r}; there is no target.")
        self.known = {str(value) for value in table.values(column)}

    def values(self, table: Table, column: str) -> list[float]:
        return [_target(value, table, column, row) for row, value in enumerate(table.column(column, "label"))]


def _target(value: object, table: Table, column: str, row: int) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{table.where(row)}: {reprlib.repr(value)} in column {column!r} is no finite number.")
    return number


class Regression(Task):
    """A new head on the model gives a number."""

    reader = TargetReader
    architecture = HEADED
    columns = frozenset({"text", "text_pair", "label", "ignore"})
    metrics = ("pearson", "spearman", "mse")
    loss = "mse"
    averages = True
    features: ClassVar = {"labels": Value("float32"), "target": Value("float64")}

    @property
    def head(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def rows(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[list[Row]]:
        return encode_texts(dataset, tokenizer, self.config.max_length, "target")

    def begin(self, model: PreTrainedModel, rows: Dataset) -> Dataset:
        # From zero the first hundreds of steps would go into finding the mean, which bends the body as well.
        outputs = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == 1]
        if outputs and outputs[-1].bias is not None:
            nn.init.constant_(outputs[-1].bias, float(np.mean(rows["labels"][:])))
        return rows

    def scorer(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Score:
        return head_scorer(model)

    def measure(self, scores: Floats, rows: Dataset) -> dict[str, Measured]:
        return regression_metrics(scores[:, 0], np.asarray(rows["target"], dtype=np.float64))

    def lines(self, scores: Floats, rows: Dataset) -> list[dict[str, Any]]:
        columns = zip(rows["id"], rows["target"], scores[:, 0], strict=True)
        return [{"id": id_, "target": target, "predicted": round(float(value), 6)} for id_, target, value in columns]


def regression_metrics(predicted: Floats, targets: Floats) -> dict[str, Measured]:
    """Pearson's and Spearman's correlation and the mean squared error.

    Args:
        predicted: (n,).
        targets: (n,), in the unit of the predictions.

    Standard errors: of the correlations the standard deviation over 1000 bootstrap resamples of the rows (seeded, so
    the same data give the same figure); s / sqrt(n) of the squared error. Spearman's correlation is Pearson's of the
    ranks, where ties share their mean rank. A correlation with what does not vary is nan.
    """
    n = len(targets)
    pearson, spearman = _correlations(predicted[None], targets[None])[:, 0]
    pearson_se, spearman_se = _bootstrap(predicted, targets)
    return {
        "pearson": Measured(float(pearson), pearson_se, n),
        "spearman": Measured(float(spearman), spearman_se, n),
        "mse": measure_mean((predicted - targets) ** 2),
    }


def _correlations(one: Floats, other: Floats) -> Floats:
    """Pearson's and Spearman's correlation of each row of two arrays (rows, n): (2, rows)."""
    ranks = [scipy.stats.rankdata(values, axis=1) for values in (one, other)]
    return np.stack([_pearson(one, other), _pearson(*ranks)])


def _pearson(one: Floats, other: Floats) -> Floats:
    one, other = (x - x.mean(axis=1, keepdims=True) for x in (one, other))
    spread = np.sqrt(np.square(one).sum(axis=1) * np.square(other).sum(axis=1))
    flat = (np.ptp(one, axis=1) == 0) | (np.ptp(other, axis=1) == 0)
    found: Floats = (one * other).sum(axis=1) / np.where(flat | (spread == 0), np.nan, spread)
    return found


def _bootstrap(predicted: Floats, targets: Floats) -> tuple[float, float]:
    """Standard errors of the two correlations; nan where resamples do not vary."""
    n, rng = len(targets), np.random.default_rng(SEED)
    sizes = [len(part) for part in np.array_split(np.arange(RESAMPLES), max(1, RESAMPLES * n // _BLOCK))]
    chosen = (rng.integers(n, size=(size, n)) for size in sizes)
    found = np.concatenate([_correlations(predicted[rows], targets[rows]) for rows in chosen], axis=1)
    kept = found[:, np.isfinite(found).all(axis=0)]
    if kept.shape[1] < RESAMPLES / 2:
        return math.nan, math.nan
    pearson, spearman = kept.std(axis=1, ddof=1)
    return float(pearson), float(spearman)
