"""Batched generation with a key-value cache.

An answer depends on the model, the prompt, the sampling and its own number alone. Its random numbers are made from the
seed, the prompt's id and the number of the sample, so neither the batch nor the order nor a resumption changes them.
What remains is rounding: in batches of another shape logits differ in their last digits, and where two tokens are that
close the other one may be chosen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    TopPLogitsWarper,
)

from lora_ggpo.errors import DivergedError, UserError
from lora_ggpo.evaluation.answers import Answer, AnswerFile, Key, Prompt
from lora_ggpo.evaluation.target import Target
from lora_ggpo.models.load import check_tokens
from lora_ggpo.tasks.base import Progress
from lora_ggpo.tasks.forward import autocasting, evaluating
from lora_ggpo.workspace.interrupt import Interrupted

_COLDEST, _HOTTEST = 1e-3, 100.0


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
        if not (self.temperature == 0 or _COLDEST <= self.temperature <= _HOTTEST):  # refuses nan as well
            valid = f"0, which takes the most probable token, or from {_COLDEST:g} to {_HOTTEST:g}"
            raise UserError(f"--temperature is {self.temperature:g}; it must be {valid}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p:g}; it must be above 0 and at most 1.")
        pointless = "--samples" if self.samples > 1 else "--top-p" if self.top_p < 1 else None
        if pointless and not self.temperature:
            raise UserError(
                f"{pointless} needs a --temperature above 0: without it the most probable token is taken each time."
            )


def generate(
    target: Target,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    kept: AnswerFile,
    *,
    batch_size: int = 16,
    progress: Progress = lambda done, total: None,
    streamer: TextStreamer | None = None,
) -> dict[Key, Answer]:
    """Answer `prompts`; what `kept` has is not generated again, and what is new is put there batch by batch.

    Args:
        batch_size: Answers at a time, of prompts of like length, the longest first.
        progress: Called as progress(answers there, answers in all) at the beginning and after each batch.
        streamer: Gets the tokens of a single answer as they come.

    Returns:
        All answers to `prompts`, by prompt and number.

    The model is used in eval mode, where LoRA-GGPO adds no noise, and its modules' modes are restored at the end.

    Raises:
        UserError: a prompt leaves no room for an answer, `kept` has answers to other prompts, or memory runs out.
        Interrupted: Ctrl-C; what was generated is kept.
    """
    keys = [(prompt.id, sample) for prompt in prompts for sample in range(sampling.samples)]
    todo = kept.missing(prompts, sampling.samples)
    check_tokens(target.model, target.tokenizer, (prompt.ids for prompt, _ in todo), "Prompt")
    _check_room(target.tokenizer, [prompt for prompt, _ in todo], sampling)
    todo.sort(key=lambda one: (-len(one[0].ids), one[0].id, one[1]))
    there = len(keys) - len(todo)
    try:
        with evaluating(target.model), autocasting(target.model.device, target.autocast):
            for start in range(0, len(todo), batch_size):
                progress(there + start, len(keys))
                kept.add(_answers(target, todo[start : start + batch_size], sampling, streamer))
    except KeyboardInterrupt as error:
        done = f"{sum(key in kept.answers for key in keys)} of {len(keys)} answers are kept"
        raise Interrupted(f"Stopped; {done}: give the same command again to go on from there.") from error
    except torch.OutOfMemoryError as error:
        raise UserError("The memory of the device is full; lower --batch-size and give the command again.") from error
    progress(len(keys), len(keys))
    return {key: kept.answers[key] for key in keys}


def end_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: what `load_model` found to end texts and turns, and the tokenizer's own."""
    given: Any = model.generation_config.eos_token_id
    known = given if isinstance(given, list) else [given]
    return sorted({int(token) for token in [*known, tokenizer.eos_token_id] if token is not None})


def _check_room(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], sampling: Sampling) -> None:
    limit = tokenizer.model_max_length
    longest = max(prompts, key=lambda prompt: len(prompt.ids), default=None)
    if longest and len(longest.ids) + sampling.max_new_tokens > limit:
        raise UserError(
            f"The prompt {longest.id} has {len(longest.ids)} tokens; with {sampling.max_new_tokens} of an answer that "
            f"is more than the {limit} that the model can read: lower --max-new-tokens."
        )


# --- a batch -------------------------------------------------------------------------------------------------------


def _answers(
    target: Target, batch: list[tuple[Prompt, int]], sampling: Sampling, streamer: TextStreamer | None
) -> list[Answer]:
    tokenizer, model = target.tokenizer, target.model
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    rows = tokenizer.pad(
        {"input_ids": [prompt.ids for prompt, _ in batch]}, padding_side="left", return_tensors="pt"
    ).to(base.device)
    start, ends = rows["input_ids"].shape[1], end_tokens(base, tokenizer)
    # Drawing is left to a processor, whose random numbers do not depend on the batch.
    chosen: list[Any] = [_check_finite]
    if sampling.temperature:
        numbers = [_draws(sampling.seed, (prompt.id, sample), sampling.max_new_tokens) for prompt, sample in batch]
        chosen.append(_Draw(sampling, start, torch.stack(numbers).to(base.device)))
    came_with = base.generation_config
    base.generation_config = GenerationConfig()  # files of models hold a temperature or a repetition penalty
    try:
        found = base.generate(
            **rows,
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
            ),
            logits_processor=LogitsProcessorList(chosen),
            stopping_criteria=StoppingCriteriaList([_Stops(tokenizer, sampling.stop, start)] if sampling.stop else []),
            streamer=streamer,
        )
    finally:
        base.generation_config = came_with
    ended = {*ends, int(tokenizer.pad_token_id)}
    return [
        _answer(tokenizer, prompt, sample, row, ended, sampling)
        for (prompt, sample), row in zip(batch, found[:, start:].tolist(), strict=True)
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


def _draws(seed: int, key: Key, count: int) -> Tensor:
    """`count` numbers in [0, 1) that are this answer's own."""
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _check_finite(_: Any, scores: Any) -> Any:
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
