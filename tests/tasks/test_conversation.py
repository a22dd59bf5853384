"""What is learnt of a conversation, against what transformers makes of the whole row and marks as the assistant's."""

import json
import warnings

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from lora_ggpo.data import CompletionReader, DataConfig
from lora_ggpo.errors import UserError
from lora_ggpo.tasks.pack import pack
from tests.tasks.make import task

CONFIG = task(kind="sft", max_length=2000)
CALLS = (
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }}{{ call.function.arguments | tojson }}"
    "{% endfor %}"
)
# ChatML that uses every field, and marks what the assistant says as transformers asks for it.
WHOLE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}"
    "{% if message.reasoning_content %}[{{ message.reasoning_content }}]{% endif %}{{ message.content }}"
    + CALLS
    + "<|im_end|>"
    "{% endgeneration %}{{ '\n' }}"
    "{% else %}{% if message.name %}({{ message.name }}){% endif %}{{ message.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What most small models have: roles and contents.
PLAIN = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% generation %}{{ message.content }}"
    "<|im_end|>{% endgeneration %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# DeepSeek-R1's distilled models and QwQ: the generation prompt opens a thought, and thoughts are left out of turns.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)

SYSTEM, USER = {"role": "system", "content": "be brief"}, {"role": "user", "content": "how is it"}
GOOD, BAD = {"role": "assistant", "content": "it is good"}, {"role": "assistant", "content": "it is bad"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "id": "1", "function": {"name": "look", "arguments": {"film": "a", "year": None}}}
CALLING = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "name": "look", "content": "four"}, GOOD]


@pytest.fixture
def tokenizer(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = WHOLE
    return tokenizer


@pytest.fixture
def encoded(tmp_path, tokenizer):
    """Encode the first row of a file that may hold others, which say more or less."""

    def encoded(row, form="jsonl", others=()):
        rows = [row, *others]
        for split in ("train", "validation", "test"):
            if form == "jsonl":
                (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            else:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
        data = CompletionReader.load(DataConfig(source=str(tmp_path))).train
        return CONFIG.encode(data.select([0]), tokenizer)[0]

    return encoded


def truth(tokenizer, messages, unlearnt=(), **arguments):
    """(tokens, labels) of transformers: -100 where it is not the assistant who speaks, and in the turns `unlearnt`."""
    found = tokenizer.apply_chat_template(
        messages, **arguments, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, said = found["input_ids"], found["assistant_masks"]
    turn, before, labels = -1, 0, []
    for token, mask in zip(ids, said, strict=True):
        turn += mask > before
        before = mask
        labels.append(token if mask and turn not in unlearnt else -100)
    end = max(place for place, label in enumerate(labels) if label != -100) + 1
    return ids[:end], labels[:end]


def sharegpt(messages):
    names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in messages]


CASES = {
    "tool calls, results and tools": ({"messages": CALLING, "tools": [TOOL]}, CALLING, (), {"tools": [TOOL]}),
    "tools as JSON": ({"messages": CALLING, "tools": json.dumps([TOOL])}, CALLING, (), {"tools": [TOOL]}),
    "reasoning": (
        {"messages": [USER, {**GOOD, "reasoning_content": "hm"}]},
        [USER, {**GOOD, "reasoning_content": "hm"}],
        (),
        {},
    ),
    "weight 0": ({"messages": [USER, {**BAD, "weight": 0}, USER, GOOD]}, [USER, BAD, USER, GOOD], (0,), {}),
    "train false": ({"messages": [USER, GOOD, USER, {**BAD, "train": False}]}, [USER, GOOD, USER, BAD], (1,), {}),
    "system beside messages": ({"messages": [USER, GOOD], "system": "be brief"}, [SYSTEM, USER, GOOD], (), {}),
    "content parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "how "}, {"type": "text", "text": "is it"}]},
                GOOD,
            ]
        },
        [USER, GOOD],
        (),
        {},
    ),
    "sharegpt": (
        {"conversations": sharegpt([USER, GOOD]), "system": "be brief", "tools": json.dumps([TOOL["function"]])},
        [SYSTEM, USER, GOOD],
        (),
        {"tools": [TOOL]},
    ),
    "a call of LLaMA-Factory's": (
        {
            "conversations": [
                *sharegpt([USER]),
                {"from": "function_call", "value": json.dumps({"name": "look", "arguments": {"film": "a"}})},
                *sharegpt([{"role": "tool", "content": "four"}, GOOD]),
            ]
        },
        [
            USER,
            {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"film": "a"}}}]},
            {"role": "tool", "content": "four"},
            GOOD,
        ],
        (),
        {},
    ),
    "alpaca": (
        {
            "instruction": "how is",
            "input": "it",
            "output": "it is good",
            "system": "be brief",
            "history": [["how is it", "it is bad"]],
        },
        [SYSTEM, USER, BAD, {"role": "user", "content": "how is\n\nit"}, GOOD],
        (),
        {},
    ),
    "system beside a prompt": (
        {"prompt": "how is it", "completion": "it is good", "system": "be brief"},
        [SYSTEM, USER, GOOD],
        (),
        {},
    ),
    "prompt and completion of messages": (
        {"prompt": [USER, BAD, USER], "completion": [GOOD]},
        [USER, BAD, USER, GOOD],
        (0,),
        {},
    ),
    "messages with their prompt": ({"prompt": "how is it", "messages": [USER, GOOD]}, [USER, GOOD], (), {}),
    "an answer without a text": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        [USER, {"role": "assistant", "tool_calls": [CALL]}],
        (),
        {},
    ),
    "arguments as JSON": (
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": '{"film": "a"}'}}]},
            ]
        },
        [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"film": "a"}}}]}],
        (),
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_field_is_learnt_as_transformers_renders_the_whole_row(case, encoded, tokenizer):
    row, messages, unlearnt, arguments = CASES[case]
    ids, labels = truth(tokenizer, messages, unlearnt, **arguments)
    assert any(label != -100 for label in labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = encoded(row)
    assert got["input_ids"] == ids
    assert got["labels"] == labels


def test_what_arrow_fills_in_is_not_there(encoded, tokenizer):
    """A parquet file gives each message all keys of all others, and each call's arguments as well."""
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"film": "a"}}}]}
    other = {
        "messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": {"n": 1}}}]}]
    }
    for messages in ([USER, call], [USER, GOOD]):
        got = encoded({"messages": messages}, "parquet", [other])
        assert (got["input_ids"], got["labels"]) == truth(tokenizer, messages)


