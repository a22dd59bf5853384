"""What becomes of completions that are longer than a sequence may be: counted, said, and never silent."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_ggpo.errors import UserError
from lora_ggpo.tasks.base import NO_LOSS

if TYPE_CHECKING:
    from lora_ggpo.tasks.config import TaskConfig


@dataclass
class Room:
    """Fits encoded "sft" rows of one set into `task.max_length`, and keeps account of what that takes from them.

    Attributes:
        config: Says how long a row may be, and what becomes of a longer one.
        name: The set, as messages name it; "" for none.
        longest: Tokens of the longest row.
        learnt, lost: Tokens of all rows that are to be learnt, and those of them that are not.
        cut, left_out: Rows that lost their end, and rows that are not there at all.
    """

    config: TaskConfig
    name: str
    rows: int = 0
    longest: int = 0
    learnt: int = 0
    lost: int = 0
    cut: int = 0
    left_out: int = 0

    def fit(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]] | None:
        """Return a row's tokens and labels as they are trained on, or None if nothing is left to learn."""
        limit = self.config.max_length
        whole, kept = _learnt(labels), _learnt(labels[:limit])
        self.rows += 1
        self.longest = max(self.longest, len(ids))
        self.learnt += whole
        if not kept or (kept < whole and self.config.too_long == "drop"):
            self.left_out += 1
            self.lost += whole
            return None
        self.cut += kept < whole
        self.lost += whole - kept
        return ids[:limit], labels[:limit]

    def report(self) -> None:
        """Say what was lost, in one warning.

        Raises:
            UserError: anything was and `task.too_long` is "refuse", or no row is left.
        """
        length = f"task.max_length = {self.config.max_length} tokens"
        needed = f"the longest row has {self.longest:,}"
        if self.left_out == self.rows:
            each = "row is longer than" if self.config.too_long == "drop" else "prompt fills"
            raise UserError(f"No row is left: every {each} {length}; raise it ({needed}).")
        if not self.lost:
            return
        lost = f"{self.lost:,} of {self.learnt:,} tokens to learn are lost; {needed}"
        if self.config.too_long == "refuse":
            raise UserError(
                f"{self.cut + self.left_out:,} of {self.rows:,} rows are longer than {length}: {lost}; "
                "raise it, or set task.too_long to cut or drop."
            )
        why = "they are longer than" if self.config.too_long == "drop" else "their prompt fills"
        parts = {
            f"are cut at {length}, so what they teach has no end": self.cut,
            f"are left out: {why} {length}": self.left_out,
        }
        said = "; ".join(f"{rows:,} of {self.rows:,} rows {what}" for what, rows in parts.items() if rows)
        prefix = f"{self.name}: " if self.name else ""
        warnings.warn(f"{prefix}{said}. In all {lost}.", stacklevel=4)


def _learnt(labels: list[int]) -> int:
    return sum(label != NO_LOSS for label in labels[1:])  # nothing predicts the first token
