"""Score a trained model on the sets of a run, and keep its predictions."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lora_ggpo.data import Splits
from lora_ggpo.errors import UserError
from lora_ggpo.models.load import check_tokens
from lora_ggpo.tasks import Metric, TaskConfig, encode, evaluate, predict, predict_values, prediction_metrics
from lora_ggpo.tasks.regression import regression_metrics, regression_rows
from lora_ggpo.workspace.files import write_json_lines
from lora_ggpo.workspace.progress import Reporter

TRAIN_ROWS = 1000
"""Rows of the training split that are scored, at most."""

_LONGEST_NAME = 100

Scores = dict[str, dict[str, Metric]]


class Scorer:
    """Scores one model.

    Args:
        config: With the label words filled in (`TaskConfig.for_labels`).
        autocast: Type of the forward passes; None is the model's own.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: TaskConfig,
        *,
        batch_size: int,
        autocast: torch.dtype | None,
        reporter: Reporter,
    ) -> None:
        self._model, self._tokenizer, self._config, self._reporter = model, tokenizer, config, reporter
        self._options: dict[str, Any] = {"batch_size": batch_size, "autocast": autocast}
        self.encoded: dict[str, Dataset] = {}

    def encode(self, rows: Dataset, name: str = "") -> Dataset:
        """Tokenise `rows` of the set `name`."""
        encoded = encode(self._config.kind, rows, self._tokenizer, self._config, name)
        check_tokens(self._model, self._tokenizer, encoded["input_ids"])
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
                try:
                    self.encoded[name] = self.encode(rows, name)
                except UserError as error:
                    raise UserError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from error

    def quick(self, encoded: Dataset) -> dict[str, float]:
        """Metrics of encoded rows by name, without standard errors or progress."""
        kind = self._config.kind
        metrics = evaluate(kind, self._model, encoded, self._tokenizer, self._config, **self._options)
        return {name: metric.value for name, metric in metrics.items()}

    def score(self, sets: dict[str, Dataset], predictions: Path | None) -> Scores:
        """Metrics of each set by name; with `predictions`, a folder, also one file a set with a line for each row."""
        self.prepare(sets)
        return {name: self._score(name, rows, predictions) for name, rows in sets.items()}

    def _score(self, name: str, rows: Dataset, predictions: Path | None) -> dict[str, Metric]:
        config, encoded = self._config, self.encoded[name]
        with self._reporter.task(f"evaluate {name}") as task:
            arguments = (config.kind, self._model, encoded, self._tokenizer, config)
            options: dict[str, Any] = {**self._options, "progress": task.update}
            if config.kind == "sft":
                return evaluate(*arguments, **options)
            if config.kind == "regression":
                values = predict_values(self._model, encoded, self._tokenizer, **options)
                kept = regression_rows(rows["id"][:], rows["target"][:], values)
                metrics = regression_metrics(values, np.asarray(rows["target"], dtype=np.float64))
            else:
                probabilities = predict(*arguments, **options)
                kept = _predictions(rows, probabilities)
                metrics = prediction_metrics(probabilities, np.asarray(rows["label"], dtype=np.int64))
        if predictions is not None:
            write_json_lines(predictions / f"{file_name(name)}.jsonl", kept)
        return metrics


def evaluation_sets(splits: Splits) -> dict[str, Dataset]:
    """What a run is scored on: validation, test, further test sets, and rows of the training split.

    At most `TRAIN_ROWS` training rows are taken, the same for every run on the data. With label noise they come as
    two sets: under ``train-noisy`` the labels are the flipped ones, so its accuracy is memorisation.
    """
    sets = {"validation": splits.validation, "test": splits.test, **splits.out_of_domain}
    sample = fixed_sample(splits.train, TRAIN_ROWS)
    noisy = np.asarray(sample["noisy"], dtype=bool) if "noisy" in sample.column_names else np.zeros(len(sample), bool)
    if noisy.any():
        sets["train-clean"] = sample.select(np.flatnonzero(~noisy))
        sets["train-noisy"] = sample.select(np.flatnonzero(noisy))
    else:
        sets["train"] = sample
    return {name: rows for name, rows in sets.items() if len(rows)}


def fixed_sample(rows: Dataset, size: int) -> Dataset:
    """At most `size` rows, the same at every call: at random, since sources are often sorted by label."""
    return rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[:size]))


def plain(scores: Scores) -> dict[str, dict[str, Any]]:
    """`scores` as JSON holds them."""
    return {name: {key: metric.to_dict() for key, metric in metrics.items()} for name, metrics in scores.items()}


def file_name(name: str) -> str:
    """`name`, which may be a path or a hub id, as the name of a file."""
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "set"
    return plain if len(plain) <= _LONGEST_NAME else f"{plain[-_LONGEST_NAME:]}-{sha256(name.encode()).hexdigest()[:8]}"


def _predictions(rows: Dataset, probabilities: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    columns = zip(rows["id"], rows["label"], probabilities, strict=True)
    return [
        {"id": id_, "label": label, "predicted": int(row.argmax()), "probabilities": [round(float(p), 6) for p in row]}
        for id_, label, row in columns
    ]
