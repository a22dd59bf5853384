"""What a causal language model makes of completions: their losses, and how far its probabilities can be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lora_ggpo.statistics import calibration
from lora_ggpo.statistics.measured import RESAMPLES, SEED, Floats, Integers, Measured, measure_ratio
from lora_ggpo.tasks.base import NO_LOSS, Batch
from lora_ggpo.tasks.forward import logits_at

_TOKENS_AT_ONCE = 128
"""Tokens whose probabilities of the whole vocabulary exist at once."""

_TOKENS_IN_CACHE = 16
"""Of which as many are taken at a time where they are gone over again and again."""

TEMPERATURES = tuple(4 / k for k in range(1, 9))
"""At which the loss is measured where the best one is not known yet."""


def completion_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Summed loss and number of completion tokens of each sequence, (batch, 2)."""
    rows = []
    for logits, wanted in _rows(model, batch):  # float32 copies of the logits of all rows would be most of the memory
        losses = F.cross_entropy(logits.float(), wanted, ignore_index=NO_LOSS, reduction="none")
        rows.append(torch.stack([losses.double().sum(), (wanted != NO_LOSS).sum().double()]))
    return torch.stack(rows)


def token_scores(model: nn.Module, batch: Batch, temperature: float | None = None) -> Tensor:
    """Scores of each sequence's completion tokens, (batch, k + longest).

    They are the summed loss, the number of the tokens, their summed Brier score, the summed losses at `TEMPERATURES`,
    and the probability of the most probable token at each of them, negative where that is not the one that follows.

    With a `temperature`, (batch, 5 + 2 longest): in place of the losses at `TEMPERATURES` the loss and the Brier score
    at this one, and behind each probability that at this one.
    """
    rows = []
    for logits, wanted in _rows(model, batch):
        learnt = wanted != NO_LOSS
        pieces = zip(logits[learnt].split(_TOKENS_AT_ONCE), wanted[learnt].split(_TOKENS_AT_ONCE), strict=True)
        found = [_of_tokens(*piece, temperature) for piece in pieces]
        (losses, briers, *further), confidences = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        sums = [losses.sum(), learnt.sum(), briers.sum(), *(one.sum() for one in further)]
        rows.append(torch.cat([torch.stack(sums), confidences.T.flatten()]))
    return pad_sequence(rows, batch_first=True)


def _rows(model: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (k, vocabulary) and targets (k,) of each sequence, where any of the batch has something to predict."""
    targets = batch["labels"][:, 1:]
    positions = torch.nonzero((targets != NO_LOSS).any(dim=0)).squeeze(1)  # only these need the whole vocabulary
    logits = logits_at(model, batch["input_ids"], batch["attention_mask"], positions)
    return zip(logits, targets[:, positions], strict=True)


def _of_tokens(logits: Tensor, wanted: Tensor, temperature: float | None) -> tuple[Tensor, Tensor]:
    """What is summed (k, n), and signed confidences (1 or 2, n), from `logits` (n, vocabulary), which are used up."""
    logits = logits.float()
    plain = _measured(logits, wanted)
    if temperature is None:
        return torch.cat([plain[:2], _losses_at_temperatures(logits, wanted)]), plain[2:]
    scaled = _measured(logits.div_(temperature), wanted)
    return torch.cat([plain[:2], scaled[:2]]), torch.stack([plain[2], scaled[2]])


def _losses_at_temperatures(logits: Tensor, wanted: Tensor) -> Tensor:
    """Losses at each of the `TEMPERATURES`, (k, n): e^(l / T) are powers of what it is at the highest."""
    losses = []
    for scores, token in zip(logits.split(_TOKENS_IN_CACHE), wanted.split(_TOKENS_IN_CACHE), strict=True):
        scores.sub_(scores.amax(dim=1, keepdim=True)).div_(TEMPERATURES[0])
        right = scores.gather(1, token[:, None])[:, 0].double()
        root = scores.exp_()
        power, sums = root.clone(), [root.sum(dim=1)]
        for _ in TEMPERATURES[1:]:
            sums.append(power.mul_(root).sum(dim=1))
        losses.append(torch.stack([one.double().log() - right * k for k, one in enumerate(sums, 1)]))
    return torch.cat(losses, dim=1)


def _measured(logits: Tensor, wanted: Tensor) -> Tensor:
    """Loss, Brier score and signed confidence, (3, n)."""
    losses, log_sum = F.cross_entropy(logits, wanted, reduction="none").double(), logits.logsumexp(dim=1)
    top, predicted = logits.max(dim=1)
    confidence = (top - log_sum).exp().double()
    squares = (logits.mul(2).logsumexp(dim=1) - 2 * log_sum).exp().double()
    briers = (squares - 2 * (-losses).exp() + 1).clamp(min=0)
    return torch.stack([losses, briers, torch.where(predicted == wanted, confidence, -confidence)])


def completion_metrics(losses: Floats, tokens: Integers) -> dict[str, Measured]:
    """Loss per completion token (nats) and perplexity, over all tokens of all examples.

    Args:
        losses: (n,) summed loss of each example's completion.
        tokens: (n,) completion tokens of each example, at least 1.

    The standard error of the perplexity exp(loss) follows from that of the loss by the delta method.
    """
    loss = measure_ratio(losses, tokens)
    perplexity = math.exp(loss.value) if loss.value < 700 else math.inf
    return {"loss": loss, "perplexity": Measured(perplexity, perplexity * loss.se, loss.n)}


def best_temperature(scores: Floats) -> float:
    """The temperature of the least loss, from the scores (n, k + longest) that `token_scores` gives without one."""
    losses = scores[:, 3 : 3 + len(TEMPERATURES)].sum(axis=0) / scores[:, 1].sum()
    return calibration.least_between(TEMPERATURES, losses)


def token_metrics(scores: Floats, temperature: float | None = None) -> dict[str, Measured]:
    """Loss, perplexity, accuracy, Brier score and calibration error of completion tokens.

    Args:
        scores: (n, k + longest), as `token_scores` gives them.
        temperature: That of the `scores`, at which loss, Brier score and calibration error are given as well.
    """
    if temperature is None:
        return _metrics(scores[:, :3], scores[:, 3 + len(TEMPERATURES) :])
    scaled = _metrics(scores[:, [3, 1, 4]], scores[:, 6::2])
    return {
        **_metrics(scores[:, :3], scores[:, 5::2]),
        **{f"scaled_{name}": scaled[name] for name in ("loss", "token_brier", "token_ece")},
        "temperature": Measured(temperature, math.nan, len(scores)),
    }


def _metrics(sums: Floats, signed: Floats) -> dict[str, Measured]:
    """The metrics, from losses, numbers and Brier scores (n, 3), and signed confidences (n, longest).

    The tokens of an example belong together: standard errors are over examples, as in `completion_metrics`; that of
    the calibration error is the standard deviation over 1000 bootstrap resamples of the examples.
    """
    n, tokens = len(sums), sums[:, 1].astype(np.int64)
    signed = signed[np.arange(signed.shape[1]) < tokens[:, None]]
    example, right = np.repeat(np.arange(n), tokens), (signed > 0).astype(np.float64)
    error, spread = calibration.grouped_error(np.abs(signed), right, example, resamples=RESAMPLES, seed=SEED)
    return {
        **completion_metrics(sums[:, 0], tokens),
        "token_accuracy": measure_ratio(np.bincount(example, right, n).astype(np.float64), tokens),
        "token_brier": measure_ratio(sums[:, 2], tokens),
        "token_ece": Measured(error, spread, n),
    }
