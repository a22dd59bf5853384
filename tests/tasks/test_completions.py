"""Losses and probabilities of tokens against scikit-learn and direct sums over the model's own probabilities."""

import itertools
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import stats
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, log_loss

from lora_ggpo.models.architecture import CAUSAL
from lora_ggpo.models.load import load_model
from lora_ggpo.tasks import completions
from lora_ggpo.tasks.completions import TEMPERATURES, best_temperature, token_metrics, token_scores
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
        lambda temperature=None: evaluate(at(chosen, temperature), model, encoded, tokenizer, batch_size=2),
    )


def at(task, temperature):
    """The task that measures at this temperature as well."""
    task.temperature = temperature
    return task


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


@pytest.mark.parametrize(("at_once", "in_cache"), [(128, 16), (2, 1)])
def test_scaled_metrics_are_those_of_the_logits_over_the_temperature(scored, at_once, in_cache, monkeypatch):
    monkeypatch.setattr(completions, "_TOKENS_AT_ONCE", at_once)
    monkeypatch.setattr(completions, "_TOKENS_IN_CACHE", in_cache)
    probabilities, targets, measure = scored
    metrics, labels = measure(1.7), range(probabilities.shape[1])
    scaled = softmax(np.log(probabilities) / 1.7, axis=1)
    right = scaled.argmax(axis=1) == targets
    assert metrics["scaled_loss"].value == pytest.approx(log_loss(targets, scaled, labels=labels), rel=1e-5)
    brier = brier_score_loss(targets, scaled, labels=labels, scale_by_half=False)
    assert metrics["scaled_token_brier"].value == pytest.approx(brier, rel=1e-5)
    assert metrics["scaled_token_ece"].value == pytest.approx(error(scaled.max(axis=1), right), rel=1e-5)
    assert abs(metrics["scaled_token_ece"].value - metrics["token_ece"].value) > 0.01
    assert metrics["temperature"].value == 1.7
    assert {name: metrics[name] for name in measure()} == measure()  # what is not scaled is as it was, to the bit


def test_a_temperature_of_one_changes_nothing(scored):
    _, _, measure = scored
    metrics = measure(1.0)
    assert all(metrics[f"scaled_{name}"] == metrics[name] for name in ("loss", "token_brier", "token_ece"))


@pytest.fixture(scope="module")
def drawn(tiny_llama):
    """A model and a batch of what it says itself, word by word, so that its probabilities are right."""
    model, _ = load_model(tiny_llama, CAUSAL)
    model.eval()
    random, ids = torch.Generator().manual_seed(0), torch.arange(5, 69)[:, None]
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        for _ in range(24):
            ids = torch.cat([ids, torch.multinomial(model(ids).logits[:, -1].softmax(1), 1, generator=random)], dim=1)
    labels = torch.where(torch.arange(25) > 0, ids, -100)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.5, 3.0])
def test_the_temperature_is_what_the_logits_were_multiplied_by(drawn, factor):
    model, batch = drawn
    with torch.no_grad():
        logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1).double()
        targets = batch["labels"][:, 1:].flatten()
        least = minimize_scalar(
            lambda t: float(torch.nn.functional.cross_entropy(logits / t, targets)), bounds=(0.3, 3), method="bounded"
        ).x
        assert least == pytest.approx(1, abs=0.05)
        multiplied = model.lm_head.register_forward_hook(lambda head, given, logits: logits * factor)
        scores = token_scores(model, batch).numpy()
        multiplied.remove()
        for place, temperature in enumerate(TEMPERATURES, 3):
            loss = torch.nn.functional.cross_entropy(logits * factor / temperature, targets)
            assert scores[:, place].sum() / scores[:, 1].sum() == pytest.approx(float(loss), rel=1e-5)
    assert best_temperature(scores) == pytest.approx(least * factor, rel=0.01)


def of_rows(rng, n):
    """Scores of rows that each are right nearly always or hardly ever, which makes their tokens alike."""
    begin = 3 + len(TEMPERATURES)
    tokens = rng.integers(1, 12, size=n)
    scores = np.zeros((n, begin + 12))
    for row, count in enumerate(tokens):
        confidence = rng.uniform(0.4, 0.9, size=count)
        right = rng.random(count) < rng.choice([0.1, 0.9])
        scores[row, :3] = -np.log(confidence).sum(), count, ((1 - confidence) ** 2).sum()
        scores[row, begin : begin + count] = np.where(right, confidence, -confidence)
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
    signed = scores[:, 3 + len(TEMPERATURES) :]
    signed = signed[signed != 0]
    assert metrics["token_accuracy"].se > 1.5 * stats.sem(signed > 0)  # what independent tokens would say


def test_a_single_row_has_no_standard_error():
    metrics = token_metrics(of_rows(np.random.default_rng(0), 1))
    assert all(math.isnan(metrics[name].se) for name in ("loss", "token_accuracy", "token_brier", "token_ece"))
