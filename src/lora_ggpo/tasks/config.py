"""What a task is: its settings, and the numbers it reports."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from lora_ggpo.errors import UserError
from lora_ggpo.models.load import TaskKind

LABEL_WORD_KINDS: tuple[TaskKind, ...] = ("causal-classification", "seq2seq-classification")
"""The kinds in which the model answers a prompt with the word of a label."""

PLAIN = "{text}"
"""The template that adds nothing."""

_PLACES = re.compile(r"\{(text|text_pair)\}")


def _default_template(fields: dict[str, Any]) -> str:
    return PLAIN if fields.get("kind") == "sft" else "{text}\nSentiment:"


def _default_length(fields: dict[str, Any]) -> int:
    """A prompt with its answer takes more room than a text with a label, and a cut completion teaches no end."""
    return 1024 if fields.get("kind") == "sft" else 128


class TaskConfig(BaseModel):
    """Settings of a task; they say how a row of data becomes tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: TaskKind = Field("classification", description="What the model learns.")
    template: str = Field(
        default_factory=_default_template,
        description="The prompt: {text} stands for the row's text (for sft its prompt), {text_pair} for the second "
        'text. Default: "{text}\\nSentiment:"; for sft "{text}". Kind classification has none.',
    )
    label_words: list[str] | None = Field(
        None,
        description="causal- and seq2seq-classification: one word or phrase for each label, in the labels' order; "
        "default: the label names.",
    )
    chat_template: bool = Field(
        False, description="Causal tasks: put the prompt in the tokenizer's chat template as a user turn."
    )
    max_length: int = Field(
        default_factory=_default_length,
        gt=0,
        description="Longest sequence, in tokens (of an encoder-decoder: the prompt); the text is cut to fit. "
        "Default: 128; for sft 1024.",
    )
    too_long: Literal["cut", "drop", "refuse"] = Field(
        "cut",
        description="sft: a row that is longer than max_length loses its end, or is left out, each with a warning that "
        "counts them; or such data is refused.",
    )
    packing: bool = Field(
        False,
        description="sft: training examples are put behind one another in rows of up to max_length tokens, none of "
        "which sees another; a batch then holds that many rows, not examples.",
    )

    @field_validator("template")
    @classmethod
    def _holds_text(cls, template: str, info: ValidationInfo) -> str:
        places = _PLACES.findall(template)
        if places.count("text") != 1:
            raise ValueError(f"the template must contain {{text}} exactly once, but it is {template!r}")
        if places.count("text_pair") > (0 if info.data.get("kind") == "sft" else 1):
            raise ValueError(
                f"the template may contain {{text_pair}} once, and not at all for sft, but it is {template!r}"
            )
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

    @property
    def takes_pair(self) -> bool:
        """Whether the template has a place for a second text."""
        return "{text_pair}" in self.template

    def fill(self, texts: Mapping[str, str]) -> str:
        """Return the template with the row's "text", and "text_pair" where it has one, in their places."""
        return _PLACES.sub(lambda place: texts[place[1]], self.template)

    def for_labels(self, labels: Sequence[str] | None) -> TaskConfig:
        """Return the settings with `label_words` filled in from the data's label names where none are given.

        Raises:
            UserError: the number of label words is not the number of labels.
        """
        if self.kind not in LABEL_WORD_KINDS or labels is None:
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
