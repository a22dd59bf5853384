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


def completion_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Summed loss and number of completion tokens of each sequence, (batch, 2)."""
    rows = []
    for logits, wanted in _rows(model, batch):  # float32 copies of the logits of all rows would be most of the memory
        losses = F.cross_entropy(logits.float(), wanted, ignore_index=NO_LOSS, reduction="none")
        rows.append(torch.stack([losses.double().sum(), (wanted != NO_LOSS).sum().double()]))
    return torch.stack(rows)


def token_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Of each sequence's completion tokens, (batch, 3 + longest): summed loss, their number, their summed Brier score,
    and the probability of the most probable token at each of them, negative where that is not the one that follows.
    """
    rows = []
    for logits, wanted in _rows(model, batch):
        learnt = wanted != NO_LOSS
        pieces = zip(logits[learnt].split(_TOKENS_AT_ONCE), wanted[learnt].split(_TOKENS_AT_ONCE), strict=True)
        losses, briers, confidences = torch.cat([_of_tokens(*piece) for piece in pieces], dim=1)
        rows.append(torch.cat([torch.stack([losses.sum(), learnt.sum(), briers.sum()]), confidences]))
    return pad_sequence(rows, batch_first=True)


def _rows(model: nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (k, vocabulary) and targets (k,) of each sequence, where any of the batch has something to predict."""
    targets = batch["labels"][:, 1:]
    positions = torch.nonzero((targets != NO_LOSS).any(dim=0)).squeeze(1)  # only these need the whole vocabulary
    logits = logits_at(model, batch["input_ids"], batch["attention_mask"], positions)
    return zip(logits, targets[:, positions], strict=True)


def _of_tokens(logits: Tensor, wanted: Tensor) -> Tensor:
    """Loss, Brier score and signed confidence, (3, n), from `logits` (n, vocabulary)."""
    logits = logits.float()
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


def token_metrics(scores: Floats) -> dict[str, Measured]:
    """Loss, perplexity, accuracy, Brier score and calibration error of completion tokens.

    Args:
        scores: (n, 3 + longest), as `token_scores` gives them.

    The tokens of an example belong together: standard errors are over examples, as in `completion_metrics`; that of
    the calibration error is the standard deviation over 1000 bootstrap resamples of the examples.
    """
    n, tokens, signed = len(scores), scores[:, 1].astype(np.int64), scores[:, 3:]
    signed = signed[np.arange(signed.shape[1]) < tokens[:, None]]
    example, right = np.repeat(np.arange(n), tokens), (signed > 0).astype(np.float64)
    error, spread = calibration.grouped_error(np.abs(signed), right, example, resamples=RESAMPLES, seed=SEED)
    return {
        **completion_metrics(scores[:, 0], tokens),
        "token_accuracy": measure_ratio(np.bincount(example, right, n).astype(np.float64), tokens),
        "token_brier": measure_ratio(scores[:, 2], tokens),
        "token_ece": Measured(error, spread, n),
    }
