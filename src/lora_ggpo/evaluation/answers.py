"""Answers to prompts, and the files of JSON lines that keep them as they come."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from lora_ggpo.errors import UserError
from lora_ggpo.workspace.files import json_digest, mend_json_lines, numbered_json_lines

Key = tuple[str, int]
"""An answer's prompt and the number of the sample."""


class Prompt(NamedTuple):
    """The tokens before an answer, and a name that no other prompt has."""

    id: str
    ids: list[int]

    @property
    def digest(self) -> str:
        """Differs for a prompt of another text."""
        return json_digest(self.ids)


@dataclass(frozen=True)
class Answer:
    """A generated text.

    Attributes:
        id, sample: Its prompt and number.
        prompt: Digest of the prompt.
        text: As generated; begins with a space where the model put one.
        tokens: Number of them, the end-of-text token included.
        finish: "stop" at an end-of-text token or a stop string, "length" at the longest answer.
    """

    id: str
    sample: int
    prompt: str
    text: str
    tokens: int
    finish: str

    @property
    def key(self) -> Key:
        return self.id, self.sample


_ANSWER = TypeAdapter(Answer)


class AnswerFile:
    """Answers by their keys, and a file with a line for each; None keeps them in memory alone.

    What is in the file stays. Only a last line that a crash has cut short is dropped.

    Raises:
        UserError: a line holds no answer; the file is as it was.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.answers: dict[Key, Answer] = {}
        for number, row in numbered_json_lines(path) if path else ():
            try:
                answer = _ANSWER.validate_python(row)
            except ValidationError as error:
                raise UserError(
                    f"{path}, line {number} is damaged: it holds no answer; mend that line or delete it."
                ) from error
            self.answers[answer.key] = answer
        if path and path.exists():
            mend_json_lines(path)

    def missing(self, prompts: Sequence[Prompt], samples: int) -> list[tuple[Prompt, int]]:
        """The prompts and numbers that have no answer yet.

        Raises:
            UserError: an answer that is there belongs to another prompt.
        """
        digests = {prompt.id: prompt.digest for prompt in prompts}
        for answer in self.answers.values():
            if digests.get(answer.id, answer.prompt) != answer.prompt:
                raise UserError(
                    f"{self._path} holds an answer to another prompt under the name {answer.id}: the data or the "
                    "template has changed; choose another --output."
                )
        return [(one, sample) for one in prompts for sample in range(samples) if (one.id, sample) not in self.answers]

    def add(self, answers: Iterable[Answer]) -> None:
        """Keep `answers`."""
        answers = list(answers)
        self.answers |= {answer.key: answer for answer in answers}
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers))
            file.flush()
            os.fsync(file.fileno())
