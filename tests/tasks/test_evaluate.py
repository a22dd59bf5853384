import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score, log_loss

from lora_ggpo.errors import UserError
from lora_ggpo.models import add_adapter
from lora_ggpo.tasks import TaskConfig, collator, encode, evaluate, predict

TEXTS = [
    "A fine film.",
    "Dull, and far too long for the little it has to say.",
    "Fun.",
    "It never finds a reason to exist, and neither will you.",
    "Warm, clever and very well acted.",
    "No.",
    "The best thing about it is that it ends.",
    "I laughed from the first minute to the last and would see it again tomorrow.",
]
LABELS = [1, 0, 1, 0, 1, 0, 0, 1]
REVIEWS = Dataset.from_dict({"text": TEXTS, "label": LABELS})
PAIRS = Dataset.from_dict({"prompt": ["Q: 2+2?\nA:", "Say:", "Count: 1 2 3"], "completion": [" 4", " hi you", " 4 5"]})


def causal(*words):
    return TaskConfig(kind="causal-classification", label_words=list(words))


def log_prob(model, ids, start):
    """Log-probability of ids[start:] behind ids[:start], one unpadded sequence: teacher forcing, nothing clever."""
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    return sum(log_probs[i - 1, ids[i]].item() for i in range(start, len(ids)))


# --- classification ------------------------------------------------------------------------------------------------


def test_probabilities_are_the_models_in_the_order_of_the_data(minilm):
    model, tokenizer = minilm
    config = TaskConfig()
    encoded = encode("classification", REVIEWS, tokenizer, config)
    probabilities = predict("classification", model, encoded, tokenizer, config, batch_size=3)
    for text, row in zip(TEXTS, probabilities, strict=True):
        with torch.no_grad():
            expected = model.eval()(**tokenizer(text, return_tensors="pt")).logits[0].double().softmax(-1)
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_metrics_follow_from_the_probabilities(minilm):
    model, tokenizer = minilm
    config = TaskConfig()
    encoded = encode("classification", REVIEWS, tokenizer, config)
    probabilities = predict("classification", model, encoded, tokenizer, config)
    metrics = evaluate("classification", model, encoded, tokenizer, config)
    assert list(metrics) == ["accuracy", "f1", "mcc", "log_loss"]
    assert metrics["accuracy"].value == accuracy_score(LABELS, probabilities.argmax(1))
    assert metrics["log_loss"].value == pytest.approx(log_loss(LABELS, probabilities))
    assert metrics["accuracy"].n == len(TEXTS)


def test_modes_and_gradients_are_left_as_they_were_and_dropout_is_off(minilm):
    tokenizer = minilm[1]
    model = copy.deepcopy(minilm[0]).train()
    model.bert.pooler.eval()  # a module someone froze by hand
    config = TaskConfig()
    encoded = encode("classification", REVIEWS, tokenizer, config)
    first = predict("classification", model, encoded, tokenizer, config)
    assert np.array_equal(first, predict("classification", model, encoded, tokenizer, config))
    assert model.training
    assert model.bert.encoder.training
    assert not model.bert.pooler.training
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_counts_examples(minilm):
    calls = []
    config = TaskConfig()
    encoded = encode("classification", REVIEWS, minilm[1], config)
    predict(
        "classification", minilm[0], encoded, minilm[1], config, batch_size=3, progress=lambda *done: calls.append(done)
    )
    assert calls == [(3, 8), (6, 8), (8, 8)]


def test_autocast_is_used_and_close(minilm):
    model, tokenizer = minilm
    config = TaskConfig()
    encoded = encode("classification", REVIEWS, tokenizer, config)
    exact = predict("classification", model, encoded, tokenizer, config)
    rough = predict("classification", model, encoded, tokenizer, config, autocast=torch.bfloat16)
    assert not np.array_equal(rough, exact)
    np.testing.assert_allclose(rough, exact, atol=0.02)


def test_diverged_model_and_wrong_labels_are_errors(minilm):
    model, tokenizer = copy.deepcopy(minilm[0]), minilm[1]
    config = TaskConfig()
    data = Dataset.from_dict({"text": TEXTS[:3], "label": [1, 0, 2]})
    encoded = encode("classification", data, tokenizer, config)
    with pytest.raises(UserError, match="Row 2: label 2 is out of range; the model knows the labels 0 to 1"):
        evaluate("classification", model, encoded, tokenizer, config)
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite on 3 of 3 examples"):
        evaluate("classification", model, encoded, tokenizer, config)
    with pytest.raises(UserError, match="no rows"):
        evaluate("classification", model, encoded.select([]), tokenizer, config)


