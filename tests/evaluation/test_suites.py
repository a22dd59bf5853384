"""Suites from problems to scores, on small models and runs of them."""

import json
import math
from dataclasses import replace

import pytest

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation import humaneval, suite_run
from lora_ggpo.evaluation.suite_run import Options
from lora_ggpo.evaluation.suites import evaluate_suite
from lora_ggpo.evaluation.target import load_target
from lora_ggpo.training.merge import merge_run
from lora_ggpo.workspace.progress import Reporter

from .test_judge import reply, serving

QUIET = Reporter(quiet=True)
SHORT = {"max_new_tokens": 6, "batch_size": 3}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Results of models go below the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def maths(tmp_path):
    path = tmp_path / "maths.jsonl"
    rows = [{"question": f"What is {n} plus one?", "answer": f"#### {n + 1}"} for n in range(6)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def says(monkeypatch):
    """Puts answers in the model's mouth: a function of the prompt's id and the sample."""

    def says(answer):
        real = suite_run.generate

        def generate(target, prompts, sampling, kept, **options):
            found = real(target, prompts, sampling, kept, **options)
            return {key: replace(one, text=answer(*key)) for key, one in found.items()}

        monkeypatch.setattr(suite_run, "generate", generate)

    return says


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(target, suite, **options):
    return evaluate_suite(str(target), suite, Options(**{**SHORT, **options}), QUIET)


def test_gsm8k_accuracy_and_its_standard_error(tiny_llama, maths, says, here):
    """4 of 6 right: s = sqrt(6 / 5 * 4/6 * 2/6), over sqrt(6)."""
    says(lambda id_, _: f"The answer is {int(id_) + 1 + (int(id_) > 3)}.")
    [scores] = run(tiny_llama, "gsm8k", data=maths)
    accuracy = scores["gsm8k"]["accuracy"]
    assert accuracy == {"value": pytest.approx(4 / 6), "se": pytest.approx(math.sqrt(4 / 6 * 2 / 6 / 5)), "n": 6}
    [folder] = (here / "runs" / "evaluation").iterdir()
    grades = lines(folder / "gsm8k" / "grades.jsonl")
    assert [grade["right"] for grade in grades] == [True] * 4 + [False] * 2
    assert grades[5] == {"id": "5", "sample": 0, "right": False, "number": "7", "answer": "6"}
    assert json.loads((folder / "gsm8k" / "scores.json").read_text())["evaluation"] == scores


def test_samples_of_a_problem_are_one_draw(tiny_llama, maths, says, here):
    """Two samples of each of 6 problems, right in both, one or none: the error is that of 6 rates."""
    says(lambda id_, sample: f"#### {int(id_) + 1}" if int(id_) % 3 + sample < 2 else "#### 0")
    [scores] = run(tiny_llama, "gsm8k", data=maths, samples=2, temperature=0.5)
    rates = [1.0, 0.5, 0.0] * 2
    se = math.sqrt(sum((rate - 0.5) ** 2 for rate in rates) / 5 / 6)
    assert scores["gsm8k"]["accuracy"] == {"value": pytest.approx(0.5), "se": pytest.approx(se), "n": 6}


def test_what_is_there_is_not_generated_again(tiny_llama, maths, here, monkeypatch):
    run(tiny_llama, "gsm8k", data=maths, limit=4)
    [folder] = (here / "runs" / "evaluation").iterdir()
    first = lines(folder / "gsm8k" / "answers.jsonl")
    assert [row["id"] for row in sorted(first, key=lambda row: row["id"])] == ["0", "1", "2", "3"]
    assert run(tiny_llama, "gsm8k", data=maths)[0]["gsm8k"]["accuracy"]["n"] == 6
    assert lines(folder / "gsm8k" / "answers.jsonl")[:4] == first
    monkeypatch.setattr(suite_run, "generate", lambda *args, **_: dict(args[3].answers))
    run(tiny_llama, "gsm8k", data=maths, batch_size=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"temperature": 0.7},
            r"holds an evaluation with other settings: temperature is 0.0 there and 0.7 here; choose",
        ),
        ({"max_new_tokens": 7}, r"max_new_tokens is 6 there and 7 here"),
        ({"dtype": "bfloat16"}, r"dtype is float32 there and bfloat16 here"),
        ({"template": "Q: {text}"}, r"template is \{text\} there and Q: \{text\} here"),
    ],
)
def test_other_settings_are_refused(tiny_llama, maths, change, message, here):
    run(tiny_llama, "gsm8k", data=maths, limit=1)
    with pytest.raises(UserError, match=message):
        run(tiny_llama, "gsm8k", data=maths, limit=1, **change)
    run(tiny_llama, "gsm8k", data=maths, limit=1, output="elsewhere", **change)
    assert (here / "elsewhere" / "gsm8k" / "scores.json").is_file()


