"""The table of tasks, and the settings of one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from lora_ggpo.tasks.base import Task
from lora_ggpo.tasks.choice import Choice
from lora_ggpo.tasks.classification import Classification
from lora_ggpo.tasks.dpo import DPO
from lora_ggpo.tasks.regression import Regression
from lora_ggpo.tasks.sft import SFT
from lora_ggpo.tasks.words import CausalClassification, Seq2SeqClassification

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "causal-classification": CausalClassification,
    "seq2seq-classification": Seq2SeqClassification,
    "regression": Regression,
    "sft": SFT,
    "choice": Choice,
    "dpo": DPO,
}
"""Tasks by the name that recipes give as ``task.kind``."""

_PLACES = re.compile(r"\{(text|text_pair)\}")


def _known(kind: str) -> str:
    if kind not in TASKS:
        raise ValueError(f"must be one of {', '.join(TASKS)}, not {kind!r}")
    return kind


def _of_kind(fields: Mapping[str, Any]) -> type[Task]:
    return TASKS[fields.get("kind", "classification")]


class TaskConfig(BaseModel):
    """Settings of a task; they say how a row of data becomes tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Annotated[str, AfterValidator(_known)] = Field(
        "classification",
        description="What the model learns.",
        json_schema_extra=lambda schema: schema.update(enum=list(TASKS)),
    )
    template: str = Field(
        default_factory=lambda fields: _of_kind(fields).default_template,
        description="The prompt: {text} stands for the row's text (its prompt, its question), {text_pair} for the "
        'second text. Default: "{text}\\nSentiment:"; for sft and dpo "{text}"; for choice "Question: {text}\\nAnswer: '
        '". Kind classification has none.',
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
        default_factory=lambda fields: _of_kind(fields).default_length,
        gt=0,
        description="Longest sequence, in tokens (of an encoder-decoder: the prompt); the text is cut to fit. "
        "Default: 128; for sft, choice and dpo 1024.",
    )
    too_long: Literal["cut", "drop", "refuse"] = Field(
        "cut",
        description="sft, dpo: a row that is longer than max_length loses its end, or is left out, each with a warning "
        "that counts them; or such data is refused.",
    )
    packing: bool = Field(
        False,
        description="sft, choice: training examples are put behind one another in rows of up to max_length tokens, "
        "none of which sees another; a batch then holds that many rows, not examples.",
    )

    beta: float = Field(
        0.1, gt=0, description="dpo: how much the model's distance from itself without the adapter counts."
    )

    @field_validator("template")
    @classmethod
    def _holds_text(cls, template: str, info: ValidationInfo) -> str:
        places = _PLACES.findall(template)
        if places.count("text") != 1:
            raise ValueError(f"the template must contain {{text}} exactly once, but it is {template!r}")
        if places.count("text_pair") > ("text_pair" in _of_kind(info.data).columns):
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
    def type(self) -> type[Task]:
        """The task, whatever the labels are."""
        return TASKS[self.kind]

    def for_labels(self, labels: list[str] | None) -> Task:
        """The task with these settings on data with these labels."""
        return self.type(self, labels)

    @property
    def takes_pair(self) -> bool:
        """Whether the template has a place for a second text."""
        return "{text_pair}" in self.template

    def fill(self, texts: Mapping[str, str]) -> str:
        """The template with the row's "text", and "text_pair" where it has one, in their places."""
        return _PLACES.sub(lambda place: texts[place[1]], self.template)
