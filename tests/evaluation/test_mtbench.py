"""Questions in FastChat's format, what the judge is asked, and means of ratings worked out by hand."""

import json
import math

import pytest

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation.mtbench import (
    PROMPTS,
    JudgePrompt,
    judge_question,
    load_problems,
    metrics,
    rating,
    read_prompts,
)

ROWS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again {answer_1}."]},
    {"question_id": 111, "category": "math", "turns": ["2 + 2?", "And 3?"], "reference": ["4", "7"]},
    {"question_id": 95, "category": "roleplay", "turns": ["Be.", "Not."], "reference": ["to", ""]},
]


@pytest.fixture
def write(tmp_path):
    def write(rows, name="question.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return path

    return write


def test_questions(write):
    problems = load_problems(str(write(ROWS)))
    assert [one.id for one in problems] == ["81", "111", "95"]
    assert problems[0].turns == ("Write.", "Again {answer_1}.")
    assert [one.reference for one in problems] == [None, ("4", "7"), ("to", "")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turns": ["one"]}, r"question\.jsonl, line 2: turns\.1: Field required"),
        ({"turns": "one"}, r"question\.jsonl, line 2: turns: Input should be a valid tuple"),
        ({"turns": ["one", ""]}, r"question\.jsonl, line 2: turns\.1: String should have at least 1 character"),
        ({"category": None}, r"question\.jsonl, line 2: category: Input should be a valid string"),
        ({"reference": "7"}, r"question\.jsonl, line 2: reference: Input should be a valid tuple"),
        ({"question_id": 81}, r"question\.jsonl has the same question_id twice"),
        (
            {"question_id": "\ud800"},
            r"question\.jsonl, line 2: question_id: .* unable to parse raw data",
        ),
        (
            {"reference": ["\ud800", ""]},
            r"question\.jsonl, line 2: reference\.0: .* unable to parse raw data",
        ),
    ],
)
def test_malformed_questions_are_named(change, message, write):
    with pytest.raises(UserError, match=message):
        load_problems(str(write([ROWS[0], {**ROWS[1], **change}])))


def test_a_file_of_another_kind_or_none(write):
    with pytest.raises(UserError, match=r"line 1: question_id: Field required; mt-bench takes FastChat's"):
        load_problems(str(write([{"prompt": "x"}])))
    with pytest.raises(UserError, match=r"mt-bench needs its questions: give FastChat's .*question\.jsonl as --data"):
        load_problems(None)


OURS = read_prompts()


def test_what_the_judge_is_asked(write):
    writing, math_, roleplay = load_problems(str(write(ROWS)))
    question = judge_question(writing, [" First {question_2}. ", "Second."], 1, OURS)
    system, user = (message["content"] for message in question.messages)
    assert question.id == "81:1"
    assert "[[rating]]" in system
    assert "reference" not in system
    assert user.index("Write.") < user.index("First {question_2}.\n")  # an answer's braces stay as they are
    assert "Second." not in user
    second = judge_question(writing, ["First.", "Second."], 2, OURS).messages
    places = [second[1]["content"].index(text) for text in ("Write.", "First.", "Again {answer_1}.", "Second.")]
    assert places == sorted(places)
    assert "second question" in second[0]["content"]
    for turn, texts in ((1, ["4"]), (2, ["4", "7"])):
        system, user = (one["content"] for one in judge_question(math_, ["5", "8"], turn, OURS).messages)
        assert "reference answer" in system
        assert all(f"{text}\n" in user for text in texts)
    assert "reference" not in judge_question(roleplay, ["a", "b"], 1, OURS).messages[1]["content"]  # as FastChat does


def test_every_place_of_the_prompts_is_filled(write):
    for problem in load_problems(str(write([{**row, "turns": ["x", "y"]} for row in ROWS]))):
        for turn in (1, 2):
            assert "{" not in judge_question(problem, ["a", "b"], turn, OURS).messages[1]["content"]


def test_prompts_of_a_file(write):
    rows = [
        {"name": name, "system_prompt": "Judge.\n\n", "prompt_template": "Q {question} A {answer}"} for name in PROMPTS
    ]
    rows.append({"name": "pair-v2", "system_prompt": "x", "prompt_template": "y"})
    prompts = read_prompts(write(rows, "judge_prompts.jsonl"))
    assert prompts["single-v1"] == JudgePrompt.model_validate(rows[0])
    problem = load_problems(str(write(ROWS)))[0]
    assert [one["content"] for one in judge_question(problem, ["a", "b"], 1, prompts).messages] == [
        "Judge.",
        "Q Write. A a",
    ]
    with pytest.raises(UserError, match=r"has no prompt single-v1-multi-turn; give FastChat's judge_prompts\.jsonl"):
        read_prompts(write([row for row in rows if row["name"] != "single-v1-multi-turn"], "p.jsonl"))
    with pytest.raises(UserError, match=r"line 1: system_prompt: Field required"):
        read_prompts(write([{"name": "x"}], "q.jsonl"))
    half = {"name": "x", "system_prompt": "", "prompt_template": "\ud83d"}
    with pytest.raises(UserError, match=r"line 2: prompt_template: .* unable to parse raw data as a unicode"):
        read_prompts(write([rows[0], half], "r.jsonl"))


@pytest.mark.parametrize(
    ("judgement", "expected"),
    [
        ("Fine. Rating: [[7]]", 7),
        ("[[8.5]] and [[3]]", 8.5),
        ("Rating: [6]", 6),
        ("[1] is a footnote. [[9]]", 9),
        ("[[10]]", 10),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[rating]]", None),
        ("7", None),
        ("", None),
    ],
)
def test_ratings(judgement, expected):
    assert rating(judgement) == expected


def test_means(write):
    problems = load_problems(str(write(ROWS)))
    found = metrics(problems, [(8.0, 6.0), (3.0, None), (None, None)])
    assert set(found) == {"mt-bench", "mt-bench writing", "mt-bench math"}
    score = found["mt-bench"]["score"]
    assert (score.value, score.n) == (5.0, 2)
    assert score.se == pytest.approx(2.0)  # of 7 and 3: s = sqrt(8), over sqrt(2)
    assert found["mt-bench"]["first turn"].value == 5.5
    assert (found["mt-bench"]["second turn"].value, found["mt-bench"]["second turn"].n) == (6.0, 1)
    assert math.isnan(found["mt-bench"]["second turn"].se)
    assert found["mt-bench writing"]["score"].value == 7.0
    assert "second turn" not in found["mt-bench math"]