def test_other_data_is_refused(tiny_llama, maths, here):
    run(tiny_llama, "gsm8k", data=maths, limit=1)
    other = here / "other.jsonl"
    other.write_text('{"question": "What?", "answer": "#### 1"}')
    with pytest.raises(UserError, match="holds an answer to another prompt under the name 0: the data or the template"):
        run(tiny_llama, "gsm8k", data=str(other))


def test_a_refused_command_claims_nothing(tiny_llama, maths, here):
    with pytest.raises(UserError, match="lower --max-new-tokens"):
        run(tiny_llama, "gsm8k", data=maths, max_new_tokens=10**6)
    run(tiny_llama, "gsm8k", data=maths, max_new_tokens=4)


def test_a_finished_measurement_holds_its_folder(tiny_llama, maths, here):
    """As after a kill between the harness's measurement and its scores."""
    run(tiny_llama, "gsm8k", data=maths, limit=1, output="o")
    folder = here / "o" / "gsm8k"
    for name in ("answers.jsonl", "grades.jsonl", "scores.json"):
        (folder / name).unlink()
    (folder / "measured-0.json").write_text("{}")
    with pytest.raises(UserError, match="max_new_tokens is 6 there and 5 here"):
        run(tiny_llama, "gsm8k", data=maths, limit=1, output="o", max_new_tokens=5)


def test_every_seed_of_a_run_has_its_own_results(chat_runs, maths, here):
    scores = run(chat_runs, "gsm8k", data=maths, limit=2)
    assert len(scores) == 2
    settings = [
        json.loads((chat_runs / f"seed-{n}" / "evaluation" / "gsm8k" / "settings.json").read_text()) for n in (0, 1)
    ]
    assert settings[0]["weights"] != settings[1]["weights"]
    assert settings[0]["chat"]
    run(chat_runs, "gsm8k", data=maths, limit=2, output="out")
    assert {path.name for path in (here / "out").iterdir()} == {"seed-0", "seed-1"}


def test_a_merged_model_answers_as_its_run(chat_runs, maths, here):
    merge_run(chat_runs / "seed-0", here / "merged")
    run(chat_runs / "seed-0", "gsm8k", data=maths, output="run")
    run("merged", "gsm8k", data=maths, output="merged-results")
    answers = [
        {row["id"]: row for row in lines(here / name / "gsm8k" / "answers.jsonl")} for name in ("run", "merged-results")
    ]
    assert answers[0] == answers[1]


def test_a_run_is_asked_as_it_was_trained(chat_runs, chat_llama, tiny_llama):
    run_, model, plain = (load_target(str(name)) for name in (chat_runs / "seed-0", chat_llama, tiny_llama))
    messages = [{"role": "user", "content": "hi"}]
    assert run_.conversation(["hi"], []) == model.conversation(["hi"], []) == messages
    assert plain.conversation(["hi"], []) == load_target(chat_llama, chat=False).conversation(["hi"], []) == "hi"
    wrapped = load_target(tiny_llama, template="Q: {text}\nA: ")
    assert wrapped.conversation(["hi", "ho"], [" yes "]) == "Q: hi\nA: yes\n\nQ: ho\nA:"
    both = model.conversation(["hi", "ho"], ["yes"], "Be kind.")
    assert [(one["role"], one["content"]) for one in both] == [
        ("system", "Be kind."),
        ("user", "hi"),
        ("assistant", "yes"),
        ("user", "ho"),
    ]
    shown = run_.tokenizer.decode(run_.prompt("x", messages).ids)
    assert shown.replace(" ", "") == "<user>hi\n<assistant>"


