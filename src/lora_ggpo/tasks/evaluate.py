"""Score a model on an encoded dataset."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from lora_ggpo.errors import DivergedError, UserError
from lora_ggpo.models.load import TaskKind
from lora_ggpo.tasks.config import Metric, TaskConfig
from lora_ggpo.tasks.encode import collator, label_word_ids
from lora_ggpo.tasks.length import NO_LOSS
from lora_ggpo.tasks.metrics import Floats, Integers, classification_metrics, completion_metrics
from lora_ggpo.tasks.regression import regression_metrics

Progress = Callable[[int, int], None]
Batch = dict[str, torch.Tensor]
# What a batch gives: one row of numbers for each of its examples.
Score = Callable[[Batch], torch.Tensor]


def evaluate(
    kind: TaskKind,
    model: torch.nn.Module,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: TaskConfig,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
    autocast: torch.dtype | None = None,
) -> dict[str, Metric]:
    """Measure `model` on `dataset`, which `encode` made with the same `config`.

    Args:
        batch_size: examples in a forward pass; batches hold examples of like length, the longest first.
        progress: called as progress(examples done, examples in all) after each batch.
        autocast: run the forward passes under autocast to this type (for instance torch.bfloat16).

    Returns:
        accuracy, f1 (macro), mcc and log_loss for the classification kinds; pearson, spearman and mse for "regression";
        loss (per completion token) and perplexity for "sft". See `lora_ggpo.tasks.metrics` and
        `lora_ggpo.tasks.regression` for the standard errors.

    The model is put in eval mode and its modules' modes are restored at the end; no gradient is kept.

    Raises:
        UserError: the model gives values that are not finite, or a label is outside the model's classes.
    """
    if kind == "sft":
        with evaluating(model):
            scores = _scores(kind, model, dataset, tokenizer, _completion_loss(model), batch_size, progress, autocast)
        return completion_metrics(scores[:, 0], scores[:, 1].astype(np.int64))
    if kind == "regression":
        values = predict_values(model, dataset, tokenizer, batch_size=batch_size, progress=progress, autocast=autocast)
        return regression_metrics(values, np.asarray(dataset["labels"], dtype=np.float64))
    probabilities = predict(
        kind, model, dataset, tokenizer, config, batch_size=batch_size, progress=progress, autocast=autocast
    )
    labels = np.asarray(dataset["labels" if kind == "classification" else "label"], dtype=np.int64)
    return prediction_metrics(probabilities, labels)


def predict(
    kind: TaskKind,
    model: torch.nn.Module,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    config: TaskConfig,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
    autocast: torch.dtype | None = None,
) -> Floats:
    """Class probabilities, float64 of shape (examples, classes), in the order of `dataset`; arguments as `evaluate`.

    For the kinds with label words a class scores the log-probability of its whole label word given the prompt (from a
    decoder of its own with the end behind the word), and the scores are normalised over the label words.
    """
    scorers: dict[TaskKind, Callable[[], Score]] = {
        "classification": lambda: _head_score(model),
        "causal-classification": lambda: _word_score(model, label_word_ids(tokenizer, config)),
        "seq2seq-classification": lambda: _decoder_word_score(model, label_word_ids(tokenizer, config)),
    }
    if kind not in scorers:
        raise UserError(f"Task {kind!r} has no classes to predict.")
    score = scorers[kind]()
    with evaluating(model):
        scores = _scores(kind, model, dataset, tokenizer, score, batch_size, progress, autocast)
    scores -= scores.max(axis=1, keepdims=True)
    exponentials = np.exp(scores)
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True), dtype=np.float64)


def predict_values(
    model: torch.nn.Module,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
    autocast: torch.dtype | None = None,
) -> Floats:
    """What a model for "regression" predicts, float64 of shape (examples,); all else as `predict`."""
    with evaluating(model):
        scores = _scores("regression", model, dataset, tokenizer, _head_score(model), batch_size, progress, autocast)
    return scores[:, 0]


def prediction_metrics(probabilities: Floats, labels: Integers) -> dict[str, Metric]:
    """Metrics of what `predict` returns; `labels` of shape (examples,) are indices of the right classes.

    Raises:
        UserError: a label is not one of the classes.
    """
    classes = probabilities.shape[1]
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if outside.size:
        raise UserError(
            f"Row {outside[0]}: label {labels[outside[0]]} is out of range; the model knows the labels 0 to "
            f"{classes - 1}."
        )
    return classification_metrics(probabilities, labels)


# --- scores of a batch ---------------------------------------------------------------------------------------------


def _head_score(model: torch.nn.Module) -> Score:
    def score(batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        return logits

    return score


def _word_score(model: torch.nn.Module, words: list[list[int]]) -> Score:
    """Summed log-probabilities of the label words behind the prompt, (batch, words)."""
    passes = _passes(words)

    def score(batch: Batch) -> torch.Tensor:
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


def _decoder_word_score(model: torch.nn.Module, words: list[list[int]]) -> Score:
    """As `_word_score`, for an encoder-decoder: the encoder reads the prompt, the decoder is scored on the words."""
    passes = _passes(words)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model

    def score(batch: Batch) -> torch.Tensor:
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


def _word_log_prob(log_probs: torch.Tensor, word: list[int]) -> torch.Tensor:
    """Summed log-probability of the word's tokens, (batch,), from (batch, steps, vocabulary)."""
    steps, ids = torch.arange(len(word), device=log_probs.device), torch.tensor(word, device=log_probs.device)
    return log_probs[:, steps, ids].double().sum(dim=1).cpu()


