"""The shapes in which text for supervised fine-tuning comes, brought to two: prompt and completion, or messages."""

from __future__ import annotations

import warnings
from typing import Any

from lora_ggpo.data.config import DataConfig
from lora_ggpo.data.table import Table
from lora_ggpo.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# Columns of prompt and completion that are recognised: the default ones, MetaMathQA's and CodeFeedback's.
PAIRS = (("prompt", "completion"), ("query", "response"), ("query", "answer"))


def read_completions(table: Table, config: DataConfig) -> dict[str, list[Any]]:
    """Return the columns "id" and either "prompt" and "completion", or "messages": lists of {"role", "content"}.

    Raises:
        UserError: the columns are missing, or a row has no text in them.
    """
    columns = {"id": table.ids(), **_columns(table, config)}
    return _single_turns(columns, table) if config.single_turn else columns


def _columns(table: Table, config: DataConfig) -> dict[str, list[Any]]:
    named = config.prompt is not None or config.completion is not None
    if not named and "messages" in table.columns:
        return {"messages": _messages(table, "messages", "role", "content")}
    if not named and "conversations" in table.columns:
        return {"messages": _messages(table, "conversations", "from", "value")}
    if not named and {"instruction", "output"} <= set(table.columns):
        return {"prompt": _alpaca_prompts(table), "completion": table.texts("output", "completion")}
    prompt, completion = next((pair for pair in PAIRS if set(pair) <= set(table.columns)), PAIRS[0])
    if named:
        prompt, completion = config.prompt or "prompt", config.completion or "completion"
    return {"prompt": table.texts(prompt, "prompt"), "completion": table.texts(completion, "completion")}


def _single_turns(columns: dict[str, list[Any]], table: Table) -> dict[str, list[Any]]:
    """Keep the conversations of one user and one assistant message; one warning counts the others."""
    if "messages" not in columns:
        raise UserError(f"data.single_turn is for conversations, but {table.origin} has none; leave it out.")
    rows = zip(columns["id"], columns["messages"], strict=True)
    kept = [(name, chat) for name, chat in rows if [turn["role"] for turn in chat] == ["user", "assistant"]]
    if not kept:
        raise UserError(
            f"{table.origin} has no conversation of one user and one assistant message, which data.single_turn keeps."
        )
    if len(kept) < len(table):
        warnings.warn(
            f"{table.origin}: {len(table) - len(kept)} of {len(table)} conversations are left out, since they are not "
            "one user and one assistant message.",
            stacklevel=3,
        )
    return {
        "id": [name for name, _ in kept],
        "prompt": [chat[0]["content"] for _, chat in kept],
        "completion": [chat[1]["content"] for _, chat in kept],
    }


def _alpaca_prompts(table: Table) -> list[str]:
    instructions = table.texts("instruction", "prompt")
    inputs = table.values("input") if "input" in table.columns else [None] * len(table)
    return [
        f"{instruction}\n\n{table.checked_text(given, 'input', row)}" if given else instruction
        for row, (instruction, given) in enumerate(zip(instructions, inputs, strict=True))
    ]


def _messages(table: Table, column: str, role_key: str, content_key: str) -> list[list[dict[str, str]]]:
    chats = []
    for row, value in enumerate(table.column(column, "prompt")):
        if not isinstance(value, list) or not value:
            raise UserError(f"{table.where(row)}: column {column!r} must hold a list of messages.")
        chat = [_message(turn, table, row, column, role_key, content_key) for turn in value]
        if not any(turn["role"] == "assistant" for turn in chat):
            raise UserError(f"{table.where(row)}: column {column!r} has no assistant message to learn from.")
        chats.append(chat)
    return chats


def _message(turn: object, table: Table, row: int, column: str, role_key: str, content_key: str) -> dict[str, str]:
    if not isinstance(turn, dict) or not {role_key, content_key} <= set(turn):
        raise UserError(f'{table.where(row)}: each message in {column!r} must have "{role_key}" and "{content_key}".')
    given = turn[role_key]
    role = SHAREGPT_ROLES.get(given, given) if isinstance(given, str) else given
    if role not in ROLES:
        raise UserError(f"{table.where(row)}: the role {given!r} in {column!r} is none of {', '.join(ROLES)}.")
    return {"role": role, "content": table.checked_text(turn[content_key], f"{column}.{content_key}", row)}
