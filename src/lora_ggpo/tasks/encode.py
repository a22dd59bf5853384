"""Rows of text become rows of tokens, and rows of tokens become padded batches.

Encoded rows are not padded. Their columns are `input_ids`, `attention_mask`, `labels` and `length` (tokens), and for
"causal-classification" also `label`, the index of the right label. `labels` is the class index for "classification";
for the causal kinds it is `input_ids` with -100 wherever no loss is taken, so only the completion is learnt.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from jinja2.exceptions import TemplateError
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from lora_ggpo.errors import UserError
from lora_ggpo.models import TaskKind
from lora_ggpo.tasks.config import TEXT_FIELD, TaskConfig

NO_LOSS = -100
_CHUNK = 1000
_MODEL_INPUTS = ("input_ids", "attention_mask", "labels")
_TOKENS = List(Value("int32"))
_LABEL = Value("int64")

Row = dict[str, Any]


def encode(kind: TaskKind, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: TaskConfig) -> Dataset:
    """Tokenise `dataset` for `kind`; see the top of this module for the columns that come back.

    Args:
        dataset: columns "text" and "label" for the classification kinds; "prompt" and "completion", or "messages",
            for "sft".
        config: for "causal-classification" with `label_words` filled in (`TaskConfig.for_labels`).

    Row order is kept. Only "sft" may drop rows: those whose prompt alone fills `max_length`, with one warning that
    counts them.

    Raises:
        UserError: no rows, a missing column, a label out of range, a template that leaves no room for the text, a chat
            template that does not fit the messages, or no row left.
    """
    _check(kind, dataset, tokenizer, config)
    encoders: dict[TaskKind, Callable[[], Iterator[list[Row]]]] = {
        "classification": lambda: _classification(dataset, tokenizer, config),
        "causal-classification": lambda: _causal_classification(dataset, tokenizer, config),
        "sft": lambda: _sft(dataset, tokenizer, config),
    }
    features = _features(kind)
    chunks = [
        Dataset.from_dict({column: [row[column] for row in rows] for column in features}, features)
        for rows in encoders[kind]()
        if rows
    ]
    dropped = len(dataset) - sum(len(chunk) for chunk in chunks)
    if not chunks:
        raise UserError(f"No row is left: every prompt fills task.max_length = {config.max_length} tokens; raise it.")
    if dropped:
        warnings.warn(
            f"{dropped} of {len(dataset)} rows are left out: their prompt fills task.max_length = "
            f"{config.max_length} tokens, so no completion is left to learn.",
            stacklevel=2,
        )
    return concatenate_datasets(chunks)


def collator(kind: TaskKind, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Row]], dict[str, torch.Tensor]]:
    """Return a function that pads encoded rows on the right, to the longest of the batch, for the model's forward.

    It gives `input_ids` and `attention_mask` of shape (batch, tokens), and `labels` of shape (batch,) for
    "classification" and (batch, tokens), padded with -100, for the causal kinds. Further columns are left out.
    """
    if kind == "classification":
        return partial(_collate, DataCollatorWithPadding(tokenizer))
    return partial(_collate, DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NO_LOSS))


def label_word_ids(tokenizer: PreTrainedTokenizerBase, config: TaskConfig) -> list[list[int]]:
    """Return the tokens of each label word as they follow the prompt.

    Raises:
        UserError: no label words, or the tokens of one begin with those of another, which then could never win.
    """
    if not config.label_words:
        raise UserError("task.label_words is not set; give one word for each label.")
    context = _prompt(tokenizer, config, "x")
    # After a line break (as chat templates end) a word starts without a space, elsewhere with one.
    space = "" if context.endswith("\n") else " "
    words = [_continuation(tokenizer, context, space + word) for word in config.label_words]
    for i, one in enumerate(words):
        for j, other in enumerate(words):
            if i != j and other[: len(one)] == one:
                raise UserError(
                    f"task.label_words: {config.label_words[j]!r} begins with the tokens of {config.label_words[i]!r}, "
                    "so the longer one can never win; choose other words."
                )
    return words


# --- the three kinds -----------------------------------------------------------------------------------------------


def _classification(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: TaskConfig) -> Iterator[list[Row]]:
    for batch in dataset.iter(_CHUNK):
        ids = tokenizer(batch["text"], truncation=True, max_length=config.max_length)["input_ids"]
        yield [_row(tokens, label) for tokens, label in zip(ids, batch["label"], strict=True)]


def _causal_classification(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: TaskConfig
) -> Iterator[list[Row]]:
    words = label_word_ids(tokenizer, config)
    start = [] if config.chat_template else _start(tokenizer)
    room = config.max_length - len(start) - max(map(len, words))  # one room for all labels: length must not tell them
    fixed = len(_tokens(tokenizer, _prompt(tokenizer, config, "")))
    if fixed >= room:
        raise UserError(
            f"task.max_length = {config.max_length} leaves no room for the text: the template and the longest label "
            f"word take {fixed + config.max_length - room} tokens; raise it."
        )
    for batch in dataset.iter(_CHUNK):
        prompts = [_prompt(tokenizer, config, text) for text in batch["text"]]
        encoded = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
        rows = []
        for text, ids, label in zip(batch["text"], encoded, batch["label"], strict=True):
            prompt = start + (ids if len(ids) <= room else _cut_to_fit(tokenizer, config, text, room))
            word = words[label]
            rows.append({**_row(prompt + word, [NO_LOSS] * len(prompt) + word), "label": label})
        yield rows


def _sft(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: TaskConfig) -> Iterator[list[Row]]:
    chat = config.chat_template or "messages" in dataset.column_names
    for first in range(0, len(dataset), _CHUNK):
        rows = []
        for index in range(first, min(first + _CHUNK, len(dataset))):
            segments = _segments(tokenizer, dataset[index], index, chat)
            ids, labels = _join(tokenizer, segments, [] if chat else _start(tokenizer))
            row = _row(ids[: config.max_length], labels[: config.max_length])
            if any(label != NO_LOSS for label in row["labels"][1:]):  # nothing predicts the first token
                rows.append(row)
        yield rows


# --- prompts -------------------------------------------------------------------------------------------------------


def _prompt(tokenizer: PreTrainedTokenizerBase, config: TaskConfig, text: str) -> str:
    """Fill the template. Spaces at its end are left out: the space belongs to the label word behind it."""
    prompt = config.template.replace(TEXT_FIELD, text).rstrip(" ")
    if not config.chat_template:
        return prompt
    return _render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)


def _cut_to_fit(tokenizer: PreTrainedTokenizerBase, config: TaskConfig, text: str, room: int) -> list[int]:
    """Tokens of the prompt with as much of the beginning of `text` as `room` tokens allow; the template stays whole."""

    def prompt(characters: int) -> list[int]:
        return _tokens(tokenizer, _prompt(tokenizer, config, text[:characters]))

    end = 4 * room  # about as many characters as fit; the search must not tokenise a very long text again and again
    while end < len(text) and len(prompt(end)) <= room:
        end *= 2
    fits = bisect_right(range(min(end, len(text)) + 1), room, key=lambda n: len(prompt(n)))
    return prompt(fits - 1)


# --- prompt and completion, conversations --------------------------------------------------------------------------


def _segments(tokenizer: PreTrainedTokenizerBase, row: Row, index: int, chat: bool) -> list[tuple[str, bool]]:
    """Split a row's full text into (text, learn it?) pieces."""
    if not chat:
        return [(row["prompt"], False), (row["completion"] + str(tokenizer.eos_token), True)]
    turns = row.get("messages") or [
        {"role": "user", "content": row.get("prompt")},
        {"role": "assistant", "content": row.get("completion")},
    ]
    try:
        return _turns(tokenizer, turns)
    except UserError as error:
        raise UserError(f"Row {index}: {error}") from error