@pytest.mark.parametrize(
    ("suite", "options", "message"),
    [
        ("gsm9k", {}, "Suite 'gsm9k' is unknown; the suites are gsm8k, humaneval, mt-bench, harness:TASK"),
        ("harness", {}, "Suite 'harness' is unknown"),
        ("gsm8k:x", {}, "Suite 'gsm8k:x' is unknown"),
        ("gsm8k", {"judge_model": "m"}, "--judge-model is not for suite gsm8k; leave it out"),
        ("mt-bench", {"samples": 2, "temperature": 1.0}, "--samples is not for suite mt-bench"),
        ("gsm8k", {"samples": 2}, "--samples needs a --temperature above 0"),
        ("gsm8k", {"chat": True}, "has no chat template; leave out --chat"),
        ("gsm8k", {"template": "no place"}, "--template: the template must contain {text} exactly once"),
        ("mt-bench", {}, "mt-bench needs a judge: give --judge URL --judge-model NAME"),
        ("mt-bench", {"judge": "http://x"}, "--judge http://x needs --judge-model, its name there"),
        ("mt-bench", {"judge": "x", "judge_model": "m"}, "--judge x is no http:// address, so leave out --judge-model"),
    ],
)
def test_what_cannot_be_is_refused(suite, options, message, tiny_llama, here):
    with pytest.raises(UserError) as caught:
        run(tiny_llama, suite, **options)
    assert message in str(caught.value)


def test_a_run_of_another_task_is_refused(finished):
    with pytest.raises(UserError, match="is a run of task classification, which answers nothing; give one of task sft"):
        run(finished[1].folder, "gsm8k")
    with pytest.raises(UserError, match=r"--template is for models, but .* is a run"):
        run(finished[1].folder, "gsm8k", template="{text}")


# --- HumanEval -----------------------------------------------------------------------------------------------------

CODE = [
    {
        "task_id": f"HumanEval/{n}",
        "prompt": f'def f{n}(x):\n    """Add {n}."""\n',
        "entry_point": f"f{n}",
        "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
    }
    for n in range(3)
]


@pytest.fixture
def code(monkeypatch):
    """Three problems, and a check that only compares text; returns what was checked."""
    checked = []

    def check(problems, answers, jobs=1, progress=lambda *_: None):
        checked.append([list(of) for of in answers])
        return [[answer == "right" for answer in of] for of in answers]

    monkeypatch.setattr(humaneval, "load_problems", lambda: CODE)
    monkeypatch.setattr(humaneval, "check_answers", check)
    return checked


def test_humaneval_pass_at_k(tiny_llama, code, says, here):
    """12 samples of which 12, 3 and none are right: pass@1 = 1, 1/4, 0; pass@10 = 1, 1 - C(9, 10) / C(12, 10), 0."""
    says(lambda id_, sample: "right" if sample < {"0": 12, "1": 3, "2": 0}[id_[-1]] else "wrong")
    [scores] = run(tiny_llama, "humaneval", samples=12, temperature=0.8)
    assert set(scores["humaneval"]) == {"pass@1", "pass@10"}
    assert scores["humaneval"]["pass@1"]["value"] == pytest.approx((1 + 0.25 + 0) / 3)
    assert scores["humaneval"]["pass@10"]["value"] == pytest.approx(2 / 3)
    spread = math.sqrt(sum((rate - 1.25 / 3) ** 2 for rate in (1, 0.25, 0)) / 2 / 3)
    assert scores["humaneval"]["pass@1"]["se"] == pytest.approx(spread)
    assert code[0] == []  # the check is tried before anything is generated


def test_humaneval_continues_code_or_asks_for_it(tiny_llama, chat_llama, code, here, monkeypatch):
    seen = []
    real = suite_run.generate

    def generate(target, prompts, sampling, *rest, **options):
        seen.append((target.tokenizer.decode(prompts[0].ids, skip_special_tokens=True), sampling.stop))
        return real(target, prompts, sampling, *rest, **options)

    monkeypatch.setattr(suite_run, "generate", generate)
    run(tiny_llama, "humaneval")
    run(chat_llama, "humaneval")
    run(tiny_llama, "humaneval", template="Q: {text}\nA: ", output="asked")
    assert seen[0] == (CODE[0]["prompt"], humaneval.STOPS)
    assert [stop for _, stop in seen[1:]] == [(), ()]
    assert all("Complete this Python function." in text and CODE[0]["prompt"] in text for text, _ in seen[1:])


