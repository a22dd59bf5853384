"""A tokenizer's chat template: what ends a turn in it, and the day that it writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from lora_ggpo.errors import UserError

_CONTENT = "Certainly"
REJECTIONS = (TemplateError, AttributeError, TypeError, KeyError, IndexError, ValueError)
"""What a chat template raises on messages that it does not take: its own word, or what its expressions run into."""

# A macro of the template's own goes before the function of the same name that transformers gives it, and since
# transformers lets templates see plain data only, it formats by replacing each directive.
_DIRECTIVES = ["%" + letter for letter in "aAbBcCdDeFgGhHIjkmMnpPrRSstTuUVwWxXyYzZ"]
_PADDED = ["%-" + letter for letter in "deHIjmMSUVWyu"]
_DATED = re.compile(r"\{# day (\S+) #\}\{% macro strftime_now.*?\{% endmacro \+%\}", re.DOTALL)


class Ending(NamedTuple):
    """How a chat template ends an assistant's turn.

    Attributes:
        token: The token that ends it, as text.
        id: And as its number.
        behind: What follows the token, which nothing generates: a line break, say.
    """

    token: str
    id: int
    behind: str

    def cut(self, turn: str) -> str:
        """`turn` without what follows its end.

        Raises:
            UserError: it does not end so.
        """
        head, found, tail = turn.rpartition(self.token)
        if not found or tail.strip() not in ("", self.behind.strip()):
            raise UserError(
                f"the tokenizer's chat template does not end this assistant's turn in {self.token}, as it does others, "
                "so the model could not learn to stop; use prompt and completion columns."
            )
        return head + found


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> Ending:
    """What ends an assistant's turn: the first special token that the chat template puts behind its content.

    It is the one rule for both sides: the last token of a turn that is learnt, and a token that ends generation.

    Raises:
        UserError: the template puts none there, or rejects a conversation of a question and an answer.
    """
    asked = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": _CONTENT}]
    try:
        text = str(tokenizer.apply_chat_template(asked, tokenize=False))
    except REJECTIONS as error:
        raise UserError(f"The tokenizer's chat template rejects a question with its answer: {error}.") from error
    tail = text.rpartition(_CONTENT)[2] if _CONTENT in text else ""
    added = {id_: token.special for id_, token in tokenizer.added_tokens_decoder.items()}
    added |= dict.fromkeys(map(int, tokenizer.all_special_ids), True)
    behind = [int(id_) for id_ in tokenizer(tail, add_special_tokens=False)["input_ids"] if id_ in added]
    special = [id_ for id_ in behind if added[id_]] or behind  # some tokenizers call none of their own tokens special
    if not special:
        raise UserError(
            f"The tokenizer's chat template ends an assistant's turn in {tail!r}, which is no special token, so a "
            f"model could not learn to stop; end it in {tokenizer.eos_token or 'a special token'} in the model's "
            "chat template, or use prompt and completion columns."
        )
    token = str(tokenizer.convert_ids_to_tokens(special[0]))
    return Ending(token, special[0], tail.partition(token)[2])


def writes_day(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes the present day (``strftime_now``)."""
    return "strftime_now" in str(tokenizer.chat_template)


def write_day(tokenizer: PreTrainedTokenizerBase, day: date) -> None:
    """Let the chat template write `day` as the present one, whenever it is rendered and by whom."""
    if writes_day(tokenizer):
        remove_day(tokenizer)
        _change(tokenizer, lambda template: _clock(day) + template)


def written_day(tokenizer: PreTrainedTokenizerBase) -> date | None:
    """The day of `write_day`; None for a template that writes none."""
    found = _DATED.search(str(tokenizer.chat_template))
    return date.fromisoformat(found[1]) if found else None


def remove_day(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the chat template be as it came with the model."""
    if written_day(tokenizer):
        _change(tokenizer, lambda template: _DATED.sub("", template, count=1))


def _clock(day: date) -> str:
    """Jinja that defines ``strftime_now`` for `day`."""
    values = {directive: day.strftime(directive) for directive in [*_PADDED, *_DIRECTIVES]}
    pairs = {"%%": "\0", **values, "\0": "%"}
    replaced = "".join(f"|replace({one!r}, {other!r})" for one, other in pairs.items())
    return f"{{# day {day.isoformat()} #}}{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro +%}}"


def _change(tokenizer: PreTrainedTokenizerBase, change: Callable[[str], str]) -> None:
    template: Any = tokenizer.chat_template
    several = isinstance(template, dict)
    tokenizer.chat_template = {k: change(v) for k, v in template.items()} if several else change(template)
