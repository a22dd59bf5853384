"""The shapes in which text for supervised fine-tuning comes, brought to two: prompt and completion, or messages."""

from __future__ import annotations

import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
import pyarrow

from lora_ggpo.data.config import DataConfig
from lora_ggpo.data.load import STRING, Columns, Reader, Tables, find_test_table
from lora_ggpo.data.messages import Message, MessageReader, parse_json, read_tools, require_json, store
from lora_ggpo.data.table import Table
from lora_ggpo.errors import UserError

# Columns of prompt and completion that are recognised: the default ones, MetaMathQA's and CodeFeedback's, Alpaca's.
PAIRS = (("prompt", "completion"), ("query", "response"), ("query", "answer"))
ALPACA = ("instruction", "output")
# Columns of conversations, with the keys of their messages: OpenAI's and ShareGPT's.
CHATS = {"messages": ("role", "content"), "conversations": ("from", "value")}

SYSTEM = ("system", "system_prompt")
"""A system prompt, which a conversation begins with: LLaMA-Factory's and Axolotl's, and OpenOrca's."""

# What else has a meaning for training, beside a prompt and completion or a conversation.
HISTORY = "history"  # LLaMA-Factory's Alpaca: earlier turns, as pairs of texts; they are learnt too
TOOLS = "tools"  # the tools that the assistant can call: a list, or its JSON
TEMPLATE = "chat_template_kwargs"  # TRL's: further arguments of the chat template
MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # without them learning would be wrong
VERDICT = "label"  # TRL's for KTO: false marks what should not be said
IDLE = ("chosen", "rejected", "weight", "documents", "functions")  # has no use here
_INSIDE = frozenset({*SYSTEM, HISTORY, TOOLS, TEMPLATE})
_MESSAGE = {"role": STRING, "content": STRING}


@dataclass
class Notes:
    """What a reader learns of all rows of a source, which it sees piece by piece.

    Attributes:
        as_chats: Whether prompts and completions are to become conversations.
        forms: Whether there were conversations, in each piece.
        unused: By table, in how many rows there was something without a use.
        same: By table, how many pairs of answers were the same.
    """

    as_chats: bool = False
    forms: set[bool] = field(default_factory=set)
    unused: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    same: Counter[str] = field(default_factory=Counter)