# --- MT-Bench ------------------------------------------------------------------------------------------------------


@pytest.fixture
def talks(tmp_path):
    path = tmp_path / "question.jsonl"
    rows = [{"question_id": n, "category": "writing", "turns": [f"Write {n}.", "Again."]} for n in range(3)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_mtbench_with_a_server(chat_llama, talks, here):
    """Question n gets 2 n + 2 in its first turn, 5 in its second, and the judge of question 2 forgets a rating."""

    def judge(_, body):
        text = body["messages"][1]["content"]
        n = int(text.partition("Write ")[2][0])
        return reply("Hm." if n == 2 and "Again." in text else f"[[{5 if 'Again.' in text else 2 * n + 2}]]")

    with serving(judge) as (url, requests):
        options = {"data": talks, "judge": url, "judge_model": "gpt-x"}
        [scores] = run(chat_llama, "mt-bench", **options)
        assert len(requests) == 5 + 3
        assert run(chat_llama, "mt-bench", **options) == [scores]
        assert len(requests) == 5 + 3
    assert scores["mt-bench"]["score"]["value"] == pytest.approx((3.5 + 4.5 + 6) / 3)
    assert scores["mt-bench"]["first turn"]["value"] == pytest.approx(4.0)
    assert scores["mt-bench"]["second turn"] == {"value": 5.0, "se": 0.0, "n": 2}
    [folder] = (here / "runs" / "evaluation").iterdir()
    assert (folder / "mt-bench" / "answers.jsonl").is_file()
    assert len(list((folder / "mt-bench").glob("judgements-gpt-x-*.jsonl"))) == 1
    answers = {row["id"]: row["text"] for row in lines(folder / "mt-bench" / "answers.jsonl")}
    asked = next(one["body"]["messages"][1]["content"] for one in requests if "Write 1." in str(one["body"]))
    assert answers["1:1"].strip() in asked
    assert "secret" not in (folder / "mt-bench" / "scores.json").read_text()


def test_judges_of_one_name_are_told_apart(chat_llama, talks, here):
    for rating in (5, 9):
        with serving(lambda *_, rating=rating: reply(f"[[{rating}]]")) as (url, requests):
            [scores] = run(chat_llama, "mt-bench", data=talks, judge=url, judge_model="m")
            assert scores["mt-bench"]["score"]["value"] == rating
            assert len(requests) == 6


def test_the_second_turn_follows_the_first_answer(chat_llama, talks, says, here, monkeypatch):
    says(lambda id_, _: f"answer {id_}")
    seen = {}
    real = suite_run.generate

    def generate(target, prompts, *rest, **options):
        seen.update({one.id: target.tokenizer.decode(one.ids) for one in prompts})
        return real(target, prompts, *rest, **options)

    monkeypatch.setattr(suite_run, "generate", generate)
    with serving(lambda *_: reply("[[4]]")) as (url, _):
        run(chat_llama, "mt-bench", data=talks, judge=url, judge_model="m")
    assert seen["1:2"].replace(" ", "") == "<user>Write1.\n<assistant>answer1:1</s><user>Again.\n<assistant>"


def test_mtbench_with_a_model_as_its_judge(chat_llama, chat_runs, talks, here, monkeypatch):
    """A small random model rates nothing, and says so; with a rating in its mouth there are scores."""
    monkeypatch.setattr("lora_ggpo.evaluation.judge._MAX_TOKENS", 4)
    with pytest.raises(UserError, match="The judge gave no rating at all; choose another one"):
        run(chat_llama, "mt-bench", data=talks, judge=str(chat_runs / "seed-0"))
    [file] = here.rglob("judgements-*.jsonl")
    rows = lines(file)
    assert len(rows) == 6
    file.write_text("".join(json.dumps({**row, "text": "[[8]]"}) + "\n" for row in rows))
    [scores] = run(chat_llama, "mt-bench", data=talks, judge=str(chat_runs / "seed-0"))
    assert scores["mt-bench"]["score"] == {"value": 8.0, "se": 0.0, "n": 3}
