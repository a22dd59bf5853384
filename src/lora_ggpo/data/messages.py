"""The messages of a conversation, in any of the usual forms, as a chat template takes them.

A message has "role" and "content", and what else a template may look at: `PASSED_ON`. "weight": 0 marks an assistant's
message that is not learnt. A key without a value is no key: Arrow fills in what only other rows have.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_ggpo.data.table import Table
from lora_ggpo.errors import UserError

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's, LLaMA-Factory's and OpenAI's older names.
ALIASES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant", "function": "tool"}

PASSED_ON = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
"""What a message says beside its content, as the names are in chat templates."""

LEARNT = ("weight", "train", "training")
"""Whether a message is learnt: OpenAI's 0 or 1, Axolotl's true or false."""

PARTS = ("train_detail", "training_detail")
"""Axolotl's parts of a message that are learnt."""


@dataclass(frozen=True)
class MessageReader:
    """Reads the messages in one column of a table.

    Attributes:
        column: As error messages name it.
        unused: Counts the messages that have a key which means nothing here, by what a warning calls it.
        role, content: Keys of a message.
    """

    table: Table
    column: str
    unused: Counter[str]
    role: str = "role"
    content: str = "content"

    def read(self, value: object, row: int) -> list[Message]:
        """Return the messages of a row."""
        if not isinstance(value, list) or not value:
            raise self._wrong(f"column {self.column!r} must hold a list of messages", row)
        return [self._message(turn, row) for turn in value]

    def _message(self, turn: object, row: int) -> Message:
        given = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
        calls = self._calls(given, row)
        if not isinstance(turn, dict) or self.role not in turn or not (calls or self.content in turn):
            raise self._wrong(f'each message in {self.column!r} must have "{self.role}" and "{self.content}"', row)
        named = given.get(self.role)
        role = ALIASES.get(named, named) if isinstance(named, str) else named
        if not isinstance(role, str) or role not in ROLES:
            raise self._wrong(f"the role {named!r} in {self.column!r} is none of {', '.join(ROLES)}", row)
        message: Message = {"role": role}
        if self.content in given or not calls:
            message["content"] = self._content(given, row, empty=bool(calls) or role == "tool")
        if calls:
            message["tool_calls"] = calls
        message |= {key: given[key] for key in PASSED_ON if key in given and key != "tool_calls"}
        message = require_json(message, self.column, self.table, row)
        if not self._learnt(given, role, row):
            message["weight"] = 0
        for key in given.keys() - {self.role, self.content, "function_call", *PASSED_ON, *LEARNT, *PARTS}:
            self.unused[f"{key!r} of messages in {self.column!r}"] += 1
        return message

    def _content(self, given: Message, row: int, *, empty: bool) -> str:
        name = f"{self.column}.{self.content}"
        value = given.get(self.content)
        if isinstance(value, list):
            value = self._joined(value, name, row)
        return "" if empty and value == "" else self.table.require_text(value, name, row)

    def _joined(self, parts: list[object], name: str, row: int) -> str:
        """The text of OpenAI's list of content parts."""
        texts = []
        for part in parts:
            text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
            if not isinstance(text, str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise self._wrong(f"column {name!r} has a part that is no text ({kind}), and only text is learnt", row)
            texts.append(text)
        return "".join(texts)

    def _learnt(self, given: Message, role: str, row: int) -> bool:
        part = next((key for key in PARTS if given.get(key)), None)
        if part:
            raise self._wrong(
                f"a message in {self.column!r} is to be learnt in parts ({part}), which is not done here; split the "
                "row, or give the whole message a weight",
                row,
            )
        flags = {key: given[key] for key in LEARNT if key in given}
        for key, value in flags.items():
            if not isinstance(value, int | float) or value not in (0, 1):
                raise self._wrong(
                    f"{key!r} of a message in {self.column!r} must be 0 or 1, or false or true, not {value!r}", row
                )
        if role == "assistant":
            return all(flags.values())
        self.unused[f"the weight of messages in {self.column!r} that are not the assistant's"] += any(flags.values())
        return True

    def _calls(self, given: Message, row: int) -> list[Message]:
        """The tool calls of a message in OpenAI's form, their arguments as objects."""
        calls = given.get("tool_calls") or []
        if given.get("function_call"):  # OpenAI's older form of a single one
            calls = [given["function_call"]]
        if given.get(self.role) == "function_call":  # LLaMA-Factory's: JSON of one or several in the content
            found = parse_json(given.pop(self.content, None))
            calls = found if isinstance(found, list) else [found]
        if not isinstance(calls, list):
            raise self._wrong(f"'tool_calls' in {self.column!r} must be a list", row)
        return [self._call(call, row) for call in calls]

    def _call(self, call: object, row: int) -> Message:
        call = {key: value for key, value in call.items() if value is not None} if isinstance(call, dict) else {}
        function = call.get("function", {key: call[key] for key in ("name", "arguments") if key in call})
        arguments = parse_json(function.get("arguments") or {}) if isinstance(function, dict) else None
        if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
            raise self._wrong(
                f'a tool call in {self.column!r} must have a "name", and "arguments" that are a JSON object', row
            )
        return {
            "type": "function",
            **{key: value for key, value in call.items() if key not in ("function", "name", "arguments")},
            "function": {**function, "arguments": arguments},
        }

    def _wrong(self, what: str, row: int) -> UserError:
        return UserError(f"{self.table.where(row)}: {what}.")


def store(message: Message) -> dict[str, str]:
    """Return a message as a row of a dataset holds it: all but role and content is JSON, "more".

    Arrow would give each message all keys of all others.
    """
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    if "content" not in message:
        more["content"] = None
    stored = {"role": message["role"], "content": message.get("content", "")}
    return {**stored, "more": json.dumps(more)} if more else stored


def restore(stored: Mapping[str, str | None]) -> Message:
    """Return the message that `store` was given."""
    message = {"role": stored["role"], "content": stored["content"], **json.loads(stored.get("more") or "{}")}
    return {key: value for key, value in message.items() if key != "content" or value is not None}


def require_json(value: dict[str, Any], name: str, table: Table, row: int) -> dict[str, Any]:
    """Return `value` if it has a form in JSON, as all that reaches a chat template must, or else raise a UserError."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{table.where(row)}: column {name!r} holds what has no form in JSON ({error}).") from None
    return value


def parse_json(value: object) -> object:
    """Return what `value` is the JSON of, or `value` itself; None for text that is no JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None


def read_tools(value: object, column: str, table: Table, row: int) -> list[dict[str, Any]]:
    """Return a row's tools, given as a list or as its JSON, each in OpenAI's form."""
    tools = parse_json(value) if value else []
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        raise UserError(
            f"{table.where(row)}: column {column!r} must hold the tools that the assistant can call, as a list of "
            f"objects or its JSON; if it means something else, set data.ignore: [{column}]."
        )
    return [_tool(tool) for tool in tools]


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if "function" not in tool and "name" in tool and tool.get("type", "function") == "function":
        tool = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
    function = tool.get("function")
    if isinstance(function, dict) and isinstance(function.get("parameters"), str):
        tool = {**tool, "function": {**function, "parameters": parse_json(function["parameters"])}}
    return tool
