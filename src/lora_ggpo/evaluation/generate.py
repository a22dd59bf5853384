"""Batched generation with a key-value cache, whose answers are kept in a file of JSON lines as they come.

What an answer is depends on the model, the prompt, the sampling and its own number alone: its random numbers are made
from (seed, prompt's id, number of the sample), so neither the batch nor the order nor a resumption changes them. What
remains is rounding: in batches of another shape logits differ in their last digits, and where two tokens are that close
the other one may be chosen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TopPLogitsWarper,
)

from lora_ggpo.errors import DivergedError, UserError
from lora_ggpo.models.load import check_tokens
from lora_ggpo.tasks.base import Progress
from lora_ggpo.tasks.forward import autocasting, evaluating
from lora_ggpo.workspace.files import json_digest, mend_json_lines, numbered_json_lines
from lora_ggpo.workspace.interrupt import Interrupted

_COLDEST, _HOTTEST = 1e-3, 100.0

Key = tuple[str, int]
"""An answer's prompt and the number of the sample."""


class Prompt(NamedTuple):
    """The tokens that an answer follows, and a name that is its own among the prompts."""

    id: str
    ids: list[int]

    @property
    def digest(self) -> str:
        """Tells prompts of another text apart."""
        return json_digest(self.ids)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 takes the most probable token.
        top_p: Draw from the most probable tokens that together have at least this probability.
        samples: Answers to each prompt.
        seed: Of the draws.
        stop: Texts in front of which an answer ends; it goes on no further once one is complete.

    Raises:
        UserError: a value is out of its range, or changes nothing.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option, value, fits, valid in (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
            ("--samples", self.samples, self.samples >= 1, "1 or more"),
            ("--seed", self.seed, self.seed >= 0, "0 or more"),
            (
                "--temperature",
                self.temperature,
                self.temperature == 0 or _COLDEST <= self.temperature <= _HOTTEST,
                f"0, which takes the most probable token, or from {_COLDEST:g} to {_HOTTEST:g}",
            ),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not fits:  # nan fits nowhere
                raise UserError(f"{option} is {value:g}; it must be {valid}.")
        pointless = "--samples" if self.samples > 1 else "--top-p" if self.top_p < 1 else None
        if pointless and not self.temperature:
            raise UserError(
                f"{pointless} needs a --temperature above 0: without it the most probable token is taken each time."
            )


@dataclass(frozen=True)
class Answer:
    """A generated text.

    Attributes:
        id, sample: Its prompt and number.
        prompt: Digest of the prompt.
        text: As generated; begins with a space where the model put one.
        tokens: Number of them, the end-of-text token included.
        finish: "stop" at an end-of-text token or a stop string, "length" at the longest answer.
    """

    id: str
    sample: int
    prompt: str
    text: str
    tokens: int
    finish: str

    @property
    def key(self) -> Key:
        return self.id, self.sample


_ANSWER = TypeAdapter(Answer)


class AnswerFile:
    """Answers by their keys, and a file with a line for each; None keeps them in memory alone.

    What is there stays: only a last line that a crash has cut short is dropped.

    Raises:
        UserError: a line holds no answer; the file is as it was.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.answers: dict[Key, Answer] = {}
        for number, row in numbered_json_lines(path) if path else ():
            try:
                answer = _ANSWER.validate_python(row)
            except ValidationError as error:
                raise UserError(
                    f"{path}, line {number} is damaged: it holds no answer; mend that line or delete it."
                ) from error
            self.answers[answer.key] = answer
        if path and path.exists():
            mend_json_lines(path)

    def missing(self, prompts: Sequence[Prompt], samples: int) -> list[tuple[Prompt, int]]:
        """The prompts and numbers that have no answer yet.

        Raises:
            UserError: an answer that is there belongs to another prompt.
        """
        digests = {prompt.id: prompt.digest for prompt in prompts}
        for answer in self.answers.values():
            if digests.get(answer.id, answer.prompt) != answer.prompt:
                raise UserError(
                    f"{self._path} holds an answer to another prompt under the name {answer.id}: the data or the "
                    "template has changed; choose another --output."
                )
        return [(one, sample) for one in prompts for sample in range(samples) if (one.id, sample) not in self.answers]

    def add(self, answers: Iterable[Answer]) -> None:
        """Keep `answers`."""
        answers = list(answers)
        self.answers |= {answer.key: answer for answer in answers}
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers))
            file.flush()
            os.fsync(file.fileno())


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    kept: AnswerFile,
    *,
    batch_size: int = 16,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[Key, Answer]:
    """Answer `prompts`; what `kept` has is not generated again, and what is new is put there batch by batch.

    Args:
        batch_size: Answers at a time, of prompts of like length, the longest first.
        autocast: As in `lora_ggpo.tasks.Task.score`.
        progress: Called as progress(answers there, answers in all) at the beginning and after each batch.

    Returns:
        All answers to `prompts`, by prompt and number.

    The model is used in eval mode, where LoRA-GGPO adds no noise, and its modules' modes are restored at the end.

    Raises:
        UserError: a prompt leaves no room for an answer, `kept` has answers to other prompts, or memory runs out.
        Interrupted: Ctrl-C; what was generated is kept.
    """
    todo = kept.missing(prompts, sampling.samples)
    check_tokens(model, tokenizer, (prompt.ids for prompt, _ in todo), "Prompt")
    _check_room(tokenizer, [prompt for prompt, _ in todo], sampling)
    todo.sort(key=lambda one: (-len(one[0].ids), one[0].id, one[1]))
    total = len(prompts) * sampling.samples
    with _resumable(lambda: f"{total - len(todo)} of {total} answers"), evaluating(model):
        while todo:
            if progress:
                progress(total - len(todo), total)
            batch, rest = todo[:batch_size], todo[batch_size:]
            with autocasting(_device(model), autocast):
                kept.add(_answers(model, tokenizer, batch, sampling))
            todo = rest
    if progress:
        progress(total, total)
    return {(one.id, sample): kept.answers[one.id, sample] for one in prompts for sample in range(sampling.samples)}


def end_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: what `load_model` found to end texts and turns, and the tokenizer's own."""
    given: Any = _base(model).generation_config.eos_token_id
    known = given if isinstance(given, list) else [given]
    return sorted({int(token) for token in [*known, tokenizer.eos_token_id] if token is not None})


def generation_arguments(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    start: int,
    draws: Tensor,
) -> dict[str, Any]:
    """Arguments of transformers' `generate` for prompts of `start` tokens; `draws` (rows, new tokens) are in [0, 1)."""
    chosen = [_finite, *([_Draw(sampling, start, draws)] if sampling.temperature else [])]
    stops = [_Stops(tokenizer, sampling.stop, start)] if sampling.stop else []
    return {
        # Drawing is left to the processor, whose random numbers do not depend on the batch.
        "generation_config": GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=end_tokens(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        ),
        "logits_processor": LogitsProcessorList(chosen),
        "stopping_criteria": StoppingCriteriaList(stops),
    }


def draws(seed: int, key: Key, count: int) -> Tensor:
    """`count` numbers in [0, 1) that are this answer's own."""
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


@contextmanager
def plain_generation(model: PreTrainedModel | PeftModel) -> Iterator[Any]:
    """The model without adapter wrapper and without the settings of generation it came with.

    Files of models hold a temperature or a repetition penalty, which would change the scores without being named.
    """
    base = _base(model)
    came_with = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield base
    finally:
        base.generation_config = came_with


# --- a batch -------------------------------------------------------------------------------------------------------


def _answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[tuple[Prompt, int]],
    sampling: Sampling,
) -> list[Answer]:
    device = _device(model)
    start = max(len(prompt.ids) for prompt, _ in batch)
    ids, mask = _padded_left([prompt.ids for prompt, _ in batch], int(tokenizer.pad_token_id), start)
    numbers = [draws(sampling.seed, (prompt.id, sample), sampling.max_new_tokens) for prompt, sample in batch]
    arguments = generation_arguments(model, tokenizer, sampling, start, torch.stack(numbers).to(device))
    with plain_generation(model) as base:
        rows = base.generate(ids.to(device), attention_mask=mask.to(device), **arguments)
    ends = {*end_tokens(model, tokenizer), int(tokenizer.pad_token_id)}
    return [
        _answer(tokenizer, prompt, sample, row, ends, sampling)
        for (prompt, sample), row in zip(batch, rows[:, start:].tolist(), strict=True)
    ]


