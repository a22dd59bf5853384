"""Text becomes tokens: as they stand in one sequence, and as a model would generate them one behind the other."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lora_ggpo.data.messages import Message
from lora_ggpo.errors import UserError
from lora_ggpo.tasks.conversation import render


def tokens(tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool = False) -> list[int]:
    """The tokens of `text`."""
    return list(tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"])


def start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token where the tokenizer puts one; chat templates write their own."""
    first = list(tokenizer("")["input_ids"][:1])
    return first if first == [tokenizer.bos_token_id] else []


def continuation(
    tokenizer: PreTrainedTokenizerBase, context: str, text: str, context_ids: list[int] | None = None
) -> list[int]:
    """Tokens of `text` behind `context`, whose own tokens stand, as they do when a model generates.

    The two are tokenised together unless a token would straddle the border; then the text is on its own.
    """
    before = tokens(tokenizer, context) if context_ids is None else context_ids
    joint = tokens(tokenizer, context + text)
    return joint[len(before) :] if joint[: len(before)] == before else tokens(tokenizer, text)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message]) -> list[int]:
    """Tokens of a prompt as they precede a completion in what the task sft learns.

    Args:
        prompt: Text as it stands, or messages ({"role", "content"}) that the chat template renders up to where the
            assistant's next turn begins.

    Raises:
        UserError: the tokenizer has no chat template, or it rejects the messages.
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
