"""What a task is: its settings, and the numbers it reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lora_ggpo.errors import UserError
from lora_ggpo.models import TaskKind

TEXT_FIELD = "{text}"


class TaskConfig(BaseModel):
    """Settings of a task; they say how a row of data becomes tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: TaskKind = Field("classification", description="What the model learns.")
    template: str = Field(
        "{text}\nSentiment:",
        description="causal-classification: the prompt; {text} stands for the row's text.",
    )
    label_words: list[str] | None = Field(
        None,
        description="causal-classification: one word or phrase for each label, in the labels' order; "
        "default: the label names.",
    )
    chat_template: bool = Field(
        False, description="Causal tasks: put the prompt in the tokenizer's chat template as a user turn."
    )
    max_length: int = Field(128, gt=0, description="Longest sequence, in tokens; the text is cut to fit.")

    @field_validator("template")
    @classmethod
    def _holds_text(cls, template: str) -> str:
        if template.count(TEXT_FIELD) != 1:
            raise ValueError(f"the template must contain {TEXT_FIELD} exactly once, but it is {template!r}")
        return template

    @field_validator("label_words")
    @classmethod
    def _distinct(cls, words: list[str] | None) -> list[str] | None:
        if words is None:
            return None
        words = [word.strip() for word in words]
        if len(words) < 2 or "" in words or len(set(words)) < len(words):
            raise ValueError(f"label_words must be at least two different words, but they are {words}")
        return words

    def for_labels(self, labels: Sequence[str] | None) -> TaskConfig:
        """Return the settings with `label_words` filled in from the data's label names where none are given.

        Raises:
            UserError: the number of label words is not the number of labels.
        """
        if self.kind != "causal-classification" or labels is None:
            return self
        words = self.label_words or [label.strip() for label in labels]
        if len(words) != len(labels):
            raise UserError(
                f"task.label_words has {len(words)} entries, but the data has {len(labels)} labels: "
                f"{', '.join(labels)}; give one word for each label."
            )
        return self.model_copy(update={"label_words": words})


@dataclass(frozen=True)
class Metric:
    """A measured value, its standard error (nan where n is too small to tell) and the number of examples."""

    value: float
    se: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Return {"value", "se", "n"}, fit for JSON: what is not finite becomes None."""
        finite = {"value": self.value, "se": self.se}
        return {**{key: x if math.isfinite(x) else None for key, x in finite.items()}, "n": self.n}