def _turns(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
    """Render ever longer beginnings of a conversation; what each assistant turn adds to them is what is learnt."""
    segments: list[tuple[str, bool]] = []
    done = ""
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:position], add_generation_prompt=True)
        after = _render(tokenizer, messages[: position + 1], add_generation_prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise UserError(
                "the tokenizer's chat template changes earlier turns as the conversation grows, so the assistant's "
                "turns cannot be told apart; use prompt and completion columns."
            )
        reply = _up_to_last(after[len(before) :], str(tokenizer.eos_token))
        segments += [(before[len(done) :], False), (reply, True)]
        done = before + reply
    if not segments:
        raise UserError("the messages hold no assistant turn, so there is nothing to learn.")
    return segments


def _up_to_last(text: str, end: str) -> str:
    """Leave out the white space a template puts behind the end of a turn: nothing generates it."""
    head, found, tail = text.rpartition(end)
    return head + found if found and not tail.strip() else text


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except (TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
        raise UserError(f"the tokenizer's chat template rejects the messages: {error}") from error


def _join(
    tokenizer: PreTrainedTokenizerBase, segments: list[tuple[str, bool]], start: list[int]
) -> tuple[list[int], list[int]]:
    """Tokenise segments one behind the other into (input_ids, labels)."""
    text, ids, labels = "", list(start), [NO_LOSS] * len(start)
    for segment, learnt in segments:
        added = _continuation(tokenizer, text, segment, ids[len(start) :])
        text += segment
        ids += added
        labels += added if learnt else [NO_LOSS] * len(added)
    return ids, labels


# --- tokens --------------------------------------------------------------------------------------------------------


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token where the tokenizer puts one; chat templates write their own."""
    first = list(tokenizer("")["input_ids"][:1])
    return first if first == [tokenizer.bos_token_id] else []


def _continuation(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, context_ids: list[int] | None = None
) -> list[int]:
    """Tokens of `continuation` behind `context`, whose own tokens stand, as they do when a model generates.

    The two are tokenised together unless a token would straddle the border; then the continuation is on its own.
    """
    before = _tokens(tokenizer, context) if context_ids is None else context_ids
    joint = _tokens(tokenizer, context + continuation)
    return joint[len(before) :] if joint[: len(before)] == before else _tokens(tokenizer, continuation)


def _row(ids: list[int], labels: int | list[int]) -> Row:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "length": len(ids)}


def _features(kind: TaskKind) -> Features:
    labels = _LABEL if kind == "classification" else _TOKENS
    columns = {"input_ids": _TOKENS, "attention_mask": List(Value("int8")), "labels": labels, "length": Value("int32")}
    return Features({**columns, "label": _LABEL} if kind == "causal-classification" else columns)


def _collate(pad: Callable[[list[Row]], dict[str, torch.Tensor]], rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    return dict(pad([{name: row[name] for name in _MODEL_INPUTS if name in row} for row in rows]))


# --- checks --------------------------------------------------------------------------------------------------------


def _check(kind: TaskKind, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: TaskConfig) -> None:
    if len(dataset) == 0:
        raise UserError("The data has no rows.")
    if config.max_length > tokenizer.model_max_length:
        raise UserError(
            f"task.max_length = {config.max_length} is more than the {tokenizer.model_max_length} tokens "
            "the model can read; lower it."
        )
    columns = set(dataset.column_names)
    if kind == "sft":
        _check_sft(columns, tokenizer, config)
        return
    for needed in ("text", "label"):
        if needed not in columns:
            raise UserError(f"The data has no column {needed!r}, only {', '.join(sorted(columns))}.")
    if config.chat_template:
        _check_chat_template(tokenizer)
    limit = len(config.label_words or []) if kind == "causal-classification" else None
    for index, label in enumerate(dataset["label"]):
        if label is None or label < 0 or (limit and label >= limit):
            valid = f"0 to {limit - 1}" if limit else "0 or more"
            raise UserError(f"Row {index}: label {label!r} is out of range; labels are whole numbers, {valid}.")


def _check_sft(columns: set[str], tokenizer: PreTrainedTokenizerBase, config: TaskConfig) -> None:
    if not ("messages" in columns or {"prompt", "completion"} <= columns):
        raise UserError(
            "The data needs the columns 'prompt' and 'completion', or 'messages', "
            f"but has only {', '.join(sorted(columns))}."
        )
    if tokenizer.eos_token is None:
        raise UserError("The tokenizer has no end-of-text token, so a completion could not be taught to end.")
    if config.chat_template or "messages" in columns:
        _check_chat_template(tokenizer)


def _check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            "The tokenizer has no chat template, which messages and task.chat_template need; "
            "use prompt and completion columns, or an instruction-tuned model."
        )
