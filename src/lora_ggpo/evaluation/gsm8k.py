"""GSM8K (arXiv 2110.14168): word problems whose answer is a number, scored by exact match of that number."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, Field, TypeAdapter

from lora_ggpo.data.sources import ALL, read_tables
from lora_ggpo.evaluation.suite_run import SuiteRun
from lora_ggpo.statistics.measured import Scores, measure_mean

HUB, SUBSET = "openai/gsm8k", "main"
STOPS = ("\nQuestion:", "\nQ:")
"""Where a model without a chat template has begun the next problem."""

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-−][$€£]?)?"  # in 10-20 the hyphen is no sign
    r"(?:(?P<whole>\d+) (?=\d+/\d))?"  # 3 1/2
    rf"(?P<over>{_DIGITS})(?:\s?/\s?(?P<under>\d+))?"
)
_LONGEST = 1000  # characters: what repeats a digit for ever is no answer, and Python refuses to read it
_MARKS = (re.compile(r"####(.*)"), re.compile(r"\banswer\s+is\b(.*)", re.IGNORECASE))
_LATEX = ((re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2"), (re.compile(r"\{,\}|\\[,!]|(?<=\d)\\ "), ""))


def _final(answer: object) -> Fraction:
    _, mark, end = str(answer).rpartition("####")
    value = extract(mark + end) if mark else None
    if value is None:
        raise ValueError('it must end in "#### " and a number')
    return value


class Problem(BaseModel):
    """A question and the number that answers it."""

    question: str = Field(min_length=1)
    answer: Annotated[Any, AfterValidator(_final)]


def score(run: SuiteRun) -> Scores:
    """Exact match of the number; several samples of a problem are averaged first."""
    target, problems = run.target, load_problems(run.options.data)[: run.options.limit]
    texts = [target.conversation([one.question], []) for one in problems]
    prompts = [target.prompt(str(place), text) for place, text in enumerate(texts)]
    answers = run.generate(prompts, () if target.chat else STOPS)
    samples = range(run.sampling.samples)
    numbers = [[extract(answers[one.id, sample].text) for sample in samples] for one in prompts]
    run.keep_grades(
        {
            "id": prompt.id,
            "sample": sample,
            "right": number == problem.answer,
            "number": None if number is None else str(number),
            "answer": str(problem.answer),
        }
        for prompt, problem, found in zip(prompts, problems, numbers, strict=True)
        for sample, number in enumerate(found)
    )
    shares = [np.mean([number == one.answer for number in of]) for one, of in zip(problems, numbers, strict=True)]
    return {"gsm8k": {"accuracy": measure_mean(np.array(shares))}}


def load_problems(source: str | None) -> list[Problem]:
    """The problems of a file, a folder or a hub id in GSM8K's format: question, and answer with "#### 42" at its end.

    Args:
        source: None is openai/gsm8k on the hub. Of several splits the test split is taken.

    Raises:
        UserError: the source cannot be read, or a row (named by file and line) is not in that format.
    """
    source = source or HUB
    tables = read_tables(source, SUBSET if source == HUB else None)
    table = next(tables[split] for split in ("test", ALL, "validation", "train") if split in tables)
    return table.parse(TypeAdapter(Problem), 'GSM8K\'s format is a question, and an answer that ends in "#### 42"')


def extract(text: str) -> Fraction | None:
    """The number that an answer comes to: behind the last "####", else behind the last "answer is", else the last one.

    Behind a mark it is the first number of the line, or where the line has an equals sign, the first behind the last
    of them. Commas between thousands and signs of currency are no part of it; fractions, also 3 1/2 and LaTeX's, and
    decimals are exact.
    """
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    for mark in _MARKS:
        for line in reversed(mark.findall(text)):
            found = _NUMBER.search(line.rpartition("=")[2]) or _NUMBER.search(line)
            if found:
                return _value(found)
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _value(number: re.Match[str]) -> Fraction | None:
    if len(number[0]) > _LONGEST:
        return None
    over, under = Fraction(number["over"].replace(",", "")), Fraction(number["under"] or 1)
    if not under:
        return None
    value = Fraction(number["whole"] or 0) + over / under
    return -value if number["sign"] else value
