"""The shapes of MetaMathQA, Code-Feedback and WizardLM, in small files."""

import json
import warnings

import datasets
import pytest

from lora_ggpo.data import CompletionReader, DataConfig
from lora_ggpo.errors import UserError

QUESTION, ANSWER = "What is {n} plus one?", "It is one more.\nThe answer is: {n}"


def chat(n, roles=("user", "assistant"), role="role", content="content"):
    return [{role: name, content: (ANSWER if i % 2 else QUESTION).format(n=n + i // 2)} for i, name in enumerate(roles)]


SHAPES = {
    "metamath": {"query": QUESTION, "response": ANSWER, "type": "GSM_FOBAR", "original_question": "Is it {n}?"},
    "code-feedback-filtered": {"query": QUESTION, "answer": ANSWER, "resource": "evolinstruct", "lang": "python"},
    "wizardlm": {"instruction": QUESTION, "output": ANSWER},
    "prompt-completion": {"prompt": QUESTION, "completion": ANSWER, "query": "no", "response": "no"},
}


def shaped(name, n):
    return {key: value.format(n=n) for key, value in SHAPES[name].items()}


@pytest.fixture
def save(tmp_path):
    """Write rows as "json", "jsonl" or "parquet" and return the path."""

    def write(rows, form="jsonl"):
        path = tmp_path / f"data.{form}"
        if form == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(str(path))
        elif form == "json":
            path.write_text(json.dumps(rows))
        else:
            path.write_text("\n".join(json.dumps(row) for row in rows))
        return str(path)

    return write


def load(source, **settings):
    splits = CompletionReader.load(DataConfig(source=source, **settings))
    return sorted((row for data in (splits.train, splits.validation, splits.test) for row in data), key=number)


def number(row):
    return int(row["id"].partition(":")[2])


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("name", SHAPES)
def test_columns_are_recognised(name, form, save):
    rows = load(save([shaped(name, n) for n in range(20)], form))
    assert [set(row) for row in rows] == [{"id", "prompt", "completion"}] * 20
    for n, row in enumerate(rows):
        assert row["prompt"] == QUESTION.format(n=n)
        assert row["completion"] == ANSWER.format(n=n)


def test_columns_that_are_named_win(save):
    rows = load(save([shaped("metamath", n) for n in range(20)]), prompt="original_question", completion="type")
    assert [row["prompt"] for row in rows] == [f"Is it {n}?" for n in range(20)]
    assert {row["completion"] for row in rows} == {"GSM_FOBAR"}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("column", "keys", "roles"),
    [
        ("messages", ("role", "content"), ("user", "assistant")),  # Code-Feedback
        ("conversations", ("from", "value"), ("human", "gpt")),  # WizardLM V2
    ],
)
def test_single_turns_of_conversations(column, keys, roles, form, save):
    long = [*roles, *roles]
    rows = [{"id": n, column: chat(n, long if n % 4 == 3 else roles, *keys)} for n in range(20)]
    path = save([{key: value for key, value in row.items() if key != "id"} for row in rows], form)
    whole = load(path)
    assert [len(row["messages"]) for row in whole] == [4 if n % 4 == 3 else 2 for n in range(20)]
    assert [turn["role"] for turn in whole[3]["messages"]] == ["user", "assistant"] * 2
    assert whole[3]["messages"][3]["content"] == ANSWER.format(n=4)
    with pytest.warns(UserWarning, match=r"data\.\w+: 5 of 20 conversations are left out") as caught:
        single = load(path, single_turn=True)
    assert len(caught) == 1
    kept = [n for n in range(20) if n % 4 != 3]
    assert [number(row) for row in single] == [n + 1 for n in kept]
    assert [row["prompt"] for row in single] == [QUESTION.format(n=n) for n in kept]
    assert [row["completion"] for row in single] == [ANSWER.format(n=n) for n in kept]


def test_nothing_is_said_where_every_conversation_is_a_single_turn(save):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load(save([{"messages": chat(n)} for n in range(20)]), single_turn=True)) == 20


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "x", "response": ""}, r"data\.jsonl, line 3: column 'response' is empty"),
        ({"query": None, "response": "y"}, r"data\.jsonl, line 3: column 'query' has no value"),
        ({"query": ["x"], "response": "y"}, r"data\.jsonl, line 3: column 'query' must hold text, .* list"),
    ],
)
def test_malformed_pairs_are_named(row, message, save):
    with pytest.raises(UserError, match=message):
        load(save([shaped("metamath", 0), shaped("metamath", 1), row]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hi"}, r"data\.jsonl, line 3: column 'messages' must hold a list of messages"),
        ({"messages": [{"role": "user"}]}, r'line 3: each message in \'messages\' must have "role" and "content"'),
        ({"messages": [{"role": "user", "content": "x"}]}, r"line 3: column 'messages' has no assistant message"),
        ({"messages": chat(0, ("user", "gnat"))}, r"line 3: the role 'gnat' in 'messages' is none of system, user"),
        (
            {"messages": [*chat(0), {"role": "user", "content": None}]},
            r"line 3: column 'messages\.content' has no value",
        ),
    ],
)
@pytest.mark.parametrize("single_turn", [False, True])
def test_malformed_conversations_are_named(row, message, single_turn, save):
    with pytest.raises(UserError, match=message):
        load(save([{"messages": chat(0)}, {"messages": chat(1)}, row]), single_turn=single_turn)


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (shaped("prompt-completion", 0), {"prompt": " "}, r"line 3: column 'prompt' is empty"),
        (shaped("prompt-completion", 0), {"completion": None}, r"line 3: column 'completion' has no value"),
        (shaped("code-feedback-filtered", 0), {"answer": 7}, r"line 3: column 'answer' must hold text, .* int 7"),
        (shaped("wizardlm", 0), {"instruction": ""}, r"line 3: column 'instruction' is empty"),
        (shaped("wizardlm", 0), {"output": {}}, r"line 3: column 'output' must hold text, .* dict"),
        ({**shaped("wizardlm", 0), "input": "x"}, {"input": ["x"]}, r"line 3: column 'input' must hold text, .* list"),
        (
            {"conversations": chat(0, ("human", "gpt"), "from", "value")},
            {"conversations": [{"role": "user", "content": "x"}]},
            r"line 3: each message in 'conversations' must have \"from\" and \"value\"",
        ),
        (
            {"conversations": chat(0, ("human", "gpt"), "from", "value")},
            {"conversations": chat(0, ("human", "robot"), "from", "value")},
            r"line 3: the role 'robot' in 'conversations' is none of",
        ),
        ({"messages": chat(0)}, {"messages": None}, r"line 3: column 'messages' must hold a list of messages"),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_every_shape_names_file_and_line(good, bad, message, form, save):
    message = message if form == "jsonl" else message.replace("line", "row")
    with pytest.raises(UserError, match=rf"data\.{form}, {message}"):
        load(save([good, good, {**good, **bad}], form))


