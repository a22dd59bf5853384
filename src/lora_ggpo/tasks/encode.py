"""Rows of text become rows of tokens, and rows of tokens become padded batches.

Encoded rows are not padded. Their columns are `input_ids`, `attention_mask`, `labels` and `length` (tokens of
`input_ids`); for the kinds with label words also `label`, the index of the right label; for "classification" of pairs
`token_type_ids`, if the tokenizer has them. `labels` is the class index for "classification", the
number to predict for "regression", the tokens of the label's
word for "seq2seq-classification", and for the causal kinds `input_ids` with -100 wherever no loss is taken, so only the
completion is learnt.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from lora_ggpo.data.messages import Message
from lora_ggpo.errors import UserError
from lora_ggpo.models.chat_template import Ending, end_of_turn
from lora_ggpo.models.load import HEAD_KINDS, TaskKind
from lora_ggpo.tasks.config import LABEL_WORD_KINDS, PLAIN, TaskConfig
from lora_ggpo.tasks.conversation import UnusedFields, behind_prompt, conversation, learnt_turns, render
from lora_ggpo.tasks.length import NO_LOSS, Room

_CHUNK = 1000
_MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")
_TOKENS = List(Value("int32"))
_LABEL = Value("int64")
_COLUMNS = {
    "input_ids": _TOKENS,
    "attention_mask": List(Value("int8")),
    "token_type_ids": List(Value("int8")),
    "labels": _TOKENS,
    "position_ids": _TOKENS,
    "length": Value("int32"),
    "label": _LABEL,
}

Row = dict[str, Any]
# A row's "text", and "text_pair" if it has a second one.
Texts = Mapping[str, str]


def encode(
    kind: TaskKind, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: TaskConfig, name: str = ""
) -> Dataset:
    """Tokenise `dataset` for `kind`; see the top of this module for the columns that come back.

    Args:
        dataset: columns "text", "label" ("target" for "regression") and for pairs of texts "text_pair"; "prompt" and
            "completion", or "messages" and perhaps "template" (as `load_completion` gives them), for "sft".
        config: with `label_words` filled in (`TaskConfig.for_labels`) for the kinds that need them.
        name: of the set, for what is said of its lengths.

    Row order is kept. Only "sft" may drop rows: those whose prompt alone fills `max_length`, and with `too_long: drop`
    all that are longer. One warning counts the rows that are left out or cut, and the tokens that are lost.

    Raises:
        UserError: no rows, a missing column, a label out of range, a template that does not fit the data or leaves no
            room for the text, a chat template that does not fit the messages, no row left, or with `too_long: refuse`
            a row that is longer than `max_length`.
    """
    _check(kind, dataset, tokenizer, config)
    encoders: dict[TaskKind, Callable[[], Iterator[list[Row]]]] = {
        "classification": lambda: _classification(dataset, tokenizer, config),
        "regression": lambda: _classification(dataset, tokenizer, config, "target"),
        "causal-classification": lambda: _causal_classification(dataset, tokenizer, config),
        "seq2seq-classification": lambda: _seq2seq_classification(dataset, tokenizer, config),
        "sft": lambda: _sft(dataset, tokenizer, config, Room(config, name)),
    }
    chunks = [_chunk(kind, rows) for rows in encoders[kind]() if rows]
    return concatenate_datasets(chunks)


def collator(kind: TaskKind, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Row]], dict[str, torch.Tensor]]:
    """Return a function that pads encoded rows on the right, to the longest of the batch, for the model's forward.

    It gives `input_ids` and `attention_mask` of shape (batch, tokens), and `labels` of shape (batch,) for
    the `HEAD_KINDS` and (batch, tokens), padded with -100, for the other kinds. Columns that are no input of a model
    are left out. Rows that `pack` made have `position_ids` instead of `attention_mask`: where they begin again at 0,
    so does an example, and none sees another.
    """
    if kind in HEAD_KINDS:
        return partial(_collate, DataCollatorWithPadding(tokenizer))
    return partial(_collate, DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NO_LOSS))


def user_turn(config: TaskConfig, text: str) -> str:
    """What a user asks, in the template of the task; spaces at its end are left out, they belong to the completion."""
    return _filled(config, text)[0]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, str]]) -> list[int]:
    """Tokens of a prompt as they precede a completion in what `encode` makes for "sft".

    Args:
        prompt: Text as it stands, or messages ({"role", "content"}) that the chat template renders up to where the
            assistant's next turn begins.

    Raises:
        UserError: the tokenizer has no chat template, or it rejects the messages.
    """
    if isinstance(prompt, str):
        return _start(tokenizer) + _tokens(tokenizer, prompt)
    _check_chat_template(tokenizer)
    return _tokens(tokenizer, render(tokenizer, prompt, {}, add_generation_prompt=True))


def label_word_ids(tokenizer: PreTrainedTokenizerBase, config: TaskConfig) -> list[list[int]]:
    """Return the tokens of each label word: as they follow the prompt, or as a decoder generates them, end included.

    Raises:
        UserError: no label words, or the tokens of one begin with those of another, which then could never win.
    """
    if not config.label_words:
        raise UserError("task.label_words is not set; give one word for each label.")
    ids_of = _target if config.kind == "seq2seq-classification" else _word_behind_prompt
    words = [ids_of(tokenizer, config, word) for word in config.label_words]
    for i, one in enumerate(words):
        for j, other in enumerate(words):
            if i != j and other[: len(one)] == one:
                raise UserError(
                    f"task.label_words: {config.label_words[j]!r} begins with the tokens of {config.label_words[i]!r}, "
                    "so the longer one can never win; choose other words."
                )
    return words


# --- the four kinds ------------------------------------------------------------------------------------------------


def _classification(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: TaskConfig, target: str = "label"
) -> Iterator[list[Row]]:
    for batch in dataset.iter(_CHUNK):
        second = batch.get("text_pair")
        encoded = tokenizer(batch["text"], second, truncation=True, max_length=config.max_length)
        rows = [_row(ids, label) for ids, label in zip(encoded["input_ids"], batch[target], strict=True)]
        if second is not None and "token_type_ids" in encoded:
            types = encoded["token_type_ids"]
            rows = [{**row, "token_type_ids": segments} for row, segments in zip(rows, types, strict=True)]
        yield rows


def _causal_classification(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: TaskConfig
) -> Iterator[list[Row]]:
    words = label_word_ids(tokenizer, config)
    start = [] if config.chat_template else _start(tokenizer)
    room = config.max_length - len(start) - max(map(len, words))  # one room for all labels: length must not tell them
    for prompts, labels in _prompts(dataset, tokenizer, config, room, special_tokens=False):
        rows = []
        for ids, label in zip(prompts, labels, strict=True):
            prompt, word = start + ids, words[label]
            rows.append({**_row(prompt + word, [NO_LOSS] * len(prompt) + word), "label": label})
        yield rows


def _seq2seq_classification(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: TaskConfig
) -> Iterator[list[Row]]:
    words = label_word_ids(tokenizer, config)
    for prompts, labels in _prompts(dataset, tokenizer, config, config.max_length, special_tokens=True):
        yield [{**_row(ids, words[label]), "label": label} for ids, label in zip(prompts, labels, strict=True)]


def _sft(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: TaskConfig, room: Room) -> Iterator[list[Row]]:
    chat = config.chat_template or "messages" in dataset.column_names
    end = end_of_turn(tokenizer) if chat else None
    unused = UnusedFields(room.name)
    for first in range(0, len(dataset), _CHUNK):
        rows = []
        for index in range(first, min(first + _CHUNK, len(dataset))):
            segments = _segments(tokenizer, config, dataset[index], index, end, unused)
            ids, labels = _join(tokenizer, segments, [] if chat else _start(tokenizer))
            fitted = room.fit(ids, labels)
            if fitted:
                rows.append(_row(*fitted))
        yield rows
    unused.report()
    room.report()


# --- prompts and label words ---------------------------------------------------------------------------------------


def _prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, config: TaskConfig, room: int, *, special_tokens: bool
) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Tokens of the prompts, each at most `room`, and labels, chunk by chunk."""

    def tokens(texts: Texts) -> list[int]:
        return _tokens(tokenizer, _prompt(tokenizer, config, texts), special_tokens)

    names = [name for name in ("text", "text_pair") if name in dataset.column_names]
    fixed = len(tokens(dict.fromkeys(names, "")))
    if fixed >= room:
        word = " and the longest label word take" if room < config.max_length else " takes"
        raise UserError(
            f"task.max_length = {config.max_length} leaves no room for the text: the template{word} "
            f"{fixed + config.max_length - room} tokens; raise it."
        )
    for batch in dataset.iter(_CHUNK):
        rows = [dict(zip(names, values, strict=True)) for values in zip(*(batch[name] for name in names), strict=True)]
        prompts = [_prompt(tokenizer, config, texts) for texts in rows]
        encoded = tokenizer(prompts, add_special_tokens=special_tokens, verbose=False)["input_ids"]
        yield (
            [
                ids if len(ids) <= room else _cut_to_fit(tokens, texts, room)
                for ids, texts in zip(encoded, rows, strict=True)
            ],
            batch["label"],
        )


