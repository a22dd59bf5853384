"""Classification by words: the model answers a prompt with the word of a label."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from lora_ggpo.errors import UserError
from lora_ggpo.models.architecture import CAUSAL, ENCODER_DECODER
from lora_ggpo.tasks.base import CHUNK, NO_LOSS, Batch, Row, Score, encoded_row
from lora_ggpo.tasks.classification import ClassTask
from lora_ggpo.tasks.conversation import render
from lora_ggpo.tasks.forward import logits_at
from lora_ggpo.tasks.tokens import check_chat_template, continuation, start, tokens

if TYPE_CHECKING:
    from lora_ggpo.tasks.config import TaskConfig

# A row's "text", and "text_pair" if it has a second one.
Texts = Mapping[str, str]


class LabelWords(ClassTask):
    """A class scores the log-probability of its whole label word given the prompt.

    Attributes:
        words: One for each label: the labels' names, unless the settings give others.
    """

    settings = frozenset({"template", "label_words", "chat_template"})

    def __init__(self, config: TaskConfig, labels: list[str] | None = None) -> None:
        super().__init__(config, labels)
        self.words = config.label_words or [label.strip() for label in labels or ()]
        if labels is not None and len(self.words) != len(labels):
            raise UserError(
                f"task.label_words has {len(self.words)} entries, but the data has {len(labels)} labels: "
                f"{', '.join(labels)}; give one word for each label."
            )

    @abstractmethod
    def word(self, tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
        """Tokens of a label word as they are learnt."""

    def word_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Tokens of each label word.

        Raises:
            UserError: those of one begin with those of another, which then could never win.
        """
        ids = [self.word(tokenizer, word) for word in self.words]
        for i, one in enumerate(ids):
            for j, other in enumerate(ids):
                if i != j and other[: len(one)] == one:
                    raise UserError(
                        f"task.label_words: {self.words[j]!r} begins with the tokens of {self.words[i]!r}, "
                        "so the longer one can never win; choose other words."
                    )
        return ids

    def check(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
        """The template must have a place for each text, and leave room for them."""
        if self.config.chat_template:
            check_chat_template(tokenizer)
        pairs = "text_pair" in dataset.column_names
        if self.config.takes_pair and not pairs:
            raise UserError("task.template has {text_pair}, but the data has one text only; set data.text_pair.")
        if pairs and not self.config.takes_pair:
            raise UserError(
                "The data has two texts, but task.template has no {text_pair}; put it where the second goes."
            )

    def prompt(self, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> str:
        """The filled template. Spaces at its end are left out: the space belongs to the label word behind it."""
        prompt = self.config.fill(texts).rstrip(" ")
        if not self.config.chat_template:
            return prompt
        return render(tokenizer, [{"role": "user", "content": prompt}], {}, add_generation_prompt=True)

    def prompts(
        self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, room: int, *, special_tokens: bool
    ) -> Iterator[list[tuple[list[int], Row]]]:
        """Tokens of the prompts, each at most `room`, and what is kept of their rows, chunk by chunk."""

        def ids_of(texts: Texts) -> list[int]:
            return tokens(tokenizer, self.prompt(tokenizer, texts), special_tokens)

        names = [name for name in ("text", "text_pair") if name in dataset.column_names]
        kept = [name for name in ("id", "label") if name in dataset.column_names]
        fixed, most = len(ids_of(dict.fromkeys(names, ""))), self.config.max_length
        if fixed >= room:
            word = " and the longest label word take" if room < most else " takes"
            raise UserError(
                f"task.max_length = {most} leaves no room for the text: the template{word} {fixed + most - room} "
                "tokens; raise it."
            )
        for begin in range(0, len(dataset), CHUNK):
            rows = dataset.select(range(begin, min(begin + CHUNK, len(dataset)))).to_list()
            texts = [{name: row[name] for name in names} for row in rows]
            prompts = [self.prompt(tokenizer, one) for one in texts]
            encoded = tokenizer(prompts, add_special_tokens=special_tokens, verbose=False)["input_ids"]
            yield [
                (
                    ids if len(ids) <= room else _cut_to_fit(ids_of, one, room),
                    {name: row[name] for name in kept},
                )
                for ids, one, row in zip(encoded, texts, rows, strict=True)
            ]


class CausalClassification(LabelWords):
    """The word follows the prompt; it alone is learnt."""

    architecture = CAUSAL

    def word(self, tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
        """The tokens behind a prompt: after a line break, as chat templates end, without a space before them."""
        context = self.prompt(tokenizer, {"text": "x", "text_pair": "x"})
        return continuation(tokenizer, context, word if context.endswith("\n") else f" {word}")

    def rows(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[list[Row]]:
        """Prompt and word in one sequence."""
        words = self.word_ids(tokenizer)
        first = [] if self.config.chat_template else start(tokenizer)
        # One room for all labels: length must not tell them.
        room = self.config.max_length - len(first) - max(map(len, words))
        for prompts in self.prompts(dataset, tokenizer, room, special_tokens=False):
            rows = []
            for ids, kept in prompts:
                prompt, word = first + ids, words[kept["label"]]
                rows.append(encoded_row(prompt + word, [NO_LOSS] * len(prompt) + word, **kept))
            yield rows

    def scorer(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Score:
        """Summed log-probabilities of the label words behind the prompt, (batch, words)."""
        words = self.word_ids(tokenizer)
        passes = _passes(words)

        def score(batch: Batch) -> Tensor:
            prompt_lengths = (batch["labels"] != NO_LOSS).int().argmax(dim=1)
            scores = torch.empty(len(prompt_lengths), len(words), dtype=torch.float64)
            for beginning, members in passes.items():
                ids, mask = _prompts_with(batch, prompt_lengths, beginning)
                steps = torch.arange(len(beginning) + 1, device=ids.device)
                log_probs = _log_probs_at(model, ids, mask, prompt_lengths[:, None] - 1 + steps)
                for member in members:
                    scores[:, member] = _word_log_prob(log_probs, words[member])
            return scores

        return score


class Seq2SeqClassification(LabelWords):
    """The encoder reads the prompt, the decoder learns the word and its end."""

    architecture = ENCODER_DECODER

    def word(self, tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
        """The tokens as a decoder generates them, end included."""
        return list(tokenizer(text_target=word)["input_ids"])

    def rows(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[list[Row]]:
        """The prompt, and the word as labels."""
        words = self.word_ids(tokenizer)
        for prompts in self.prompts(dataset, tokenizer, self.config.max_length, special_tokens=True):
            yield [encoded_row(ids, words[kept["label"]], **kept) for ids, kept in prompts]

    def scorer(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Score:
        """Summed log-probabilities of the label words and their ends from the decoder, (batch, words)."""
        words = self.word_ids(tokenizer)
        passes = _passes(words)
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model

        def score(batch: Batch) -> Tensor:
            rows, device = len(batch["input_ids"]), batch["input_ids"].device
            scores = torch.empty(rows, len(words), dtype=torch.float64)
            prompt: dict[str, Any] = {"input_ids": batch["input_ids"]}
            for beginning, members in passes.items():
                word = torch.tensor([*beginning, 0], device=device).expand(rows, -1)  # what comes last is not read
                decoder_ids = base.prepare_decoder_input_ids_from_labels(labels=word)
                output = model(
                    **prompt, attention_mask=batch["attention_mask"], decoder_input_ids=decoder_ids, use_cache=False
                )
                prompt = {"encoder_outputs": (output.encoder_last_hidden_state,)}  # read once for all words
                log_probs = output.logits.float().log_softmax(dim=-1)
                for member in members:
                    scores[:, member] = _word_log_prob(log_probs, words[member])
            return scores

        return score


def _cut_to_fit(ids_of: Callable[[Texts], list[int]], texts: Texts, room: int) -> list[int]:
    """Tokens of the prompt with as much of the beginning of each text as `room` allows; the template stays whole.

    All texts are held to one length in characters, so that the longer of two is cut first.
    """

    def cut(characters: int) -> list[int]:
        return ids_of({name: text[:characters] for name, text in texts.items()})

    longest = max(map(len, texts.values()))
    end = 4 * room  # about as many characters as fit; the search must not tokenise a very long text again and again
    while end < longest and len(cut(end)) <= room:
        end *= 2
    fits = bisect_right(range(min(end, longest) + 1), room, key=lambda n: len(cut(n)))
    return cut(fits - 1)


def _passes(words: list[list[int]]) -> dict[tuple[int, ...], list[int]]:
    """The forward passes that score the words: the beginning of a word each, and the words that it serves.

    A word is scored from the logits behind the prompt and behind each of its tokens but the last. So one forward pass
    serves all words that share these tokens: one in all where every word is a single token.
    """
    beginnings = sorted({tuple(word[:-1]) for word in words}, key=len, reverse=True)
    passes: dict[tuple[int, ...], list[int]] = {}
    for beginning in beginnings:
        longer = next((other for other in passes if other[: len(beginning)] == beginning), beginning)
        passes.setdefault(longer, []).extend(i for i, word in enumerate(words) if tuple(word[:-1]) == beginning)
    return passes


def _word_log_prob(log_probs: Tensor, word: list[int]) -> Tensor:
    """Summed log-probability of the word's tokens, (batch,), from (batch, steps, vocabulary)."""
    steps, ids = torch.arange(len(word), device=log_probs.device), torch.tensor(word, device=log_probs.device)
    return log_probs[:, steps, ids].double().sum(dim=1).cpu()


def _prompts_with(batch: Batch, prompt_lengths: Tensor, beginning: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) of the prompts, each with `beginning` behind it instead of its completion."""
    width = int(prompt_lengths.max()) + len(beginning)
    ids = F.pad(batch["input_ids"], (0, max(0, width - batch["input_ids"].shape[1])))[:, :width].clone()
    columns = torch.arange(width, device=ids.device)
    for step, token in enumerate(beginning):
        ids[columns == (prompt_lengths + step)[:, None]] = token
    return ids, (columns < (prompt_lengths + len(beginning))[:, None]).long()


def _log_probs_at(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Log-probabilities of the next token behind `positions` (batch, k) of each sequence: (batch, k, vocabulary)."""
    kept, where = torch.unique(positions, return_inverse=True)
    logits = logits_at(model, ids, mask, kept)
    return logits[torch.arange(len(ids), device=ids.device)[:, None], where].float().log_softmax(dim=-1)
