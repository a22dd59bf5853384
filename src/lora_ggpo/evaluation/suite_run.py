"""One suite for one target: what every suite needs while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_ggpo.evaluation.answers import Answer, AnswerFile, Key, Prompt
from lora_ggpo.evaluation.generate import Sampling, generate
from lora_ggpo.evaluation.target import Target
from lora_ggpo.workspace.files import write_json_lines
from lora_ggpo.workspace.progress import Reporter


@dataclass(frozen=True)
class Options:
    """What the user asks for beside the suite; None is the suite's own choice. Named as on the command line."""

    data: str | None = None
    limit: int | None = None
    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    judge: str | None = None
    judge_model: str | None = None
    judge_prompts: str | None = None
    jobs: int | None = None
    chat: bool | None = None
    dtype: str | None = None
    template: str | None = None
    output: str | None = None


@dataclass(frozen=True)
class SuiteRun:
    """One suite for one target.

    Attributes:
        suite: As the user named it.
        folder: Of the results.
    """

    suite: str
    target: Target
    options: Options
    sampling: Sampling
    folder: Path
    reporter: Reporter

    @property
    def batch_size(self) -> int:
        return self.options.batch_size or 16

    @property
    def jobs(self) -> int:
        return self.options.jobs or 4

    def generate(self, prompts: Sequence[Prompt], stop: Sequence[str] = ()) -> dict[Key, Answer]:
        """Answers to `prompts`, kept in answers.jsonl."""
        kept, samples = AnswerFile(self.folder / "answers.jsonl"), self.sampling.samples
        with self.reporter.task(f"{self.suite} {self.target.name}") as shown:
            shown.begin(len(prompts) * samples - len(kept.missing(prompts, samples)))
            sampling = replace(self.sampling, stop=tuple(stop))
            return generate(self.target, prompts, sampling, kept, batch_size=self.batch_size, progress=shown.update)

    def keep_grades(self, grades: Iterable[Mapping[str, Any]]) -> None:
        """Write grades.jsonl, a line for each answer."""
        write_json_lines(self.folder / "grades.jsonl", grades)