def _prompt(tokenizer: PreTrainedTokenizerBase, config: TaskConfig, texts: Texts) -> str:
    """Fill the template. Spaces at its end are left out: the space belongs to the label word behind it."""
    prompt = config.fill(texts).rstrip(" ")
    if not config.chat_template:
        return prompt
    return render(tokenizer, [{"role": "user", "content": prompt}], {}, add_generation_prompt=True)


def _cut_to_fit(tokens: Callable[[Texts], list[int]], texts: Texts, room: int) -> list[int]:
    """Tokens of the prompt with as much of the beginning of each text as `room` allows; the template stays whole.

    All texts are held to one length in characters, so that the longer of two is cut first.
    """

    def cut(characters: int) -> list[int]:
        return tokens({name: text[:characters] for name, text in texts.items()})

    longest = max(map(len, texts.values()))
    end = 4 * room  # about as many characters as fit; the search must not tokenise a very long text again and again
    while end < longest and len(cut(end)) <= room:
        end *= 2
    fits = bisect_right(range(min(end, longest) + 1), room, key=lambda n: len(cut(n)))
    return cut(fits - 1)


def _word_behind_prompt(tokenizer: PreTrainedTokenizerBase, config: TaskConfig, word: str) -> list[int]:
    context = _prompt(tokenizer, config, {"text": "x", "text_pair": "x"})
    # After a line break (as chat templates end) a word starts without a space, elsewhere with one.
    return _continuation(tokenizer, context, word if context.endswith("\n") else f" {word}")


