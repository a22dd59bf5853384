"""The shapes in which text for supervised fine-tuning comes, brought to two: prompt and completion, or messages."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lora_ggpo.data.config import DataConfig
from lora_ggpo.data.messages import Message, Reader, checked_json, parsed, read_tools
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


def read_completions(table: Table, config: DataConfig) -> dict[str, list[Any]]:
    """Return the columns "id" and either "prompt" and "completion", or "messages" and perhaps "template".

    "messages" are lists of messages (`lora_ggpo.data.messages`); "template" holds further arguments of the chat
    template, such as "tools". Rows with a system prompt, a history or tools become messages, and with them all rows of
    the table. What means something for training and has no use is named in one warning, with the number of rows.

    Raises:
        UserError: the columns are missing, a row has no text in them, or holds what would be learnt wrongly.
    """
    table = table.without(config.ignore)
    _refuse_unlearnable(table)
    unused: Counter[str] = Counter()
    columns = {"id": table.ids(), **_columns(table, config, unused)}
    found = [f"{name} ({rows:,})" for name, rows in sorted(unused.items()) if rows]
    if found:
        warnings.warn(f"{table.origin}: not used for training, in so many rows: {', '.join(found)}.", stacklevel=3)
    return _single_turns(columns, table) if config.single_turn else columns


def _columns(table: Table, config: DataConfig, unused: Counter[str]) -> dict[str, list[Any]]:
    named = config.prompt is not None or config.completion is not None
    chat = next((column for column in CHATS if column in table.columns and not named), None)
    used = {chat} if chat else set(_pair(table, config))
    for column in {*IDLE, *CHATS, *((HISTORY,) if chat else ())} - used:
        unused[f"column {column!r}"] += sum(map(_given, _values(table, column)))
    if chat:
        chats = _chats(table, chat, unused)
        _refuse_contradictions(table, chat, chats)
    else:
        prompt, completion = _pair(table, config)
        if _holds_messages(table, prompt):
            chats = _conversational(table, prompt, completion, unused)
        else:
            alpaca = (prompt, completion) == ALPACA and not named
            prompts = _alpaca_prompts(table) if alpaca else table.texts(prompt, "prompt")
            completions = table.texts(completion, "completion")
            if not any(_given(value) for column in _INSIDE for value in _values(table, column)):
                return {"prompt": prompts, "completion": completions}
            chats = [_exchange(*pair) for pair in zip(prompts, completions, strict=True)]
    return _with_context(table, chats, history=not chat)


def _pair(table: Table, config: DataConfig) -> tuple[str, str]:
    """The columns of prompt and completion."""
    if config.prompt is not None or config.completion is not None:
        return config.prompt or "prompt", config.completion or "completion"
    if set(ALPACA) <= set(table.columns):
        return ALPACA
    return next((pair for pair in PAIRS if set(pair) <= set(table.columns)), PAIRS[0])


def _given(value: object) -> bool:
    """Whether a field says anything: not null, blank, or an empty list."""
    return bool(value.strip() if isinstance(value, str) else value) and value == value


def _values(table: Table, column: str) -> list[Any]:
    return table.values(column) if column in table.columns else []


# --- conversations -------------------------------------------------------------------------------------------------


def _chats(table: Table, column: str, unused: Counter[str]) -> list[list[Message]]:
    reader = Reader(table, column, *CHATS[column])
    chats = [reader.read(value, row) for row, value in enumerate(table.column(column, "prompt"))]
    _refuse_unlearnt(table, column, chats)
    unused.update(reader.unused)
    return chats


def _refuse_unlearnt(table: Table, column: str, chats: list[list[Message]]) -> None:
    for row, chat in enumerate(chats):
        if not any(turn["role"] == "assistant" and turn.get("weight", 1) for turn in chat):
            raise UserError(f"{table.where(row)}: column {column!r} has no assistant message to learn from.")


def _holds_messages(table: Table, column: str) -> bool:
    return isinstance(next(filter(_given, _values(table, column)), None), list)


def _conversational(table: Table, prompt: str, completion: str, unused: Counter[str]) -> list[list[Message]]:
    """TRL's prompts and completions that are lists of messages: those of the completion are learnt."""
    before, after = Reader(table, prompt), Reader(table, completion)
    chats = []
    for row, (asked, said) in enumerate(
        zip(table.column(prompt, "prompt"), table.column(completion, "completion"), strict=True)
    ):
        context = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in before.read(asked, row)]
        chats.append(context + after.read(said, row))
    _refuse_unlearnt(table, completion, chats)
    unused.update(before.unused)
    unused.update(after.unused)
    return chats


