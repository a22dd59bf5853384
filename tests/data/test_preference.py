"""Preferences in the forms in which they come: texts, and conversations with and without their prompt."""

import pytest

from lora_ggpo.data import DataConfig
from lora_ggpo.data.preference import PreferenceReader
from lora_ggpo.data.sources import read_tables
from lora_ggpo.errors import UserError
from tests.recipes import write_rows

ASKED = "Name a colour."
FIRST, SECOND = {"role": "user", "content": ASKED}, {"role": "user", "content": "Another."}
SYSTEM = {"role": "system", "content": "Be brief."}
RED, BLUE, GREY = ({"role": "assistant", "content": name} for name in ("Red.", "Blue.", "Grey."))


def said(turn, weight=None):
    return turn if weight is None else {**turn, "more": f'{{"weight": {weight}}}'}


@pytest.fixture
def read(tmp_path):
    """The first row of what the reader makes of rows like this one, without its id."""

    def read(row, **settings):
        rows = [{**row, "id": str(n)} for n in range(10)]
        source = write_rows(tmp_path / "data.jsonl", rows)
        reader = PreferenceReader(DataConfig(source=str(source), **settings))
        rows = reader.read_all(read_tables(str(source)))["all"]
        return {key: value for key, value in rows[0].items() if key != "id"}

    return read


def plain(messages):
    """Messages without the keys that are empty in them."""
    return [{key: value for key, value in turn.items() if value is not None} for turn in messages]


def test_texts(read):
    row = {"prompt": "Name a colour.", "chosen": " Blue.", "rejected": " Grey."}
    assert read(row) == row
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert read({names[name]: text for name, text in row.items()}, **names) == row


CHATS = {
    "TRL's explicit prompt": {"prompt": [SYSTEM, FIRST], "chosen": [BLUE], "rejected": [GREY]},
    "whole conversations": {"chosen": [SYSTEM, FIRST, BLUE], "rejected": [SYSTEM, FIRST, GREY]},
    "a system prompt in a column": {"system": "Be brief.", "prompt": ASKED, "chosen": "Blue.", "rejected": "Grey."},
    "a text before lists": {"system": "Be brief.", "prompt": ASKED, "chosen": [BLUE], "rejected": [GREY]},
}
CHATS["a text that is repeated"] = {"prompt": ASKED, **CHATS["whole conversations"]}
CHATS["a list that is repeated"] = {"prompt": [SYSTEM, FIRST], **CHATS["whole conversations"]}


@pytest.mark.parametrize("form", CHATS)
def test_conversations(read, form):
    found = {name: plain(turns) for name, turns in read(CHATS[form]).items()}
    assert found == {"messages": [SYSTEM, FIRST], "chosen": [BLUE], "rejected": [GREY]}


def test_answers_of_several_turns(read):
    """What both sides say is context, also where the assistant says it; what differs and all behind it is an answer."""
    row = {"chosen": [FIRST, RED, SECOND, BLUE], "rejected": [FIRST, RED, SECOND, GREY]}
    found = {name: plain(turns) for name, turns in read(row).items()}
    assert found == {"messages": [FIRST, said(RED, 0), SECOND], "chosen": [BLUE], "rejected": [GREY]}
    row = {"chosen": [FIRST, RED, SECOND, BLUE], "rejected": [FIRST, GREY, SECOND, BLUE]}
    found = {name: plain(turns) for name, turns in read(row).items()}
    assert found == {"messages": [FIRST], "chosen": [RED, SECOND, BLUE], "rejected": [GREY, SECOND, BLUE]}


def test_equal_answers_are_counted_once(read):
    with pytest.warns(UserWarning, match="in 10 of 10 rows both answers are the same, which teaches nothing"):
        found = read({"chosen": [FIRST, BLUE], "rejected": [FIRST, BLUE]})
    assert found == {"messages": [FIRST], "chosen": [BLUE], "rejected": [BLUE]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"has no column 'rejected'.* Name the column with data\.rejected"),
        ({"chosen": "a", "rejected": "b"}, r"has no column 'prompt'.* Name the column with data\.prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "line 1: column 'rejected' is empty"),
        ({"prompt": "a", "chosen": [BLUE], "rejected": "b"}, "line 1: chosen and rejected must both be lists"),
        (
            {"prompt": "Why?", "chosen": [FIRST, BLUE], "rejected": [FIRST, GREY]},
            "line 1: the prompt is not in the mess",
        ),
        ({"chosen": ["a", "b"], "rejected": ["a", "c"]}, "line 1: each message in 'prompt' must have"),
        ({"chosen": [FIRST, FIRST], "rejected": [FIRST, GREY]}, "line 1: column 'chosen' has no assistant message"),
    ],
)
def test_what_is_no_preference(read, row, message):
    with pytest.raises(UserError, match=message):
        read(row)


def test_prompts_stay_together(tmp_path):
    rows = [{"prompt": f"p{n % 10}", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(40)]
    splits = PreferenceReader.load(DataConfig(source=str(write_rows(tmp_path / "d.jsonl", rows))))
    sets = [set(split["prompt"]) for split in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 10