def test_a_csv_file_names_the_line(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('prompt,completion\n"two\nlines",b\na,\n')
    with pytest.raises(UserError, match=r"data\.csv, line 4: column 'completion' is empty"):
        load(str(path))


def test_a_parquet_file_names_the_row(save):
    rows = [shaped("metamath", n) for n in range(3)]
    with pytest.raises(UserError, match=r"data\.parquet, row 3: column 'response' is empty"):
        load(save([*rows[:2], {**rows[2], "response": ""}], "parquet"))


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": \n')
    with pytest.raises(UserError, match=r"data\.jsonl, line 2: malformed JSON"):
        load(str(path))


def test_single_turn_needs_conversations_and_one_that_is_single(save):
    with pytest.raises(UserError, match=r"data\.single_turn is for conversations, but .*data\.jsonl has none"):
        load(save([shaped("wizardlm", n) for n in range(20)]), single_turn=True)
    long = [{"messages": chat(n, ("system", "user", "assistant"))} for n in range(20)]
    with pytest.raises(UserError, match=r"data\.jsonl has no conversation of one user and one assistant message"):
        load(save(long), single_turn=True)


# --- fields with a meaning for training ------------------------------------------------------------------------------

PAIR = shaped("prompt-completion", 0)
PAIR = {"prompt": PAIR["prompt"], "completion": PAIR["completion"]}


def turn(**fields):
    return {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", **fields}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**turn(), "prompt": "z", "completion": "w"}, r"column 'prompt' is not in 'messages', so it is not clear"),
        (
            {**turn(), "prompt": "x", "completion": "w"},
            r"column 'completion' is not in 'messages'",
        ),
        ({**turn(), "images": ["a.png"]}, r"column 'images' holds what is no text"),
        ({**PAIR, "label": False}, r"column 'label' is false, which marks what should not be said"),
        ({**PAIR, "history": ["a"]}, r"column 'history' must hold earlier turns as a list of \[prompt, answer\]"),
        ({**PAIR, "tools": ["look"]}, r"column 'tools' must hold the tools .* data\.ignore: \[tools\]"),
        ({**PAIR, "system": 3}, r"column 'system' must hold text"),
        ({"messages": [{"role": "system", "content": "a"}, *chat(0)], "system": "b"}, "two different system prompts"),
        ({**turn(), "chat_template_kwargs": "x"}, r"'chat_template_kwargs' must hold an object of arguments"),
        (turn(weight=0.5), r"'weight' of a message in 'messages' must be 0 or 1, or false or true, not 0\.5"),
        (turn(weight=0), r"column 'messages' has no assistant message to learn from"),
        (turn(train_detail=[{"begin_offset": 0}]), r"is to be learnt in parts \(train_detail\)"),
        (turn(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), r"a tool call in 'messages' must have a"),
        (turn(content=[{"type": "image_url"}]), r"'messages\.content' has a part that is no text \(image_url\)"),
        (
            {"conversations": [{"from": "function_call", "value": "look"}]},
            r"a tool call in 'conversations' must have a",
        ),
    ],
)
def test_what_would_be_learnt_wrongly_is_refused(row, message, save):
    good = {**{key: None for key in row if key != "label"}, **({"label": True} if "label" in row else {})}
    good |= {"messages": chat(0)} if "messages" in row else PAIR if "prompt" in row else {}
    good |= {"conversations": chat(0, ("human", "gpt"), "from", "value")} if "conversations" in row else {}
    with pytest.raises(UserError, match=rf"data\.jsonl, line 3: .*{message}"):
        load(save([good, good, row]))