def _prompts_with(
    batch: Batch, prompt_lengths: torch.Tensor, beginning: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) of the prompts, each with `beginning` behind it instead of its completion."""
    width = int(prompt_lengths.max()) + len(beginning)
    ids = F.pad(batch["input_ids"], (0, max(0, width - batch["input_ids"].shape[1])))[:, :width].clone()
    columns = torch.arange(width, device=ids.device)
    for step, token in enumerate(beginning):
        ids[columns == (prompt_lengths + step)[:, None]] = token
    return ids, (columns < (prompt_lengths + len(beginning))[:, None]).long()


def _completion_loss(model: torch.nn.Module) -> Score:
    """Summed loss and number of completion tokens of each example, (batch, 2)."""

    def score(batch: Batch) -> torch.Tensor:
        targets = batch["labels"][:, 1:]
        learnt = targets != NO_LOSS
        positions = torch.nonzero(learnt.any(dim=0)).squeeze(1)  # only these need logits over the whole vocabulary
        logits = _logits_at(model, batch["input_ids"], batch["attention_mask"], positions)
        losses = [  # one example at a time: float32 copies of all logits would be most of the memory
            F.cross_entropy(row.float(), wanted, ignore_index=NO_LOSS, reduction="none").double().sum()
            for row, wanted in zip(logits, targets[:, positions], strict=True)
        ]
        return torch.stack([torch.stack(losses), learnt.sum(dim=1).double()], dim=1)

    return score


def _log_probs_at(
    model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities of the next token behind `positions` (batch, k) of each sequence: (batch, k, vocabulary)."""
    kept, where = torch.unique(positions, return_inverse=True)
    logits = _logits_at(model, ids, mask, kept)
    return logits[torch.arange(len(ids), device=ids.device)[:, None], where].float().log_softmax(dim=-1)


def _logits_at(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits (batch, k, vocabulary) at the `positions` (k,): the rest would be most of the memory of the pass."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        arguments["logits_to_keep"] = positions
        logits: torch.Tensor = model(**arguments).logits
        return logits
    return model(**arguments).logits[:, positions]


# --- the loop ------------------------------------------------------------------------------------------------------


def _scores(
    kind: TaskKind,
    model: torch.nn.Module,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    score: Score,
    batch_size: int,
    progress: Progress | None,
    autocast: torch.dtype | None,
) -> Floats:
    """Scores of all examples in the order of `dataset`, computed in batches of like length."""
    if len(dataset) == 0:
        raise UserError("The data to evaluate on has no rows.")
    device = next(model.parameters()).device
    collate = collator(kind, tokenizer)
    order = np.argsort(-np.asarray(dataset["length"]), kind="stable")
    parts: list[Floats] = []
    for start in range(0, len(order), batch_size):
        rows = dataset.select(order[start : start + batch_size]).to_list()
        batch = {name: tensor.to(device) for name, tensor in collate(rows).items()}
        with autocasting(device, autocast):
            parts.append(score(batch).double().cpu().numpy())
        if progress:
            progress(min(start + batch_size, len(order)), len(order))
    scores = np.empty((len(order), parts[0].shape[1]))
    scores[order] = np.concatenate(parts)
    broken = int((~np.isfinite(scores).all(axis=1)).sum())
    if broken:
        raise DivergedError(
            f"The model's outputs are not finite on {broken} of {len(scores)} examples: training has diverged; "
            "lower the learning rate or use dtype float32."
        )
    return scores


def autocasting(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Run forward passes on `device` in `dtype`; None leaves them as they are."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
