"""The number that a person reads as the answer."""

import json
from fractions import Fraction

import pytest

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation.gsm8k import extract, load_problems

READINGS = {
    "She has 3 + 4 = <<3+4=7>>7 apples.\n#### 7": 7,
    "#### 1,234": 1234,
    "#### -12": -12,
    "#### $18": 18,
    "#### -$3.50": Fraction(-7, 2),
    "#### $-3.50": Fraction(-7, 2),
    "#### 0.25": Fraction(1, 4),
    "#### .5": Fraction(1, 2),
    "#### 3/4": Fraction(3, 4),
    "#### 1 1/2": Fraction(3, 2),
    "#### 12,345,678.90": Fraction("12345678.9"),
    "####7": 7,
    "#### 70%": 70,
    "####\nThe answer is 8": 8,
    "#### unclear, 5 or so": 5,
    "The answer is: 42": 42,
    "He pays 3 times. The answer is 42.": 42,
    "The answer is $1,000.": 1000,
    "The final answer is **12** dollars, of the 30 he had.": 12,
    "the answer is \\boxed{15}": 15,
    "The answer is $\\frac{3}{4}$.": Fraction(3, 4),
    "The answer is \\$2{,}500": 2500,
    "The answer is 5 * 3 = 15.": 15,
    "The answer is x = -4": -4,
    "The answer is 3 hours.\nNo, the answer is 4 hours.": 4,
    "The answer is forty-two, that is 42": 42,
    "The answer is unknown.\nSo 9 it is.": 9,
    "The answer is 5/0": None,
    "5 apples and 6 pears make 11": 11,
    "It costs $1,200.50": Fraction("1200.5"),
    "Between 10-20": 20,
    "12 - 5": 5,
    "It sank to −7 degrees.": -7,
    "3, 4, 5.": 5,
    "Half: 1 / 2": Fraction(1, 2),
    "No number at all.": None,
    "": None,
}


@pytest.mark.parametrize("text", READINGS)
def test_the_number_an_answer_comes_to(text):
    assert extract(text) == READINGS[text]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_problems_of_a_file(tmp_path):
    rows = [{"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}, {"question": "Half?", "answer": "#### 1,000.5"}]
    problems = load_problems(write(tmp_path / "gsm.jsonl", rows))
    assert [(one.question, one.answer) for one in problems] == [("1 + 1?", 2), ("Half?", Fraction("1000.5"))]


def test_the_test_split_of_a_folder(tmp_path):
    write(tmp_path / "train.jsonl", [{"question": "no", "answer": "#### 1"}])
    write(tmp_path / "test.jsonl", [{"question": "yes", "answer": "#### 2"}])
    assert [one.question for one in load_problems(str(tmp_path))] == ["yes"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "2?", "answer": "2"}, r'gsm\.jsonl, line 2: answer: it must end in "#### " and a number; GSM8K'),
        (
            {"question": "2?", "answer": "1 + 1 = 2\n#### two"},
            r'gsm\.jsonl, line 2: answer: it must end in "#### " and a number',
        ),
        (
            {"question": "", "answer": "#### 2"},
            r"gsm\.jsonl, line 2: question: String should have at least 1",
        ),
        ({"question": "2?", "answer": 2}, r"gsm\.jsonl, line 2: answer: it must end in"),
    ],
)
def test_malformed_problems_are_named(row, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_problems(write(tmp_path / "gsm.jsonl", [{"question": "1?", "answer": "#### 1"}, row]))


def test_other_columns_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"line 1: question: Field required; GSM8K's format is a question, and"):
        load_problems(write(tmp_path / "gsm.jsonl", [{"prompt": "1?"}]))
