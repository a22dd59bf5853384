"""Validation during training: what is measured, which weights are the best so far, and when training is over.

transformers' own (``load_best_model_at_end``, ``EarlyStoppingCallback``) would score by the Trainer's evaluation, not
the task's, keep a whole checkpoint with its optimizer for the best, know it by an absolute path, and load it by peft's
``load_adapter``, which AdaLoRA's pruned ranks do not survive. Here the log says which validation is the best, and
each checkpoint holds its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import AdaLoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_ggpo.data import Splits
from lora_ggpo.errors import UserError
from lora_ggpo.recipe.recipe import Recipe
from lora_ggpo.statistics.metrics import METRICS
from lora_ggpo.training.scorer import Scorer, fixed_sample
from lora_ggpo.training.sharding import put, trained_weights

VALIDATION_ROWS = 500
"""Rows of a set that are scored during training, at most."""

BEST = "best.safetensors"
"""The best weights so far, in each checkpoint."""

Row = Mapping[str, Any]
"""A line of the log."""


def check_validation(recipe: Recipe, splits: Splits) -> None:
    """Raise a UserError if `recipe` keeps the best and there is nothing to tell it by."""
    if recipe.keep == "best" and not len(splits.validation):
        raise UserError(
            f"keep: best needs validation rows, and {recipe.data.source} comes with an empty validation set; fill it, "
            "or take it away to have data.validation_fraction of the training rows split off."
        )


def best_row(recipe: Recipe, log: Sequence[Row]) -> Row | None:
    """The validation with the best ``keep_metric``, the first of equals; one that is not finite is the worst."""
    metric = recipe.kept_metric
    sign = 1 if METRICS[metric].higher_is_better else -1

    def order(row: Row) -> float:
        value = sign * row[f"validation/{metric}"]
        return value if math.isfinite(value) else -math.inf

    return max((row for row in log if f"validation/{metric}" in row), key=order, default=None)


def kept_step(log: Sequence[Row]) -> int | None:
    """The step whose weights are the best so far; None if the log marks none."""
    return max((row["step"] for row in log if row.get("best")), default=None)


def is_over(recipe: Recipe, log: Sequence[Row]) -> bool:
    """Whether the last validation in `log` ends the training: by stop_loss, or because patience is at its end."""
    key = f"train/{recipe.task.type.loss}"
    last = next((row for row in reversed(log) if key in row), None)
    if recipe.stop_loss and last and last[key] <= recipe.stop_loss:
        return True
    best = best_row(recipe, log) if recipe.patience else None
    since = [row for row in log if best and f"validation/{recipe.kept_metric}" in row and row["step"] > best["step"]]
    return recipe.patience is not None and len(since) >= recipe.patience


class Validation:
    """The validations of one run.

    Args:
        model: What `score` scores.
    """

    def __init__(self, recipe: Recipe, splits: Splits, score: Scorer, model: nn.Module) -> None:
        self._recipe, self._score, self._model = recipe, score, model
        self._sets: dict[str, Dataset] = {}
        if recipe.validate_every and len(splits.validation):
            self._sets["validation"] = fixed_sample(score.encoded["validation"], VALIDATION_ROWS)
        if recipe.stop_loss:
            self._sets["train"] = score.encode(fixed_sample(splits.train, VALIDATION_ROWS), "train")
        self._log: list[Row] = []
        self._best: dict[str, Tensor] = {}
        config = model.peft_config["default"] if isinstance(model, PeftModel) else None
        self._adalora = config if isinstance(config, AdaLoraConfig) else None
        self._ranks: Any = None  # those that AdaLoRA had left when the weights were the best

    def resume(self, checkpoint: Path, log: Sequence[Row]) -> None:
        """Go on from `checkpoint`, behind `log`."""
        self._log = list(log)
        if kept_step(log) is not None:
            self._best = load_file(checkpoint / BEST)

    def is_due(self, step: int, last: int) -> bool:
        """Whether to validate after `step`; where the best is kept, the last one is a candidate too."""
        every = self._recipe.validate_every
        ends = self._recipe.keep == "best" and step >= last
        return bool(every and self._sets and (step % every == 0 or ends))

    def measure(self, step: int, epoch: float | None) -> dict[str, Any]:
        """Validate; return the line of the log. The weights are kept if they are the best so far."""
        self._score.forget()
        measured = {name: self._score.quick(rows, keep=True) for name, rows in self._sets.items()}
        values = {f"{name}/{metric}": value for name, of in measured.items() for metric, value in of.items()}
        row = {"step": step, "epoch": epoch, **values}
        self._log.append(row)
        if self._recipe.keep == "best" and best_row(self._recipe, self._log) is row:
            row["best"] = True
            self._keep()
        return row

    @property
    def latest(self) -> int | None:
        """The step of the last validation."""
        return self._log[-1]["step"] if self._log else None

    def is_over(self) -> bool:
        """Whether what was measured last ends the training."""
        return is_over(self._recipe, self._log)

    def save(self, checkpoint: Path) -> None:
        """Write the best weights so far into `checkpoint`."""
        if self._best:
            save_file(self._best, checkpoint / BEST)

    def take_best(self) -> int | None:
        """Put the best weights into the model; return their step. None leaves the last ones."""
        put(self._model, self._best)
        if self._best and self._adalora:
            self._adalora.rank_pattern = self._ranks
        return kept_step(self._log)

    def _keep(self) -> None:
        self._best = trained_weights(self._model)
        if self._adalora:
            self._ranks = self._adalora.rank_pattern