def _target(tokenizer: PreTrainedTokenizerBase, config: TaskConfig, word: str) -> list[int]:
    return list(tokenizer(text_target=word)["input_ids"])


# --- prompt and completion, conversations --------------------------------------------------------------------------


def _segments(
    tokenizer: PreTrainedTokenizerBase,
    config: TaskConfig,
    row: Row,
    index: int,
    end: Ending | None,
    unused: UnusedFields,
) -> list[tuple[str, bool]]:
    """Split a row's full text into (text, learn it?) pieces.

    Args:
        end: Of a turn in the chat template; None is without one.
    """
    if end is None:
        prompt, space = _filled(config, row["prompt"])
        return [(prompt, False), (space + row["completion"] + str(tokenizer.eos_token), True)]
    try:
        messages, arguments = conversation(row) if "messages" in row else (_exchange(config, row), {})
        unused.look(tokenizer, messages, arguments)
        return _turns(tokenizer, messages, arguments, end)
    except UserError as error:
        place = f"Row {index} ({row['id']})" if "id" in row else f"Row {index}"  # an id is file:line by default
        raise UserError(f"{place}: {error}") from error


def _exchange(config: TaskConfig, row: Row) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": _filled(config, row["prompt"])[0]},
        {"role": "assistant", "content": row["completion"]},
    ]


def _filled(config: TaskConfig, prompt: str) -> tuple[str, str]:
    """The template with the prompt, and the spaces at the template's end, which belong to the completion."""
    spaces = len(config.template) - len(config.template.rstrip(" "))
    filled = config.fill({"text": prompt})
    return filled[: len(filled) - spaces], " " * spaces


