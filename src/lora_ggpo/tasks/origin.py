"""All that shapes the encoded rows of a task, so that they need not be made again while it stays the same."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lora_ggpo.data.kept import digest_of_rows
from lora_ggpo.models.chat_template import writes_day, written_day

if TYPE_CHECKING:
    from lora_ggpo.tasks.base import Task


def origin(task: Task, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Any] | None:
    """The task, its settings, the tokenizer and the rows of the set `name`, as JSON has them.

    None where they do not tell all: of a task or a tokenizer whose code is not of this package or of tokenizers.
    """
    facts = _of_tokenizer(tokenizer)
    if facts is None or not type(task).__module__.startswith("lora_ggpo."):
        return None
    return {
        "task": type(task).__qualname__,
        "settings": task.config.model_dump(mode="json"),
        "labels": task.labels,
        "set": name,
        "tokenizer": facts,
        "rows": digest_of_rows(dataset),
    }


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any] | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    backend.no_truncation()  # what the call before left behind; each call sets its own
    backend.no_padding()
    today = writes_day(tokenizer) and not written_day(tokenizer)
    template = tokenizer.chat_template
    return [
        type(tokenizer).__qualname__,
        backend.to_str(),
        template if template is None or isinstance(template, dict) else str(template),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.model_input_names,
        tokenizer.truncation_side,
        tokenizer.split_special_tokens,
        tokenizer.model_max_length,
        date.today().isoformat() if today else None,
    ]