def _answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, sample: int, row: list[int], ends: set[int], sampling: Sampling
) -> Answer:
    ended = next((place for place, token in enumerate(row) if token in ends), None)
    tokens = row if ended is None else row[:ended]
    text = _text_behind(tokenizer, prompt.ids, tokens)
    stopped = [place for stop in sampling.stop if (place := text.find(stop)) >= 0]
    finish = "length" if ended is None and not stopped else "stop"
    return Answer(
        prompt.id, sample, prompt.digest, text[: min(stopped, default=None)], len(tokens) + (ended is not None), finish
    )


def _text_behind(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that `tokens` add behind `before`: decoded alone, some tokenizers' would lose their first space."""
    context = list(before)
    shown = tokenizer.decode(context, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = tokenizer.decode([*context, *tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(whole)[len(str(shown)) :]


def _padded_left(rows: list[list[int]], pad: int, width: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), each (rows, width)."""
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _finite(_: Any, scores: Any) -> Any:
    if scores.isnan().any():
        raise DivergedError("The model's outputs are not finite: training has diverged, or the weights are damaged.")
    return scores


class _Draw(LogitsProcessor):
    """Leaves each row the one token that its own random number chooses: the inverse of the cumulated probabilities."""

    def __init__(self, sampling: Sampling, start: int, numbers: Tensor) -> None:
        self._temperature, self._start, self._numbers = sampling.temperature, start, numbers
        self._top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        step = input_ids.shape[1] - self._start
        scores = scores / self._temperature
        if self._top_p:
            scores = self._top_p(input_ids, scores)
        cumulated = scores.double().softmax(dim=-1).cumsum(dim=-1)
        number = self._numbers[:, step, None] * cumulated[:, -1:]  # rounding leaves the last one a little off 1
        token = torch.searchsorted(cumulated, number, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class _Stops(StoppingCriteria):
    """Ends a row once its new text holds a stop string; transformers' own would also see one that the prompt began."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], start: int) -> None:
        self._tokenizer, self._stops, self._start = tokenizer, stops, start
        self._window = max(len(stop.encode()) for stop in stops) + 1  # a token has a byte at least

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        begin = max(self._start, input_ids.shape[1] - self._window)
        rows = (_text_behind(self._tokenizer, row[:1], row[1:]) for row in input_ids[:, begin - 1 :].tolist())
        ended = [any(stop in text for stop in self._stops) for text in rows]
        return torch.tensor(ended, device=input_ids.device)


def _check_room(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], sampling: Sampling) -> None:
    limit = tokenizer.model_max_length
    longest = max(prompts, key=lambda prompt: len(prompt.ids), default=None)
    if longest and len(longest.ids) + sampling.max_new_tokens > limit:
        raise UserError(
            f"The prompt {longest.id} has {len(longest.ids)} tokens; with {sampling.max_new_tokens} of an answer that "
            f"is more than the {limit} that the model can read: lower --max-new-tokens."
        )


@contextmanager
def _resumable(there: Any) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"Stopped; {there()} are kept: give the same command again to go on from there.") from error
    except torch.OutOfMemoryError as error:
        raise UserError("The memory of the device is full; lower --batch-size and give the command again.") from error


def _base(model: PreTrainedModel | PeftModel) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _device(model: PreTrainedModel | PeftModel) -> torch.device:
    return next(model.parameters()).device