class CompletionReader(Reader):
    """Reads "id" and either "prompt" and "completion", or "messages" and perhaps "template".

    "messages" are lists of {"role", "content"}, with "more" where they say more (`lora_ggpo.data.messages.restore`);
    "template" is the JSON of further arguments of the chat template, such as "tools". Rows with a system prompt, a
    history or tools become messages, and with them all rows of the source. What means something for training and has
    no use is named in one warning, with the number of rows.
    """

    def learn(self, tables: Tables) -> Tables:
        return tables

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.notes = Notes()

    def read(self, table: Table) -> Columns:
        table = table.without(self.config.ignore)
        _refuse_unlearnable(table)
        columns = {"id": table.ids(), **self._columns(table, self.notes.unused[table.origin])}
        if self.config.single_turn:
            return self._single_turns(columns, table)
        self.notes.forms.add("messages" in columns)
        if self.notes.as_chats and "messages" not in columns:
            pairs = zip(columns.pop("prompt"), columns.pop("completion"), strict=True)
            columns["messages"] = [_exchange(*pair) for pair in pairs]
        return columns

    def read_other(self, tables: Tables) -> datasets.Dataset:
        return self.read_all({"": find_test_table(tables, tables)})[""]

    def read_all(self, tables: Tables) -> dict[str, datasets.Dataset]:
        self.notes = Notes()
        read = super().read_all(tables)
        if len(self.notes.forms) > 1:  # all are to be alike
            self.notes = Notes(as_chats=True)
            read = super().read_all(tables)
        for split, table in tables.items():
            self.report(table, read[split])
        return read

    def report(self, table: Table, rows: datasets.Dataset) -> None:
        """Say in one warning each what was not used of a table that gave `rows`."""
        unused = sorted(self.notes.unused[table.origin].items())
        found = [f"{name} ({rows:,})" for name, rows in unused if rows]
        if found:
            warnings.warn(f"{table.origin}: not used for training, in so many rows: {', '.join(found)}.", stacklevel=3)
        if self.config.single_turn and not len(rows):
            raise UserError(
                f"{table.origin} has no conversation of one user and one assistant message, which data.single_turn "
                "keeps."
            )
        if len(rows) < len(table):
            warnings.warn(
                f"{table.origin}: {len(table) - len(rows)} of {len(table)} conversations are left out, since they are "
                "not one user and one assistant message of text alone.",
                stacklevel=3,
            )

    def arrow(self, columns: Columns) -> pyarrow.Table:
        # Beside its role and content, what a message says is JSON, as are the arguments of the template.
        features, columns = dict.fromkeys(columns, STRING), dict(columns)
        for name, chats in columns.items():
            if name == "messages" or isinstance(next(iter(chats), None), list):
                columns[name] = stored = [[store(turn) for turn in chat] for chat in chats]
                more = any("more" in turn for chat in stored for turn in chat)
                features[name] = [{**_MESSAGE, "more": STRING}] if more else [_MESSAGE]
        if "template" in columns:
            columns["template"] = [json.dumps(arguments) if arguments else None for arguments in columns["template"]]
        return pyarrow.Table.from_pydict(columns, datasets.Features(features).arrow_schema)

    def _columns(self, table: Table, unused: Counter[str]) -> Columns:
        named = self.config.prompt is not None or self.config.completion is not None
        chat = next((column for column in CHATS if column in table.columns and not named), None)
        prompt, completion = self._pair(table)
        for column in {*IDLE, *CHATS, *((HISTORY,) if chat else ())} - ({chat} if chat else {prompt, completion}):
            unused[f"column {column!r}"] += sum(map(is_given, _values(table, column)))
        if chat:
            chats = _chats(table, chat, unused)
        elif isinstance(next(filter(is_given, _values(table, prompt)), None), list):
            chats = _conversational(table, prompt, completion, unused)
        else:
            alpaca = (prompt, completion) == ALPACA and not named
            prompts = _alpaca_prompts(table) if alpaca else table.texts(prompt, "prompt")
            completions = table.texts(completion, "completion")
            if not any(is_given(value) for column in _INSIDE for value in _values(table, column)):
                return {"prompt": prompts, "completion": completions}
            chats = [_exchange(*pair) for pair in zip(prompts, completions, strict=True)]
        return _with_context(table, chats, history=not chat)

    def _single_turns(self, columns: Columns, table: Table) -> Columns:
        """The conversations of one user and one assistant message, as prompt and completion."""
        if "messages" not in columns:
            raise UserError(f"data.single_turn is for conversations, but {table.origin} has none; leave it out.")
        arguments = columns.get("template", [{}] * len(table))
        rows = zip(columns["id"], columns["messages"], arguments, strict=True)
        kept = [(name, chat) for name, chat, more in rows if not more and _is_single(chat)]
        prompts, completions = ([chat[place]["content"] for _, chat in kept] for place in (0, 1))
        return {"id": [name for name, _ in kept], "prompt": prompts, "completion": completions}

    def _pair(self, table: Table) -> tuple[str, str]:
        """The columns of prompt and completion."""
        if self.config.prompt is not None or self.config.completion is not None:
            return self.config.prompt or "prompt", self.config.completion or "completion"
        return next((pair for pair in (ALPACA, *PAIRS) if set(pair) <= set(table.columns)), PAIRS[0])


def is_given(value: object) -> bool:
    """Whether a field says anything: not null, blank, or an empty list."""
    return bool(value.strip() if isinstance(value, str) else value) and value == value


def _values(table: Table, column: str) -> list[Any]:
    return table.values(column) if column in table.columns else []


def _refuse_unlearnable(table: Table) -> None:
    for column in MEDIA:
        row = next((row for row, value in enumerate(_values(table, column)) if is_given(value)), None)
        if row is not None:
            raise UserError(
                f"{table.where(row)}: column {column!r} holds what is no text, and only text is learnt; remove such "
                f"rows, or set data.ignore: [{column}]."
            )
    verdicts = _values(table, VERDICT)
    if False in verdicts and all(type(verdict) is bool for verdict in verdicts):
        raise UserError(
            f"{table.where(verdicts.index(False))}: column {VERDICT!r} is false, which marks what should not be said; "
            f"remove such rows, or set data.ignore: [{VERDICT}]."
        )


# --- conversations -------------------------------------------------------------------------------------------------


