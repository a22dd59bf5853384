"""Losses and probabilities of tokens against scikit-learn and direct sums over the model's own probabilities."""

import itertools
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, log_loss

from lora_ggpo.models.architecture import CAUSAL
from lora_ggpo.models.load import load_model
from lora_ggpo.tasks import completions
from lora_ggpo.tasks.completions import token_metrics
from tests.tasks.make import evaluate, task

ROWS = [("say", " it is a good film ."), ("a longer prompt :", " no"), ("x", " bad bad bad film , and bad again .")]


@pytest.fixture(scope="module")
def scored(tiny_llama):
    """The probabilities and targets of all completion tokens, a row at a time, and what measures them in batches."""
    model, tokenizer = load_model(tiny_llama, CAUSAL)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # a new model is sure of nothing
    chosen = task(kind="sft")
    prompts, answers = zip(*ROWS, strict=True)
    encoded = chosen.encode(Dataset.from_dict({"prompt": prompts, "completion": answers}), tokenizer)
    probabilities, targets = [], []
    for row in encoded:
        start = sum(label == -100 for label in row["labels"])
        with torch.no_grad():
            logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0, start - 1 : -1]
        probabilities.append(softmax(logits.double().numpy(), axis=1))
        targets.append(row["input_ids"][start:])
    return (
        np.concatenate(probabilities),
        np.concatenate(targets),
        lambda: evaluate(chosen, model, encoded, tokenizer, batch_size=2),
    )


def error(confidence, right, bins=15):
    """The calibration error as it is defined, over parts of the sorted predictions."""
    order = np.argsort(confidence, kind="stable")
    bounds = np.arange(bins + 1) * len(order) // bins
    parts = [order[begin:end] for begin, end in itertools.pairwise(bounds)]
    return sum(abs(confidence[part].sum() - right[part].sum()) for part in parts) / len(order)


@pytest.mark.parametrize("at_once", [128, 2])
def test_metrics_are_those_of_all_probabilities(scored, at_once, monkeypatch):
    monkeypatch.setattr(completions, "_TOKENS_AT_ONCE", at_once)
    probabilities, targets, measure = scored
    metrics = measure()
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    labels = range(probabilities.shape[1])
    assert metrics["loss"].value == pytest.approx(log_loss(targets, probabilities, labels=labels), rel=1e-5)
    brier = brier_score_loss(targets, probabilities, labels=labels, scale_by_half=False)
    assert metrics["token_brier"].value == pytest.approx(brier, rel=1e-5)
    assert metrics["token_accuracy"].value == pytest.approx(right.mean())
    assert metrics["token_ece"].value == pytest.approx(error(confidence, right), rel=1e-5)
    assert metrics["token_ece"].value > 0.05
    assert {metric.n for metric in metrics.values()} == {len(ROWS)}


def of_rows(rng, n):
    """Scores of rows that each are right nearly always or hardly ever, which makes their tokens alike."""
    tokens = rng.integers(1, 12, size=n)
    scores = np.zeros((n, 3 + 12))
    for row, count in enumerate(tokens):
        confidence = rng.uniform(0.4, 0.9, size=count)
        right = rng.random(count) < rng.choice([0.1, 0.9])
        scores[row, :3] = -np.log(confidence).sum(), count, ((1 - confidence) ** 2).sum()
        scores[row, 3 : 3 + count] = np.where(right, confidence, -confidence)
    return scores


def test_the_tokens_of_a_row_belong_together(monkeypatch):
    rng = np.random.default_rng(5)
    scores = of_rows(rng, 300)
    metrics = token_metrics(scores)
    assert token_metrics(scores) == metrics
    monkeypatch.setattr(completions, "RESAMPLES", 2)  # of the resamples below, only the values are looked at
    found = []
    for _ in range(300):
        drawn = scores[rng.integers(300, size=300)]
        found.append([token_metrics(drawn)[name].value for name in ("token_accuracy", "token_brier", "token_ece")])
    spreads = np.std(found, axis=0, ddof=1)
    assert metrics["token_accuracy"].se == pytest.approx(spreads[0], rel=0.15)
    assert metrics["token_brier"].se == pytest.approx(spreads[1], rel=0.15)
    assert metrics["token_ece"].se == pytest.approx(spreads[2], rel=0.4)  # there the bins follow what was drawn
    signed = scores[:, 3:][scores[:, 3:] != 0]
    assert metrics["token_accuracy"].se > 1.5 * stats.sem(signed > 0)  # what independent tokens would say


def test_a_single_row_has_no_standard_error():
    metrics = token_metrics(of_rows(np.random.default_rng(0), 1))
    assert all(math.isnan(metrics[name].se) for name in ("loss", "token_accuracy", "token_brier", "token_ece"))
