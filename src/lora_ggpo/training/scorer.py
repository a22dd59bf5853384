"""Score a trained model on the sets of a run, by all its processes, and keep its predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

from lora_ggpo.data import Splits
from lora_ggpo.errors import UserError
from lora_ggpo.models.load import check_tokens
from lora_ggpo.statistics.measured import Floats, Measured, Scores
from lora_ggpo.tasks import Task
from lora_ggpo.tasks.base import Progress
from lora_ggpo.training.precision import TYPES, precision_of
from lora_ggpo.training.prefix import FrozenPrefix
from lora_ggpo.training.sharding import cuts_weights
from lora_ggpo.workspace.files import file_name, write_json_lines
from lora_ggpo.workspace.progress import Reporter
from lora_ggpo.workspace.ranks import is_first

TRAIN_ROWS = 1000
"""Rows of the training split that are scored, at most."""


class Scorer:
    """Scores one model, on the device and in the precision of `args`.

    Attributes:
        draws: What puts each draw of its noise in place; scores are then their mean. None is the model as it is.
        prefix: What its frozen layers give is kept there; None runs them.
    """

    def __init__(
        self, args: TrainingArguments, model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, reporter: Reporter
    ) -> None:
        self.draws: Sequence[Callable[[], None]] | None = None
        self.prefix: FrozenPrefix | None = None
        placed = model if cuts_weights(args) else model.to(args.device)
        self._model, self._tokenizer, self._task, self._reporter = placed, tokenizer, task, reporter
        self._options: dict[str, Any] = {
            "batch_size": args.per_device_eval_batch_size,
            "autocast": TYPES[precision_of(args)],
            "device": args.device,
        }
        self.encoded: dict[str, Dataset] = {}
        self._kept: list[tuple[Dataset, Floats]] = []

    def encode(self, rows: Dataset, name: str) -> Dataset:
        """Tokenise `rows` of the set `name`."""
        encoded = self._task.encode(rows, self._tokenizer, name)
        check_tokens(self._model, self._tokenizer, encoded["input_ids"], f"{name}: Row")
        return encoded

    def prepare(self, sets: dict[str, Dataset]) -> None:
        """Encode `sets`, of names that stand for the same rows ever after, so that scoring them cannot fail there.

        Raises:
            UserError: one cannot be encoded, or two could not be kept apart; it is named.
        """
        files: dict[str, str] = {}
        for name, rows in sets.items():
            other = files.setdefault(file_name(name), name)
            if other != name:
                raise UserError(f"The predictions on {other} and {name} would have one file name; rename one of them.")
            if name not in self.encoded:
                self.encoded[name] = self.encode(rows, name)

    def score_by(self, task: Task, rows: Dataset, name: str, batch_size: int) -> Floats:
        """Scores by another `task` of the rows of the set `name`, with the model as it is.

        Raises:
            UserError: they cannot be encoded.
        """
        encoded = task.encode(rows, self._tokenizer, name)
        check_tokens(self._model, self._tokenizer, encoded["input_ids"], f"{name}: Row")
        options = {**self._options, "batch_size": batch_size}
        with self._reporter.task(f"evaluate {name}") as shown:
            return task.score(self._model, encoded, self._tokenizer, progress=shown.update, **options)

    def quick(self, encoded: Dataset, *, keep: bool = False) -> dict[str, float]:
        """Metrics of encoded rows by name, without standard errors or progress.

        Args:
            keep: Have `score` take these scores, if it comes to the same rows, until `forget`: the model must stay as
                it is until then.
        """
        scores = self._scores(self._task, encoded)
        if keep:
            self._kept.append((encoded, scores))
        metrics = self._task.measure(scores, encoded)
        return {name: metric.value for name, metric in metrics.items()}

    def forget(self) -> None:
        """Leave what `quick` has kept."""
        self._kept.clear()

    def score(self, sets: dict[str, Dataset], predictions: Path | None) -> Scores:
        """Metrics of each set by name; with `predictions`, a folder, also one file a set with a line for each row.

        The validation set comes first, since its scores may tell the temperature for the others.
        """
        self.prepare(sets)
        task, found = self._task, {}
        for name in sorted(sets, key=lambda name: name != "validation"):
            scores, found[name] = self._score(task, name, predictions)
            task = task.fitted(scores) if name == "validation" else task
        return {name: found[name] for name in sets}

    def _score(self, task: Task, name: str, predictions: Path | None) -> tuple[Floats, dict[str, Measured]]:
        rows = self.encoded[name]
        with self._reporter.task(f"evaluate {name}") as shown:
            known = next((scores for kept, scores in self._kept if kept is rows and task is self._task), None)
            scores = self._scores(task, rows, shown.update) if known is None else known
            metrics = task.measure(scores, rows)
        lines = task.lines(scores, rows) if predictions and is_first() else []
        if predictions and lines:
            write_json_lines(predictions / f"{file_name(name)}.jsonl", lines)
        return scores, metrics

    def _scores(self, task: Task, rows: Dataset, progress: Progress = lambda done, every: None) -> Floats:
        batches = self.prefix.batches(rows) if self.prefix else None
        score = partial(task.score, self._model, rows, self._tokenizer, batches=batches, **self._options)
        if self.draws is None:
            return score(progress=progress)
        parts, every = [], len(rows) * len(self.draws)
        for number, draw in enumerate(self.draws):
            draw()
            begun = number * len(rows)

            def shown(done: int, _: int, begun: int = begun) -> None:
                progress(begun + done, every)

            parts.append(score(progress=shown))
        return np.mean(parts, axis=0)


def evaluation_sets(splits: Splits, size: int | None = None) -> dict[str, Dataset]:
    """What a run is scored on: validation, test, further test sets, and rows of the training split; `size` of each.

    At most `TRAIN_ROWS` training rows are taken, the same for every run on the data. With label noise they come as
    two sets: under ``train-noisy`` the labels are the flipped ones, so its accuracy is memorisation.
    """
    sets = {"validation": splits.validation, "test": splits.test, **splits.out_of_domain}
    sets = {name: fixed_sample(rows, size or len(rows)) for name, rows in sets.items()}
    sample = fixed_sample(splits.train, min(TRAIN_ROWS, size or TRAIN_ROWS))
    noisy = np.asarray(sample["noisy"], dtype=bool) if "noisy" in sample.column_names else np.zeros(len(sample), bool)
    if noisy.any():
        sets["train-clean"] = sample.select(np.flatnonzero(~noisy))
        sets["train-noisy"] = sample.select(np.flatnonzero(noisy))
    else:
        sets["train"] = sample
    return {name: rows for name, rows in sets.items() if len(rows)}


def fixed_sample(rows: Dataset, size: int) -> Dataset:
    """At most `size` rows, the same at every call: at random, since sources are often sorted by label."""
    return rows if len(rows) <= size else _drawn(rows, slice(size))


def further_sample(rows: Dataset, size: int, most: int) -> Dataset:
    """At most `most` rows that `fixed_sample` leaves out, the same at every call; of all rows where it leaves none."""
    if len(rows) <= size:
        return fixed_sample(rows, most)
    return _drawn(rows, slice(size, size + most))


def _drawn(rows: Dataset, part: slice) -> Dataset:
    """A part of all rows in a random order that is the same at every call, put back into theirs."""
    return rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[part]))