def _turns(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], arguments: dict[str, Any], end: Ending
) -> list[tuple[str, bool]]:
    """Render ever longer beginnings of a conversation; what each assistant turn adds to them is what is learnt."""
    segments: list[tuple[str, bool]] = []
    done = ""
    for position in learnt_turns(messages):
        before = render(tokenizer, messages[:position], arguments, add_generation_prompt=True)
        after = behind_prompt(tokenizer, messages[: position + 1], arguments, before)
        if not before.startswith(done):
            raise UserError(
                "the tokenizer's chat template changes earlier turns as the conversation grows, so the assistant's "
                "turns cannot all be learnt in one row; make a row of each, with weight 0 for the assistant's messages "
                "before it."
            )
        reply = end.cut(after)
        segments += [(before[len(done) :], False), (reply, True)]
        done = before + reply
    if not segments:
        raise UserError("the messages hold no assistant turn, so there is nothing to learn.")
    return segments


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


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"])


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


def _row(ids: list[int], labels: float | list[int]) -> Row:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "length": len(ids)}


def _chunk(kind: TaskKind, rows: list[Row]) -> Dataset:
    features = {name: feature for name, feature in _COLUMNS.items() if name in rows[0]}
    if kind in HEAD_KINDS:
        features["labels"] = _LABEL if kind == "classification" else Value("float32")
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, Features(features))


def packed_dataset(columns: dict[str, list[Any]]) -> Dataset:
    """Columns of packed rows, in the types of encoded ones."""
    return Dataset.from_dict(columns, Features({name: _COLUMNS[name] for name in columns}))


def _collate(pad: Callable[[list[Row]], dict[str, torch.Tensor]], rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    batch = dict(pad([{name: row[name] for name in _MODEL_INPUTS if name in row} for row in rows]))
    if "position_ids" in rows[0]:
        del batch["attention_mask"]  # transformers looks at the positions only where there is none
        width = batch["input_ids"].shape[1]
        positions = [row["position_ids"] for row in rows]
        batch["position_ids"] = torch.tensor([[*row, *[0] * (width - len(row))] for row in positions])
    return batch


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
    for needed in ("text", "target" if kind == "regression" else "label"):
        if needed not in columns:
            raise UserError(f"The data has no column {needed!r}, only {', '.join(sorted(columns))}.")
    if config.chat_template:
        _check_chat_template(tokenizer)
    if kind in LABEL_WORD_KINDS:
        _check_template(columns, config)
    if kind == "regression":
        return
    limit = len(config.label_words or []) if kind in LABEL_WORD_KINDS else None
    for index, label in enumerate(dataset["label"]):
        if label is None or label < 0 or (limit and label >= limit):
            valid = f"0 to {limit - 1}" if limit else "0 or more"
            raise UserError(f"Row {index}: label {label!r} is out of range; labels are whole numbers, {valid}.")


def _check_template(columns: set[str], config: TaskConfig) -> None:
    if config.takes_pair and "text_pair" not in columns:
        raise UserError("task.template has {text_pair}, but the data has one text only; set data.text_pair.")
    if "text_pair" in columns and not config.takes_pair:
        raise UserError("The data has two texts, but task.template has no {text_pair}; put it where the second goes.")


def _check_sft(columns: set[str], tokenizer: PreTrainedTokenizerBase, config: TaskConfig) -> None:
    if not ("messages" in columns or {"prompt", "completion"} <= columns):
        raise UserError(
            "The data needs the columns 'prompt' and 'completion', or 'messages', "
            f"but has only {', '.join(sorted(columns))}."
        )
    if "messages" in columns and config.template != PLAIN:
        raise UserError(
            "task.template is for prompts and completions, but the data has messages (as rows with a system prompt, a "
            "history or tools are); leave it out, or name those columns in data.ignore."
        )
    if config.chat_template or "messages" in columns:
        _check_chat_template(tokenizer)
    elif tokenizer.eos_token is None:
        raise UserError("The tokenizer has no end-of-text token, so a completion could not be taught to end.")


def _check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            "The tokenizer has no chat template, which task.chat_template and messages need (as rows with a system "
            "prompt, a history or tools are); use prompt and completion columns, or an instruction-tuned model."
        )