def _exchange(prompt: str, completion: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _with_context(table: Table, chats: list[list[Message]], *, history: bool) -> dict[str, list[Any]]:
    """The conversations with the system prompt, history and template's arguments of their rows."""
    columns = {column: table.values(column) for column in _INSIDE if column in table.columns}
    messages, arguments = [], []
    for row, chat in enumerate(chats):
        context = {column: values[row] for column, values in columns.items() if _given(values[row])}
        earlier = list(_earlier(context[HISTORY], table, row)) if history and HISTORY in context else []
        messages.append(_system(context, chat, table, row) + earlier + chat)
        arguments.append(_arguments(context, table, row))
    return {"messages": messages} | ({"template": arguments} if any(arguments) else {})


def _system(context: Mapping[str, Any], chat: list[Message], table: Table, row: int) -> list[Message]:
    column = next((name for name in SYSTEM if name in context), None)
    if column is None:
        return []
    text = table.checked_text(context[column], column, row)
    if chat[0]["role"] != "system":
        return [{"role": "system", "content": text}]
    if chat[0]["content"] != text:
        raise UserError(
            f"{table.where(row)}: column {column!r} and the first message are two different system prompts; remove "
            f"one, or set data.ignore: [{column}]."
        )
    return []


def _earlier(history: object, table: Table, row: int) -> Iterator[Message]:
    pairs = parsed(history)
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError(
            f"{table.where(row)}: column {HISTORY!r} must hold earlier turns as a list of [prompt, answer]; if it "
            f"means something else, set data.ignore: [{HISTORY}]."
        )
    for pair in pairs:
        yield from _exchange(*(table.checked_text(text, HISTORY, row) for text in pair))


def _arguments(context: Mapping[str, Any], table: Table, row: int) -> dict[str, Any]:
    arguments = parsed(context.get(TEMPLATE, {}))
    if not isinstance(arguments, dict):
        raise UserError(f"{table.where(row)}: column {TEMPLATE!r} must hold an object of arguments, or its JSON.")
    tools = read_tools(context.get(TOOLS), TOOLS, table, row)
    arguments |= {"tools": tools} if tools else {}
    return checked_json(arguments, f"{TOOLS} or {TEMPLATE}", table, row)


def as_messages(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Prompts and completions as conversations; conversations as they are."""
    if "messages" in columns:
        return columns
    pairs = zip(columns["prompt"], columns["completion"], strict=True)
    return {"id": columns["id"], "messages": [_exchange(*pair) for pair in pairs]}


def _refuse_contradictions(table: Table, chat: str, chats: list[list[Message]]) -> None:
    """Beside a conversation, a prompt or a completion may only repeat it."""
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        for row, value in enumerate(_values(table, column)):
            said = {turn.get("content", "").strip() for turn in chats[row] if turn["role"] == role}
            if _given(value) and not (isinstance(value, str) and value.strip() in said):
                raise UserError(
                    f"{table.where(row)}: column {column!r} is not in {chat!r}, so it is not clear which of them is to "
                    f"be learnt; set data.ignore: [{column}] to learn the conversations, or data.ignore: [{chat}]."
                )


def _refuse_unlearnable(table: Table) -> None:
    for column in MEDIA:
        row = next((row for row, value in enumerate(_values(table, column)) if _given(value)), None)
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


# --- prompts and completions ---------------------------------------------------------------------------------------


def _single_turns(columns: dict[str, list[Any]], table: Table) -> dict[str, list[Any]]:
    """Keep the conversations of one user and one assistant message; one warning counts the others."""
    if "messages" not in columns:
        raise UserError(f"data.single_turn is for conversations, but {table.origin} has none; leave it out.")
    arguments = columns.get("template", [{}] * len(table))
    rows = zip(columns["id"], columns["messages"], arguments, strict=True)
    kept = [(name, chat) for name, chat, more in rows if not more and _is_single(chat)]
    if not kept:
        raise UserError(
            f"{table.origin} has no conversation of one user and one assistant message, which data.single_turn keeps."
        )
    if len(kept) < len(table):
        warnings.warn(
            f"{table.origin}: {len(table) - len(kept)} of {len(table)} conversations are left out, since they are not "
            "one user and one assistant message of text alone.",
            stacklevel=3,
        )
    return {
        "id": [name for name, _ in kept],
        "prompt": [chat[0]["content"] for _, chat in kept],
        "completion": [chat[1]["content"] for _, chat in kept],
    }


def _is_single(chat: list[Message]) -> bool:
    plain = all(turn.keys() == {"role", "content"} for turn in chat)
    return plain and [turn["role"] for turn in chat] == ["user", "assistant"]


def _alpaca_prompts(table: Table) -> list[str]:
    instructions = table.texts("instruction", "prompt")
    inputs = table.values("input") if "input" in table.columns else [None] * len(table)
    return [
        f"{instruction}\n\n{table.checked_text(given, 'input', row)}" if given else instruction
        for row, (instruction, given) in enumerate(zip(instructions, inputs, strict=True))
    ]