# --- causal classification -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "passes"),
    [
        (["negative", "positive"], 1),  # single tokens
        (["really not good", "really wonderful", "quite poor", "fair"], 2),  # shared and unshared beginnings
        (["not good at all", "fair"], 1),  # the short word rides on the long one
    ],
)
def test_label_words_score_as_teacher_forcing_says(smollm2, words, passes):
    model, tokenizer = smollm2
    config = causal(*words)
    data = Dataset.from_dict({"text": TEXTS[:4], "label": [0, 1, 0, 1]})
    encoded = encode("causal-classification", data, tokenizer, config)
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        probabilities = predict("causal-classification", model, encoded, tokenizer, config)
    finally:
        hook.remove()
    for text, row in zip(TEXTS, probabilities, strict=False):
        prompt = tokenizer(f"{text}\nSentiment:")["input_ids"]
        scores = []
        for word in words:
            ids = tokenizer(f"{text}\nSentiment: {word}")["input_ids"]
            assert ids[: len(prompt)] == prompt
            scores.append(log_prob(model, ids, len(prompt)))
        np.testing.assert_allclose(row, np.exp(scores) / np.exp(scores).sum(), rtol=1e-3, atol=1e-6)
    assert len(calls) == passes


def test_padding_does_not_change_the_scores(smollm2):
    model, tokenizer = smollm2
    config = causal("not good", "wonderful")
    encoded = encode("causal-classification", REVIEWS, tokenizer, config)
    alone = predict("causal-classification", model, encoded, tokenizer, config, batch_size=1)
    together = predict("causal-classification", model, encoded, tokenizer, config, batch_size=8)
    np.testing.assert_allclose(alone, together, rtol=1e-3, atol=1e-6)


def test_causal_metrics_and_an_adapted_model(smollm2):
    model, tokenizer = smollm2
    config = causal("negative", "positive")
    encoded = encode("causal-classification", REVIEWS, tokenizer, config)
    metrics = evaluate("causal-classification", model, encoded, tokenizer, config)
    assert list(metrics) == ["accuracy", "f1", "mcc", "log_loss"]
    assert metrics["accuracy"].value >= 0.5  # it knows a little without training
    adapted = add_adapter(copy.deepcopy(model), {"r": 2, "target_modules": ["q_proj"]}, "causal-classification")
    after = evaluate("causal-classification", adapted, encoded, tokenizer, config)
    assert after["log_loss"].value == pytest.approx(metrics["log_loss"].value, abs=1e-5)


# --- completions ---------------------------------------------------------------------------------------------------


def test_completion_loss_is_teacher_forcing_per_token(smollm2):
    model, tokenizer = smollm2
    config = TaskConfig(kind="sft")
    encoded = encode("sft", PAIRS, tokenizer, config)
    metrics = evaluate("sft", model, encoded, tokenizer, config, batch_size=2)
    total, count = 0.0, 0
    for row in encoded:
        start = sum(label == -100 for label in row["labels"])
        total -= log_prob(model, row["input_ids"], start)
        count += len(row["input_ids"]) - start
    assert metrics["loss"].value == pytest.approx(total / count, rel=1e-4)
    assert metrics["perplexity"].value == pytest.approx(np.exp(total / count), rel=1e-3)
    assert metrics["loss"].n == 3


def test_completion_loss_is_the_loss_of_training(smollm2):
    model, tokenizer = smollm2
    config = TaskConfig(kind="sft")
    encoded = encode("sft", PAIRS, tokenizer, config)
    with torch.no_grad():
        trained_on = model(**collator("sft", tokenizer)(encoded.to_list())).loss.item()
    assert evaluate("sft", model, encoded, tokenizer, config)["loss"].value == pytest.approx(trained_on, rel=1e-4)


def test_sft_has_no_classes(smollm2):
    config = TaskConfig(kind="sft")
    with pytest.raises(UserError, match="no classes to predict"):
        predict("sft", smollm2[0], encode("sft", PAIRS, smollm2[1], config), smollm2[1], config)