def test_what_is_not_used_is_named_once_with_its_count(save):
    rows = [{**turn(), "rejected": "z", "weight": 0.5, "history": [["a", "b"]], "label": 3} for _ in range(3)]
    rows += [turn(channel="final") for _ in range(20)]
    rows[0]["messages"][0] |= {"train": True}
    with pytest.warns(UserWarning, match="not used") as caught:
        load(save([{**row, "id": f"x:{n}", "messages": [*row["messages"], *chat(n)]} for n, row in enumerate(rows)]))
    assert [str(one.message).partition(": not used for training, in so many rows: ")[2] for one in caught] == [
        "'channel' of messages in 'messages' (20), column 'history' (3), column 'rejected' (3), column 'weight' (3), "
        "the weight of messages in 'messages' that are not the assistant's (1)."
    ]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_empty_fields_change_nothing(form, save):
    """Alpaca files often have an empty system prompt and history in every row, and digests of earlier runs hold."""
    alpaca = [{**shaped("wizardlm", n), "input": "", "system": "", "history": []} for n in range(20)]
    assert load(save(alpaca, form)) == load(save([shaped("wizardlm", n) for n in range(20)], form))
    empty = {"tool_calls": None, "weight": None, "name": None, "reasoning_content": None}
    chats = [{"messages": [{**turn, **empty} for turn in chat(n)], "tools": None} for n in range(20)]
    rows = load(save(chats, form))
    assert rows == load(save([{"messages": chat(n)} for n in range(20)], form))
    assert rows[3] == {"id": rows[3]["id"], "messages": chat(3)}


def test_fields_that_mean_something_else_can_be_ignored(save):
    rows = [{**shaped("wizardlm", n), "system": n + 1, "tools": "a hammer"} for n in range(20)]
    with pytest.raises(UserError, match="column 'system' must hold text"):
        load(save(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [row["prompt"] for row in load(save(rows), ignore=["system", "tools"])] == [
            QUESTION.format(n=n) for n in range(20)
        ]
    with pytest.raises(UserError, match=r"has no column 'sytem', which data\.ignore names; leave it out"):
        load(save(rows), ignore=["sytem"])


def test_splits_of_which_one_has_a_system_prompt(tmp_path):
    for split, more in {"train": {"system": "be brief"}, "validation": {}, "test": {}}.items():
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(PAIR | more))
    splits = CompletionReader.load(DataConfig(source=str(tmp_path)))
    assert [[turn["role"] for turn in rows[0]["messages"]] for rows in (splits.train, splits.test)] == [
        ["system", "user", "assistant"],
        ["user", "assistant"],
    ]


def test_single_turns_are_of_text_alone(save):
    call = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows = [{"messages": chat(n)} for n in range(20)] + [turn(**call), {**turn(), "tools": [{"name": "f"}]}]
    with pytest.warns(UserWarning, match="2 of 22 conversations are left out"):
        assert len(load(save(rows), single_turn=True)) == 20
