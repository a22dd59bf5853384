"""What becomes of completions that are longer than a sequence may be: counted, said, and never silent."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from lora_ggpo.errors import UserError
from lora_ggpo.tasks.base import NO_LOSS

if TYPE_CHECKING:
    from lora_ggpo.tasks.config import TaskConfig


class Room:
    """Fits encoded "sft" rows of one set into `task.max_length`, and keeps account of what that takes from them.

    Args:
        name: The set, as the warning names it; "" for none.
    """

    def __init__(self, config: TaskConfig, name: str) -> None:
        self._config, self._name = config, name
        self._rows = self._longest = 0
        self._learnt = self._lost = 0  # tokens to learn
        self._cut = self._left_out = 0  # rows

    def fit(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]] | None:
        """Return a row's tokens and labels as they are trained on, or None if nothing is left to learn."""
        limit, drop = self._config.max_length, self._config.too_long == "drop"
        whole, kept = _count_learnt(labels), _count_learnt(labels[:limit])
        left_out = not kept or (kept < whole and drop)
        self._rows += 1
        self._longest = max(self._longest, len(ids))
        self._learnt += whole
        self._lost += whole if left_out else whole - kept
        self._left_out += left_out
        self._cut += kept < whole and not left_out
        return None if left_out else (ids[:limit], labels[:limit])

    def report(self) -> None:
        """Say what was lost, in one warning.

        Raises:
            UserError: anything was and `task.too_long` is "refuse", or no row is left.
        """
        way, rows = self._config.too_long, f"of {self._rows:,} rows"
        length, needed = f"task.max_length = {self._config.max_length} tokens", f"the longest row has {self._longest:,}"
        if self._left_out == self._rows:
            each = "row is longer than" if way == "drop" else "prompt fills"
            raise UserError(f"No row is left: every {each} {length}; raise it ({needed}).")
        if not self._lost:
            return
        lost = f"{self._lost:,} of {self._learnt:,} tokens to learn are lost; {needed}"
        if way == "refuse":
            raise UserError(
                f"{self._cut + self._left_out:,} {rows} are longer than {length}: {lost}; raise it, or set "
                "task.too_long to cut or drop."
            )
        why = "they are longer than" if way == "drop" else "their prompt fills"
        cut = f"{self._cut:,} {rows} are cut at {length}, so what they teach has no end"
        left_out = f"{self._left_out:,} {rows} are left out: {why} {length}"
        said = "; ".join([cut] * bool(self._cut) + [left_out] * bool(self._left_out))
        warnings.warn(f"{self._name}: {said}. In all {lost}.".removeprefix(": "), stacklevel=4)


def _count_learnt(labels: list[int]) -> int:
    return sum(label != NO_LOSS for label in labels[1:])  # nothing predicts the first token
