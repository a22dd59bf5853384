"""Text becomes tokens, and conversations become text: in the tokenizer's chat template, turn by turn."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_ggpo.data.messages import Message, restore
from lora_ggpo.errors import UserError
from lora_ggpo.models.chat_template import REJECTIONS, Ending

# These only say which message is meant, or are looked at elsewhere.
_NOT_SHOWN = {"role", "content", "weight", "tool_call_id"}
_MARK = "\ue000"  # a private character, which no template holds


def tokens(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool = False) -> list[int]:
    """The tokens of `text`."""
    return list(tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"])


def start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token where the tokenizer puts one; chat templates write their own."""
    first = list(tokenizer("")["input_ids"][:1])
    return first if first == [tokenizer.bos_token_id] else []


def continuation(tokenizer: PreTrainedTokenizerBase, context: str, text: str) -> list[int]:
    """Tokens of `text` behind `context`, whose own tokens stand, as they do when a model generates.

    The two are tokenised together unless a token would straddle the border; then the text is on its own.
    """
    return appended(tokenizer, tokens(tokenizer, context), tokens(tokenizer, context + text), text)


def appended(tokenizer: PreTrainedTokenizerBase, before: list[int], joint: list[int], text: str) -> list[int]:
    """`continuation` of the tokens `before`; `joint` are those of the context and `text` together."""
    return joint[len(before) :] if joint[: len(before)] == before else tokens(tokenizer, text)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message]) -> list[int]:
    """Tokens of a prompt as they precede a completion in what the task sft learns.

    Args:
        prompt: Text as it stands, or messages ({"role", "content"}) that the chat template renders up to where the
            assistant's next turn begins.
    """
    if isinstance(prompt, str):
        return start(tokenizer) + tokens(tokenizer, prompt)
    check_chat_template(tokenizer)
    return tokens(tokenizer, render(tokenizer, prompt, {}, add_generation_prompt=True))


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a UserError if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            "The tokenizer has no chat template, which task.chat_template and messages need (as rows with a system "
            "prompt, a history or tools are); use prompt and completion columns, or an instruction-tuned model."
        )


# --- conversations -------------------------------------------------------------------------------------------------


def conversation(row: Mapping[str, Any]) -> tuple[list[Message], dict[str, Any]]:
    """The messages of a row as `CompletionReader` makes it, and further arguments of the chat template."""
    return [restore(turn) for turn in row["messages"]], json.loads(row.get("template") or "{}")


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    arguments: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
) -> str:
    """The text of a conversation.

    Args:
        arguments: Further ones of the chat template, such as tools.
    """
    shown = [_without(message, "weight") for message in messages]
    options: dict[str, Any] = {**arguments, "tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        return str(tokenizer.apply_chat_template(shown, **options))
    except REJECTIONS as error:
        raise UserError(f"the tokenizer's chat template rejects the messages: {error}") from error


def learnt_turns(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], arguments: Mapping[str, Any], end: Ending
) -> list[tuple[str, bool]]:
    """Pieces of a conversation, and whether they are learnt: what each turn of the assistant, unless its weight is 0,
    adds to the conversation before it.
    """
    segments: list[tuple[str, bool]] = []
    done = ""
    for position, message in enumerate(messages):
        if message["role"] != "assistant" or not message.get("weight", 1):
            continue
        before = render(tokenizer, messages[:position], arguments, add_generation_prompt=True)
        after = _behind_prompt(tokenizer, messages[: position + 1], arguments, before)
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


def _behind_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], arguments: Mapping[str, Any], before: str
) -> str:
    """The text of the last message, an assistant's, as a model generates it behind `before`.

    Args:
        before: The messages ahead of it with the generation prompt. Where that opens what the template leaves out of
            the message, such as "<think>", the message's own content is what follows it.
    """
    whole = render(tokenizer, messages, arguments, add_generation_prompt=False)
    if whole.startswith(before):
        return whole[len(before) :]
    marked = [*messages[:-1], {**messages[-1], "content": _MARK}]
    ahead, _, behind = render(tokenizer, marked, arguments, add_generation_prompt=False).partition(_MARK)
    opened, content = before[len(ahead) :], messages[-1].get("content", "").lstrip()
    if not before.startswith(ahead) or not opened.strip() or "tool_calls" in messages[-1]:
        raise UserError(
            "the tokenizer's chat template changes earlier turns as the conversation grows, so the assistant's turns "
            "cannot be told apart; use prompt and completion columns, or another model."
        )
    if not content.startswith(opened.strip()):
        raise UserError(
            f"the chat template's generation prompt ends in {opened!r}, which is what answers are generated behind, "
            f"but this one does not begin with {opened.strip()!r}; write it as it is to be generated, with its "
            "thoughts or with an empty thought."
        )
    return content.removeprefix(opened if content.startswith(opened) else opened.strip()) + behind


class UnusedFields:
    """Finds the fields of conversations that a chat template makes no use of: without them it gives the same text.

    Args:
        name: Of the set, as the warning names it; "" for none.
    """

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._rows: Counter[str] = Counter()

    def look(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message], arguments: Mapping[str, Any]) -> None:
        """Count the unused fields of a row; refuse tool calls that would be learnt as silent turns."""
        fields = {key for message in messages for key in message} - _NOT_SHOWN
        if not fields and not arguments:
            return
        whole = render(tokenizer, messages, arguments, add_generation_prompt=False)
        for name in arguments.keys() - {"tools"}:
            self._rows[name] += name not in str(tokenizer.chat_template)  # it may well be given as it is by default
        if "tools" in arguments:
            self._rows["tools"] += _gives(whole, tokenizer, messages, _without(arguments, "tools"))
        for name in sorted(fields):
            same = _gives(whole, tokenizer, [_without(message, name) for message in messages], arguments)
            if same and name == "tool_calls":
                raise UserError(
                    "the tokenizer's chat template makes no use of tool_calls, so they would not be learnt; use a "
                    "model whose template does, or write the calls into the content."
                )
            self._rows[name] += same

    def report(self) -> None:
        """Name them in one warning, with the number of rows."""
        found = [f"{name} ({rows:,})" for name, rows in sorted(self._rows.items()) if rows]
        if found:
            prefix = f"{self._name}: " if self._name else ""
            warnings.warn(
                f"{prefix}The tokenizer's chat template makes no use of these, in so many rows: {', '.join(found)}.",
                stacklevel=4,
            )


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def _gives(
    text: str, tokenizer: PreTrainedTokenizerBase, messages: list[Message], arguments: Mapping[str, Any]
) -> bool:
    try:
        return render(tokenizer, messages, arguments, add_generation_prompt=False) == text
    except UserError:
        return False
