"""Classification by words: the model answers a prompt with the word of a label."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, Any, ClassVar

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
from lora_ggpo.tasks.forward import logits_at
from lora_ggpo.tasks.text import check_chat_template, continuation, render, start, tokens

if TYPE_CHECKING:
    from lora_ggpo.tasks.config import TaskConfig

# A row's "text", and "text_pair" if it has a second one.
Texts = Mapping[str, str]
# The tokens of a label word but the last.
Beginning = tuple[int, ...]


class LabelWords(ClassTask):
    """A class scores the log-probability of its whole label word given the prompt.

    Attributes:
        special_tokens: Whether the tokenizer puts its own around a prompt.
        words: One for each label: the labels' names, unless the settings give others.
    """

    settings = frozenset({"template", "label_words", "chat_template"})
    special_tokens: ClassVar[bool]

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

    @abstractmethod
    def log_probs(self, model: nn.Module, batch: Batch, beginnings: Iterable[Beginning]) -> Iterator[Tensor]:
        """For each beginning log-probabilities behind the prompt and each of its tokens: (batch, steps, vocabulary)."""

    def room(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Tokens that a prompt may have."""
        return self.config.max_length

    def word_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Tokens of each label word."""
        ids = [self.word(tokenizer, word) for word in self.words]
        for (i, one), (j, other) in permutations(enumerate(ids), 2):
            if other[: len(one)] == one:
                raise UserError(
                    f"task.label_words: {self.words[j]!r} begins with the tokens of {self.words[i]!r}, "
                    "so the longer one can never win; choose other words."
                )
        return ids

    def check(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.config.chat_template:
            check_chat_template(tokenizer)
        pairs = "text_pair" in dataset.column_names
        if self.config.takes_pair and not pairs:
            raise UserError("task.template has {text_pair}, but the data has one text only; set data.text_pair.")
        if pairs and not self.config.takes_pair:
            raise UserError(
                "The data has two texts, but task.template has no {text_pair}; put it where the second goes, or leave "
                "the second out by data.ignore: [text_pair]."
            )
        fixed = len(self._prompt_ids(tokenizer, {"text": "", "text_pair": ""}))
        room, most = self.room(tokenizer), self.config.max_length
        if fixed >= room:
            word = " and the longest label word take" if room < most else " takes"
            raise UserError(
                f"task.max_length = {most} leaves no room for the text: the template{word} {fixed + most - room} "
                "tokens; raise it."
            )

    def prompt(self, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> str:
        """The filled template. Spaces at its end are left out: the space belongs to the label word behind it."""
        prompt = self.config.fill(texts).rstrip(" ")
        if not self.config.chat_template:
            return prompt
        return render(tokenizer, [{"role": "user", "content": prompt}], {}, add_generation_prompt=True)

    def prompts(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[tuple[list[int], Row]]]:
        """Tokens of the prompts, and what is kept of their rows, chunk by chunk."""
        names = [name for name in ("text", "text_pair") if name in dataset.column_names]
        room, fill = self.room(tokenizer), partial(self._prompt_ids, tokenizer)
        for begin in range(0, len(dataset), CHUNK):
            rows = dataset.select(range(begin, min(begin + CHUNK, len(dataset)))).to_list()
            prompts = [self.prompt(tokenizer, row) for row in rows]
            encoded = tokenizer(prompts, add_special_tokens=self.special_tokens, verbose=False)["input_ids"]
            yield [
                (
                    ids if len(ids) <= room else _cut_to_fit(fill, {name: row[name] for name in names}, room),
                    {name: row[name] for name in ("id", "label") if name in row},
                )
                for ids, row in zip(encoded, rows, strict=True)
            ]

    def scorer(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Score:
        """Summed log-probabilities of the label words, (batch, words)."""
        words = self.word_ids(tokenizer)
        passes = _passes(words)

        def score(batch: Batch) -> Tensor:
            scores = torch.empty(len(batch["input_ids"]), len(words), dtype=torch.float64)
            for log_probs, members in zip(self.log_probs(model, batch, passes), passes.values(), strict=True):
                for member in members:
                    ids = torch.tensor(words[member], device=log_probs.device)
                    steps = torch.arange(len(ids), device=log_probs.device)
                    scores[:, member] = log_probs[:, steps, ids].double().sum(dim=1).cpu()
            return scores

        return score

    def _prompt_ids(self, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> list[int]:
        return tokens(tokenizer, self.prompt(tokenizer, texts), self.special_tokens)


class CausalClassification(LabelWords):
    """The word follows the prompt in one sequence; it alone is learnt."""

    architecture = CAUSAL
    special_tokens = False

    def word(self, tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
        context = self.prompt(tokenizer, {"text": "x", "text_pair": "x"})
        # After a line break (as chat templates end) a word starts without a space, elsewhere with one.
        return continuation(tokenizer, context, word if context.endswith("\n") else f" {word}")

    def room(self, tokenizer: PreTrainedTokenizerBase) -> int:
        # One room for all labels: length must not tell them.
        return self.config.max_length - len(self._start(tokenizer)) - max(map(len, self.word_ids(tokenizer)))

    def rows(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[list[Row]]:
        words, first = self.word_ids(tokenizer), self._start(tokenizer)
        for prompts in self.prompts(dataset, tokenizer):
            rows = []
            for ids, kept in prompts:
                prompt, word = first + ids, words[kept["label"]]
                rows.append(encoded_row(prompt + word, [NO_LOSS] * len(prompt) + word, **kept))
            yield rows

    def log_probs(self, model: nn.Module, batch: Batch, beginnings: Iterable[Beginning]) -> Iterator[Tensor]:
        lengths = (batch["labels"] != NO_LOSS).int().argmax(dim=1)
        rows = torch.arange(len(lengths), device=lengths.device)[:, None]
        for beginning in beginnings:
            ids, mask = _prompts_with(batch, lengths, beginning)
            positions = lengths[:, None] - 1 + torch.arange(len(beginning) + 1, device=ids.device)
            kept, where = torch.unique(positions, return_inverse=True)
            yield logits_at(model, ids, mask, kept)[rows, where].float().log_softmax(dim=-1)

    def _start(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return [] if self.config.chat_template else start(tokenizer)


class Seq2SeqClassification(LabelWords):
    """The encoder reads the prompt, the decoder learns the word and its end."""

    architecture = ENCODER_DECODER
    special_tokens = True

    def word(self, tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
        return list(tokenizer(text_target=word)["input_ids"])

    def rows(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[list[Row]]:
        words = self.word_ids(tokenizer)
        for prompts in self.prompts(dataset, tokenizer):
            yield [encoded_row(ids, words[kept["label"]], **kept) for ids, kept in prompts]

    def log_probs(self, model: nn.Module, batch: Batch, beginnings: Iterable[Beginning]) -> Iterator[Tensor]:
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        prompt: dict[str, Any] = {"input_ids": batch["input_ids"]}
        for beginning in beginnings:
            word = torch.tensor([*beginning, 0], device=batch["input_ids"].device)  # what comes last is not read
            output = model(
                **prompt,
                attention_mask=batch["attention_mask"],
                decoder_input_ids=base.prepare_decoder_input_ids_from_labels(
                    labels=word.expand(len(batch["input_ids"]), -1)
                ),
                use_cache=False,
            )
            prompt = {"encoder_outputs": (output.encoder_last_hidden_state,)}  # read once for all words
            yield output.logits.float().log_softmax(dim=-1)


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


def _passes(words: list[list[int]]) -> dict[Beginning, list[int]]:
    """The forward passes that score the words: the beginning of a word each, and the words that it serves.

    A word is scored from the logits behind the prompt and behind each of its tokens but the last. So one forward pass
    serves all words that share these tokens: one in all where every word is a single token.
    """
    beginnings = sorted({tuple(word[:-1]) for word in words}, key=len, reverse=True)
    passes: dict[Beginning, list[int]] = {}
    for beginning in beginnings:
        longer = next((other for other in passes if other[: len(beginning)] == beginning), beginning)
        passes.setdefault(longer, []).extend(i for i, word in enumerate(words) if tuple(word[:-1]) == beginning)
    return passes


def _prompts_with(batch: Batch, prompt_lengths: Tensor, beginning: Beginning) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) of the prompts, each with `beginning` behind it instead of its completion."""
    width = int(prompt_lengths.max()) + len(beginning)
    ids = F.pad(batch["input_ids"], (0, max(0, width - batch["input_ids"].shape[1])))[:, :width].clone()
    columns = torch.arange(width, device=ids.device)
    for step, token in enumerate(beginning):
        ids[columns == (prompt_lengths + step)[:, None]] = token
    return ids, (columns < (prompt_lengths + len(beginning))[:, None]).long()
