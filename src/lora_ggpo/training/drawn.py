"""Which rows of a long training set a run draws: where its steps end before the rows do, no others are encoded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import TrainingArguments

WHOLE = 20_000
"""Sets of at most so many rows are encoded whole: that takes seconds, is kept for all seeds, and finds all errors."""

LEAST = 2_000
"""Rows that are encoded at least: starting values that come from the data look at some hundreds."""

MARGIN = 1.1
"""How many times the rows are encoded that should be enough, judged by those before."""

DRAWN = "train, as drawn"
"""Name of the set of the rows that are drawn, in warnings and errors about them."""

_GROUPED, _IN_ORDER = "group_by_length", "sequential"
_KNOWN = ("random", _GROUPED, _IN_ORDER)


class Drawn(Dataset):  # type: ignore[misc]  # datasets comes without types
    """Encoded rows in the order in which a run draws them, and no more than one epoch of them.

    Attributes:
        epoch: How many there would be if all were encoded; reckoned from these where rows are packed or left out.
    """

    def __init__(self, rows: Dataset, epoch: int) -> None:
        super().__init__(rows.data, rows.info, indices_table=rows._indices, fingerprint=rows._fingerprint)
        self.epoch = epoch


def rows_of_epoch(rows: Dataset) -> int:
    """How many rows one pass over the training set takes, of which `rows` are encoded."""
    return rows.epoch if isinstance(rows, Drawn) else len(rows)


def random_order(rows: int, seed: int) -> NDArray[np.int64]:
    """The numbers of `rows` rows in an order that hangs on `seed` alone."""
    order: NDArray[np.int64] = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).numpy()
    return order


def section_size(rows: int, group: int) -> int:
    """How many of `rows` rows are sorted by length together, where groups of so many are to be of like length."""
    return group * min(max(rows // (4 * group), 1), 50)


def encode_drawn(
    train: Dataset, args: TrainingArguments, encode: Callable[[Dataset, str], Dataset], *, packed: bool
) -> Dataset:
    """Encode what a run draws of `train`: all of it, or `Drawn` where its steps end before the rows do.

    The order is that of a run on all rows, in which those that cannot be trained on are passed over; of rows that are
    grouped by length the longest of these, not of all, comes first. Packed rows are made of the first rows of that
    order, as many as are enough, and drawn in an order of their own.

    Args:
        train: The rows of the training set.
        encode: Makes of rows of the set that it names those that are trained on.
        packed: Whether that puts several into one.
    """
    steps, strategy = args.max_steps, args.train_sampling_strategy
    each = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    together = section_size(len(train), each) if strategy == _GROUPED else 1
    wanted = math.ceil(max(steps * each, LEAST) / together) * together
    if steps <= 0 or len(train) <= max(wanted, WHOLE) or strategy not in _KNOWN:
        return encode(train, "train")
    order = np.arange(len(train)) if strategy == _IN_ORDER else random_order(len(train), args.seed)
    taken = wanted
    while taken < len(train):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            rows = encode(train.select(order[:taken]), DRAWN)
        if len(rows) >= wanted:
            for one in told:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
            mixed = rows.select(random_order(len(rows), args.seed)) if packed and strategy != _IN_ORDER else rows
            return Drawn(mixed, round(len(train) * len(rows) / taken))
        taken = math.ceil(MARGIN * taken * wanted / max(len(rows), 1))
    return encode(train, "train")