def _chats(table: Table, column: str, unused: Counter[str]) -> list[list[Message]]:
    reader = MessageReader(table, column, unused, *CHATS[column])
    chats = [reader.read(value, row) for row, value in enumerate(table.column(column, "prompt"))]
    _refuse_unlearnt(table, column, chats)
    for beside, role in (("prompt", "user"), ("completion", "assistant")):  # these may only repeat the conversation
        for row, value in enumerate(_values(table, beside)):
            said = {turn.get("content", "").strip() for turn in chats[row] if turn["role"] == role}
            if is_given(value) and not (isinstance(value, str) and value.strip() in said):
                raise UserError(
                    f"{table.where(row)}: column {beside!r} is not in {column!r}, so it is not clear which of them is "
                    f"to be learnt; set data.ignore: [{beside}] to learn the conversations, or data.ignore: [{column}]."
                )
    return chats


def _conversational(table: Table, prompt: str, completion: str, unused: Counter[str]) -> list[list[Message]]:
    """TRL's prompts and completions that are lists of messages: those of the completion are learnt."""
    before, after = MessageReader(table, prompt, unused), MessageReader(table, completion, unused)
    pairs = zip(table.column(prompt, "prompt"), table.column(completion, "completion"), strict=True)
    chats = []
    for row, (asked, said) in enumerate(pairs):
        context = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in before.read(asked, row)]
        chats.append(context + after.read(said, row))
    _refuse_unlearnt(table, completion, chats)
    return chats


def _refuse_unlearnt(table: Table, column: str, chats: list[list[Message]]) -> None:
    for row, chat in enumerate(chats):
        if not any(turn["role"] == "assistant" and turn.get("weight", 1) for turn in chat):
            raise UserError(f"{table.where(row)}: column {column!r} has no assistant message to learn from.")


def _exchange(prompt: str, completion: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _with_context(table: Table, chats: list[list[Message]], *, history: bool) -> Columns:
    """The conversations with the system prompt, history and template's arguments of their rows."""
    columns = {column: table.values(column) for column in _INSIDE if column in table.columns}
    messages, arguments = [], []
    for row, chat in enumerate(chats):
        context = {column: values[row] for column, values in columns.items() if is_given(values[row])}
        earlier = list(_earlier(context[HISTORY], table, row)) if history and HISTORY in context else []
        messages.append(_system(context, chat, table, row) + earlier + chat)
        arguments.append(_arguments(context, table, row))
    return {"messages": messages} | ({"template": arguments} if any(arguments) else {})


def _system(context: Mapping[str, Any], chat: list[Message], table: Table, row: int) -> list[Message]:
    column = next((name for name in SYSTEM if name in context), None)
    if column is None:
        return []
    text = table.require_text(context[column], column, row)
    if chat[0]["role"] != "system":
        return [{"role": "system", "content": text}]
    if chat[0]["content"] != text:
        raise UserError(
            f"{table.where(row)}: column {column!r} and the first message are two different system prompts; remove "
            f"one, or set data.ignore: [{column}]."
        )
    return []


def _earlier(history: object, table: Table, row: int) -> Iterator[Message]:
    pairs = parse_json(history)
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError(
            f"{table.where(row)}: column {HISTORY!r} must hold earlier turns as a list of [prompt, answer]; if it "
            f"means something else, set data.ignore: [{HISTORY}]."
        )
    for pair in pairs:
        yield from _exchange(*(table.require_text(text, HISTORY, row) for text in pair))


def _arguments(context: Mapping[str, Any], table: Table, row: int) -> dict[str, Any]:
    arguments = parse_json(context.get(TEMPLATE, {}))
    if not isinstance(arguments, dict):
        raise UserError(f"{table.where(row)}: column {TEMPLATE!r} must hold an object of arguments, or its JSON.")
    tools = read_tools(context.get(TOOLS), TOOLS, table, row)
    arguments |= {"tools": tools} if tools else {}
    return require_json(arguments, f"{TOOLS} or {TEMPLATE}", table, row)


# --- prompts and completions ---------------------------------------------------------------------------------------


def _is_single(chat: list[Message]) -> bool:
    plain = all(turn.keys() == {"role", "content"} for turn in chat)
    return plain and [turn["role"] for turn in chat] == ["user", "assistant"]


def _alpaca_prompts(table: Table) -> list[str]:
    instructions = table.texts("instruction", "prompt")
    inputs = _values(table, "input") or [None] * len(table)
    return [
        f"{instruction}\n\n{table.require_text(given, 'input', row)}" if given else instruction
        for row, (instruction, given) in enumerate(zip(instructions, inputs, strict=True))
    ]
