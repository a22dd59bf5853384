import math

import pytest
from pydantic import ValidationError

from lora_ggpo.errors import UserError
from lora_ggpo.tasks import Measured, TaskConfig


def test_label_words_default_to_the_label_names():
    assert TaskConfig(kind="causal-classification").for_labels(["bad", " good"]).words == ["bad", "good"]
    chosen = TaskConfig(kind="causal-classification", label_words=["poor", "great"])
    assert chosen.for_labels(["bad", "good"]).words == ["poor", "great"]


def test_label_words_must_match_the_labels():
    config = TaskConfig(kind="causal-classification", label_words=["a", "b", "c"])
    with pytest.raises(UserError, match="has 3 entries, but the data has 2 labels: bad, good"):
        config.for_labels(["bad", "good"])


def test_seq2seq_has_label_words_too():
    assert TaskConfig(kind="seq2seq-classification").for_labels(["bad", "good"]).words == ["bad", "good"]


def test_template_by_kind():
    assert TaskConfig(kind="sft").template == "{text}"
    assert TaskConfig(kind="seq2seq-classification").template == "{text}\nSentiment:"
    config = TaskConfig(kind="causal-classification", template="1: {text} 2: {text_pair}")
    assert config.takes_pair
    assert config.fill({"text": "{text_pair} \\1", "text_pair": "{text}"}) == "1: {text_pair} \\1 2: {text}"


def test_length_by_kind():
    assert TaskConfig(kind="sft").max_length == 1024
    assert TaskConfig(kind="sft", max_length=128).max_length == 128  # as a run of an earlier release spells it
    assert {TaskConfig(kind=kind).max_length for kind in ("classification", "causal-classification")} == {128}


def test_sft_has_one_text():
    with pytest.raises(ValidationError, match="not at all for sft"):
        TaskConfig(kind="sft", template="{text} {text_pair}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"template": "no place"}, "must contain {text} exactly once"),
        ({"template": "{text_pair}"}, "must contain {text} exactly once"),
        ({"template": "{text} {text_pair} {text_pair}"}, "may contain {text_pair} once"),
        ({"template": "{text} {text}"}, "must contain {text} exactly once"),
        ({"label_words": ["a", " a"]}, "two different words"),
        ({"label_words": ["a", ""]}, "two different words"),
        ({"max_length": 0}, "greater than 0"),
        ({"templte": "x"}, "not permitted"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(ValidationError, match=message):
        TaskConfig(kind="causal-classification", **fields)


def test_a_measured_value_is_json_without_nan():
    assert Measured(0.5, 0.1, 25).to_dict() == {"value": 0.5, "se": 0.1, "n": 25}
    assert Measured(math.inf, math.nan, 1).to_dict() == {"value": None, "se": None, "n": 1}
