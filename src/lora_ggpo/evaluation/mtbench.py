"""MT-Bench (arXiv 2306.05685): questions of two turns, whose answers a judge rates from 1 to 10."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from lora_ggpo.data.files import read_file
from lora_ggpo.errors import UserError
from lora_ggpo.evaluation.answers import Prompt
from lora_ggpo.evaluation.judge import Question, ask_judge, find_server
from lora_ggpo.evaluation.suite_run import SuiteRun
from lora_ggpo.statistics.measured import Measured, Scores, measure_mean

OUR_PROMPTS = Path(__file__).with_name("judge_prompts.jsonl")
PROMPTS = tuple(f"single{kind}-v1{turn}" for turn in ("", "-multi-turn") for kind in ("", "-math"))
"""FastChat's names of the prompts that are needed."""

WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories whose judge sees a reference answer where the question has one."""

Rating = float | None
_Any = Annotated[str, Field(min_length=0)]  # a limit, even this, keeps out what no file can hold
_Text = Annotated[str, Field(min_length=1)]


class JudgePrompt(BaseModel):
    """What a judge is told; {question_1}, {answer_1}, {ref_answer_1} and so on stand for the texts."""

    name: str
    system_prompt: _Any | None
    prompt_template: _Text


class Problem(BaseModel):
    """A question of two turns, and reference answers to them, if any; one of the two may be empty."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    id: str = Field(alias="question_id", min_length=1)
    category: _Text
    turns: tuple[_Text, _Text]
    reference: tuple[_Any, _Any] | None = None


def score(run: SuiteRun) -> Scores:
    """Mean ratings of the judge, by turn and category."""
    server = find_server(run.options)  # what is wrong with it is said before hours of generation
    prompts = read_prompts(Path(run.options.judge_prompts or OUR_PROMPTS))
    problems = load_problems(run.options.data)[: run.options.limit]
    first = {id_: answer.text for (id_, _), answer in run.generate(_turns(run, problems, {})).items()}
    second = {id_: answer.text for (id_, _), answer in run.generate(_turns(run, problems, first)).items()}
    answers = {one.id: [first[f"{one.id}:1"], second[f"{one.id}:2"]] for one in problems}
    asked = [judge_question(one, answers[one.id], turn, prompts) for one in problems for turn in (1, 2)]
    judgements = ask_judge(run, server, asked)
    ratings = {question.id: rating(judgements[question.id, 0].text) for question in asked}
    run.keep_grades({"id": id_, "rating": value} for id_, value in ratings.items())
    missing = sum(value is None for value in ratings.values())
    if missing:
        run.reporter.say(f"{missing} of {len(ratings)} judgements have no rating from 1 to 10 and are left out.")
    if missing == len(ratings):
        raise UserError("The judge gave no rating at all; choose another one.")
    return metrics(problems, [(ratings[f"{one.id}:1"], ratings[f"{one.id}:2"]) for one in problems])


def _turns(run: SuiteRun, problems: Sequence[Problem], first: Mapping[str, str]) -> list[Prompt]:
    """Prompts of the first turn, or with its answers, of the second."""
    turn, target = 2 if first else 1, run.target
    texts = [target.conversation(one.turns[:turn], [first[f"{one.id}:1"]] if first else []) for one in problems]
    return [target.prompt(f"{one.id}:{turn}", text) for one, text in zip(problems, texts, strict=True)]


def load_problems(source: str | None) -> list[Problem]:
    """The questions of a file in FastChat's format: question_id, category, turns, and some with reference.

    Raises:
        UserError: no file is given, or a row (named by file and line) is not in that format.
    """
    if source is None:
        raise UserError(
            "mt-bench needs its questions: give FastChat's llm_judge/data/mt_bench/question.jsonl as --data."
        )
    problems = read_file(Path(source)).parse(TypeAdapter(Problem), "mt-bench takes FastChat's question.jsonl")
    if len({problem.id for problem in problems}) < len(problems):
        raise UserError(f"{source} has the same question_id twice; give each question its own.")
    return problems


def read_prompts(path: Path = OUR_PROMPTS) -> dict[str, JudgePrompt]:
    """The judge's prompts of a file in the format of FastChat's judge_prompts.jsonl; by default ours.

    Raises:
        UserError: the file cannot be read, holds what is not text, or lacks one of `PROMPTS`.
    """
    rows = read_file(path).parse(TypeAdapter(JudgePrompt), "give FastChat's judge_prompts.jsonl")
    prompts = {row.name: row for row in rows}
    missing = next((name for name in PROMPTS if name not in prompts), None)
    if missing:
        raise UserError(f"{path} has no prompt {missing}; give FastChat's judge_prompts.jsonl.")
    return prompts


def judge_question(problem: Problem, answers: Sequence[str], turn: int, prompts: Mapping[str, JudgePrompt]) -> Question:
    """Ask for the rating of turn 1 or 2 of the `answers` to `problem`."""
    reference = problem.reference if problem.category in WITH_REFERENCE else None
    name = f"single{'-math' if reference else ''}-v1{'-multi-turn' if turn == 2 else ''}"
    texts = {f"question_{n}": text for n, text in enumerate(problem.turns, 1)}
    texts |= {f"answer_{n}": text.strip() for n, text in enumerate(answers, 1)}
    texts |= {f"ref_answer_{n}": text for n, text in enumerate(reference or [], 1)}
    texts |= {"question": texts["question_1"], "answer": texts["answer_1"]}
    user = re.sub(r"\{(\w+)\}", lambda place: texts.get(place[1], place[0]), prompts[name].prompt_template)
    system = (prompts[name].system_prompt or "").strip()
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return Question(f"{problem.id}:{turn}", messages, lambda text: rating(text) is not None)


def rating(judgement: str) -> Rating:
    """The first "[[rating]]" in the judge's words, or the first "[rating]" without one; None if it is not 1 to 10."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", judgement) or re.search(r"\[(\d+\.?\d*)\]", judgement)
    value = float(found[1]) if found else 0.0
    return value if 1 <= value <= 10 else None


def metrics(problems: Sequence[Problem], ratings: Sequence[tuple[Rating, Rating]]) -> dict[str, dict[str, Measured]]:
    """Mean ratings of all questions and of each category, with standard errors over questions.

    "score" is the mean of a question's turns. Turns without a rating are left out.
    """
    names = {"mt-bench": list(range(len(problems)))}
    for index, problem in enumerate(problems):
        names.setdefault(f"mt-bench {problem.category}", []).append(index)
    sets = {name: _means([ratings[index] for index in chosen]) for name, chosen in names.items()}
    return {name: of for name, of in sets.items() if of}


def _means(ratings: Sequence[tuple[Rating, Rating]]) -> dict[str, Measured]:
    columns = {
        "score": [float(np.mean(given)) for pair in ratings if (given := [one for one in pair if one is not None])],
        "first turn": [first for first, _ in ratings if first is not None],
        "second turn": [second for _, second in ratings if second is not None],
    }
    return {name: measure_mean(np.asarray(values)) for name, values in columns.items() if values}
