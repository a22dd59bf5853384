"""Preferences: two answers to a prompt, of which one was chosen."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from lora_ggpo.data.completion import CompletionReader, is_given
from lora_ggpo.data.load import Columns, Tables
from lora_ggpo.data.messages import Message
from lora_ggpo.data.table import Table
from lora_ggpo.errors import UserError

SIDES = ("chosen", "rejected")


class PreferenceReader(CompletionReader):
    """Reads "id", "chosen" and "rejected" with their "prompt", all texts; or all lists of messages, with the "messages"
    before them and perhaps "template".

    What stands beside them in the source is read as it is beside a prompt and a completion. The messages of both sides
    may begin with the prompt, as in UltraFeedback and HH-RLHF.
    """

    def read(self, table: Table) -> Columns:
        return self.read_all({"": table})[""]

    def read_all(self, tables: Tables) -> dict[str, Columns]:
        tables = {split: self._with_prompts(table.without(self.config.ignore)) for split, table in tables.items()}
        chosen, rejected = (self._side(tables, side) for side in SIDES)
        return {split: _paired(table, chosen[split], rejected[split]) for split, table in tables.items()}

    @property
    def _names(self) -> dict[str, str]:
        """The columns of the two sides."""
        return {side: getattr(self.config, side) or side for side in SIDES}

    def _side(self, tables: Tables, side: str) -> dict[str, Columns]:
        """Prompts and the answers of one side, as prompts and completions are read."""
        names = self._names
        others = [name for other, name in names.items() if other != side]
        settings = {"prompt": self._prompt, "completion": names[side], "ignore": []}
        reader = CompletionReader(self.config.model_copy(update=settings))
        return reader.read_all({split: table.without(others) for split, table in tables.items()})

    @property
    def _prompt(self) -> str:
        return self.config.prompt or "prompt"

    def _with_prompts(self, table: Table) -> Table:
        """The table with lists of messages in the column of the prompt, where the answers are such lists."""
        answers = {name: table.column(name, side) for side, name in self._names.items()}
        if not isinstance(next(iter(answers.values()))[0], list):
            return table
        asked = table.values(self._prompt) if self._prompt in table.columns else [None] * len(table)
        prompts: list[Any] = []
        for row, (prompt, *pair) in enumerate(zip(asked, *answers.values(), strict=True)):
            if not all(isinstance(answer, list) and answer for answer in pair):
                raise UserError(f"{table.where(row)}: {' and '.join(answers)} must both be lists of messages here.")
            shared = _shared(pair)
            prompts.append(_before(prompt, shared, table, row))
            for name, answer in zip(answers, pair, strict=True):
                answers[name][row] = answer[len(shared) :]
        return dataclasses.replace(table, columns={**table.columns, self._prompt: prompts, **answers})


def _shared(pair: Sequence[list[Message]]) -> list[Message]:
    """The messages that both conversations begin with; each has one behind them."""
    most = min(map(len, pair)) - 1
    return [turn for turn, _ in takewhile(lambda turns: turns[0] == turns[1], zip(*pair, strict=False))][:most]


def _before(prompt: object, shared: list[Message], table: Table, row: int) -> list[Message]:
    """The messages before the answers: the prompt, and those that both answers begin with, which may hold it."""
    if isinstance(prompt, list):
        turns = prompt
    else:
        turns = [{"role": "user", "content": prompt}] if is_given(prompt) else []
        if any(isinstance(turn, dict) and turn.get("content") == prompt for turn in shared):
            return shared
        if turns and any(isinstance(turn, dict) and turn.get("role") != "assistant" for turn in shared[:1]):
            raise UserError(
                f"{table.where(row)}: the prompt is not in the messages that both answers begin with; leave it out, or "
                "write it as it is there."
            )
    return shared if shared[: len(turns)] == turns else [*turns, *shared]


def _paired(table: Table, chosen: Columns, rejected: Columns) -> Columns:
    """The columns of both sides together; one warning counts the pairs of equal answers."""
    name = "messages" if "messages" in chosen else "completion"
    common: Columns = {column: chosen[column] for column in ("id", "prompt", "template") if column in chosen}
    pairs = [list(pair) for pair in zip(chosen[name], rejected[name], strict=True)]
    same = sum(one == other for one, other in pairs)
    if same:
        warnings.warn(
            f"{table.origin}: in {same:,} of {len(table):,} rows both answers are the same, which teaches nothing.",
            stacklevel=3,
        )
    if name == "messages":
        shared = [_shared(pair) for pair in pairs]
        common["messages"] = [
            [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in one] for one in shared
        ]
        pairs = [[answer[len(turns) :] for answer in pair] for pair, turns in zip(pairs, shared, strict=True)]
    return {**common, "chosen": [pair[0] for pair in pairs], "rejected": [pair[1] for pair in pairs]}