def test_weights_hold_in_packed_rows(tokenizer):
    rows = [[USER, {**BAD, "weight": 0}, USER, GOOD], [USER, GOOD]]
    data = [
        [
            {"role": t["role"], "content": t["content"], "more": json.dumps({"weight": 0} if "weight" in t else {})}
            for t in row
        ]
        for row in rows
    ]
    encoded = CONFIG.encode(Dataset.from_dict({"messages": data}), tokenizer)
    packed = pack(encoded, 2000)[0]
    assert packed["labels"] == encoded[0]["labels"] + encoded[1]["labels"]
    assert sorted(set(packed["labels"]) - {-100}) == sorted(set(encoded[1]["labels"]) - {-100})


# --- templates that use less ---------------------------------------------------------------------------------------


def test_what_the_template_makes_no_use_of_is_named_once(encoded, tokenizer):
    tokenizer.chat_template = PLAIN
    row = {"messages": [{**USER, "name": "Ann"}, {**GOOD, "reasoning_content": "hm"}], "tools": [TOOL]}
    row["chat_template_kwargs"] = {"enable_thinking": True}
    with pytest.warns(
        UserWarning, match=r"no use of these, in so many rows: enable_thinking \(1\), name \(1\), reas.* tools"
    ) as caught:
        got = encoded(row)
    assert len(caught) == 1
    assert got["input_ids"] == truth(tokenizer, [USER, GOOD])[0]


def test_tool_calls_without_a_place_in_the_template_are_refused(encoded, tokenizer):
    tokenizer.chat_template = PLAIN
    messages = [USER, {**GOOD, "tool_calls": [CALL]}]
    with pytest.raises(UserError, match=r"train.jsonl:\d+\): .*chat template makes no use of tool_calls"):
        encoded({"messages": messages})


def test_arguments_of_the_template_reach_it(encoded, tokenizer):
    tokenizer.chat_template = "{{ mood or '' }}" + WHOLE
    got = encoded({"messages": [USER, GOOD], "chat_template_kwargs": {"mood": "good"}})
    assert (got["input_ids"], got["labels"]) == truth(tokenizer, [USER, GOOD], mood="good")


# --- templates whose generation prompt opens a thought -------------------------------------------------------------


@pytest.mark.parametrize("thought", ["<think>\nhm\n</think>\n\n", "<think>hm</think>", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("answer", ["it is good", "<b>good</b>"])
def test_a_thought_that_the_generation_prompt_opens_is_learnt_behind_it(thought, answer, encoded, tokenizer):
    tokenizer.chat_template = THINKING
    got = encoded({"messages": [USER, {"role": "assistant", "content": thought + answer}]})
    prompt = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    said = thought.removeprefix("<think>").removeprefix("\n" * thought.startswith("<think>\n")) + answer + "<|im_end|>"
    text = [
        tokenizer.decode(
            [i for i, label in zip(got["input_ids"], got["labels"], strict=True) if (label == -100) is context]
        )
        for context in (True, False)
    ]
    expected = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, said)]
    assert text == [tokenizer.decode(ids) for ids in expected]


def test_an_answer_without_the_thought_that_is_opened_is_refused_with_what_to_do(encoded, tokenizer):
    tokenizer.chat_template = THINKING
    with pytest.raises(
        UserError, match=r"generation prompt ends in '<think>\\n', .* does not begin with '<think>'; write"
    ):
        encoded({"messages": [USER, {"role": "assistant", "content": "<b>good</b>"}]})


def test_turns_that_the_template_changes_later_are_learnt_in_rows_of_their_own(encoded, tokenizer):
    tokenizer.chat_template = THINKING
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nit is good"}
    with pytest.raises(UserError, match=r"make a row of each, with weight 0 for the assistant's messages before it\."):
        encoded({"messages": [USER, thought, USER, thought]})
    got = encoded({"messages": [USER, {**thought, "weight": 0}, USER, thought]})
    prompt = tokenizer.apply_chat_template([USER, thought, USER], tokenize=False, add_generation_prompt=True)
    learnt = [label for label in got["labels"] if label != -100]
    assert got["input_ids"][: -len(learnt)] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(learnt) == tokenizer.decode(
        tokenizer("hm\n</think>\n\nit is good<|im_end|>", add_special_tokens=False)["input_ids"]
    )
