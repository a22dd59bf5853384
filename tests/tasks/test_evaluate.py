import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score, log_loss
from transformers import BartConfig, BartForConditionalGeneration

from lora_ggpo.errors import UserError
from lora_ggpo.models.adapters import add_adapter
from lora_ggpo.models.architecture import CAUSAL, ENCODER_DECODER
from lora_ggpo.models.load import load_model
from tests.tasks.make import evaluate, task

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
    return task(kind="causal-classification", label_words=list(words))


def log_prob(model, ids, start):
    """Log-probability of ids[start:] behind ids[:start], one unpadded sequence: teacher forcing, nothing clever."""
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    return sum(log_probs[i - 1, ids[i]].item() for i in range(start, len(ids)))


# --- classification ------------------------------------------------------------------------------------------------


def test_probabilities_are_the_models_in_the_order_of_the_data(minilm):
    model, tokenizer = minilm
    chosen = task()
    encoded = chosen.encode(REVIEWS, tokenizer)
    probabilities = chosen.score(model, encoded, tokenizer, batch_size=3)
    for text, row in zip(TEXTS, probabilities, strict=True):
        with torch.no_grad():
            expected = model.eval()(**tokenizer(text, return_tensors="pt")).logits[0].double().softmax(-1)
        np.testing.assert_allclose(row, expected, atol=1e-5)


def test_pairs_are_read_with_their_segments(minilm):
    model, tokenizer = copy.deepcopy(minilm[0]), minilm[1]
    with torch.no_grad():
        model.classifier.weight.mul_(100)  # the new head is all but blind
    chosen, seconds = task(), TEXTS[::-1]
    data = Dataset.from_dict({"text": TEXTS, "text_pair": seconds, "label": LABELS})
    encoded = chosen.encode(data, tokenizer)
    probabilities = chosen.score(model, encoded, tokenizer, batch_size=3)
    for first, second, row in zip(TEXTS, seconds, probabilities, strict=True):
        batch = tokenizer(first, second, return_tensors="pt")
        with torch.no_grad():
            expected = model.eval()(**batch).logits[0].double().softmax(-1)
            one_segment = model(input_ids=batch["input_ids"]).logits[0].double().softmax(-1)
        np.testing.assert_allclose(row, expected, atol=1e-5)
        assert not np.allclose(row, one_segment, atol=1e-4)


def test_metrics_follow_from_the_probabilities(minilm):
    model, tokenizer = minilm
    chosen = task()
    encoded = chosen.encode(REVIEWS, tokenizer)
    probabilities = chosen.score(model, encoded, tokenizer)
    metrics = evaluate(chosen, model, encoded, tokenizer)
    assert list(metrics) == ["accuracy", "f1", "mcc", "log_loss", "brier", "ece"]
    assert metrics["accuracy"].value == accuracy_score(LABELS, probabilities.argmax(1))
    assert metrics["log_loss"].value == pytest.approx(log_loss(LABELS, probabilities))
    assert metrics["accuracy"].n == len(TEXTS)


def test_modes_and_gradients_are_left_as_they_were_and_dropout_is_off(minilm):
    tokenizer = minilm[1]
    model = copy.deepcopy(minilm[0]).train()
    model.bert.pooler.eval()  # a module someone froze by hand
    chosen = task()
    encoded = chosen.encode(REVIEWS, tokenizer)
    first = chosen.score(model, encoded, tokenizer)
    assert np.array_equal(first, chosen.score(model, encoded, tokenizer))
    assert model.training
    assert model.bert.encoder.training
    assert not model.bert.pooler.training
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_counts_examples(minilm):
    calls = []
    chosen = task()
    encoded = chosen.encode(REVIEWS, minilm[1])
    chosen.score(minilm[0], encoded, minilm[1], batch_size=3, progress=lambda *done: calls.append(done))
    assert calls == [(3, 8), (6, 8), (8, 8)]


def test_autocast_is_used_and_close(minilm):
    model, tokenizer = minilm
    chosen = task()
    encoded = chosen.encode(REVIEWS, tokenizer)
    exact = chosen.score(model, encoded, tokenizer)
    rough = chosen.score(model, encoded, tokenizer, autocast=torch.bfloat16)
    assert not np.array_equal(rough, exact)
    np.testing.assert_allclose(rough, exact, atol=0.02)


def test_a_diverged_model_is_an_error(minilm):
    model, tokenizer = copy.deepcopy(minilm[0]), minilm[1]
    chosen = task()
    data = Dataset.from_dict({"text": TEXTS[:3], "label": [1, 0, 1]})
    encoded = chosen.encode(data, tokenizer)
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite on 3 of 3 examples"):
        evaluate(chosen, model, encoded, tokenizer)


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
    chosen = causal(*words)
    data = Dataset.from_dict({"text": TEXTS[:4], "label": [0, 1, 0, 1]})
    encoded = chosen.encode(data, tokenizer)
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        probabilities = chosen.score(model, encoded, tokenizer)
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
    chosen = causal("not good", "wonderful")
    encoded = chosen.encode(REVIEWS, tokenizer)
    alone = chosen.score(model, encoded, tokenizer, batch_size=1)
    together = chosen.score(model, encoded, tokenizer, batch_size=8)
    np.testing.assert_allclose(alone, together, rtol=1e-3, atol=1e-6)


def test_causal_metrics_and_an_adapted_model(smollm2):
    model, tokenizer = smollm2
    chosen = causal("negative", "positive")
    encoded = chosen.encode(REVIEWS, tokenizer)
    metrics = evaluate(chosen, model, encoded, tokenizer)
    assert list(metrics) == ["accuracy", "f1", "mcc", "log_loss", "brier", "ece"]
    assert metrics["accuracy"].value >= 0.5  # it knows a little without training
    adapted = add_adapter(copy.deepcopy(model), {"r": 2, "target_modules": ["q_proj"]}, CAUSAL)
    after = evaluate(chosen, adapted, encoded, tokenizer)
    assert after["log_loss"].value == pytest.approx(metrics["log_loss"].value, abs=1e-5)


# --- sequence to sequence ------------------------------------------------------------------------------------------

SEQ2SEQ = "seq2seq-classification"
WORDS = ["not good at all", "not good", "wonderful", "fun"]


def bart(folder, tokenizer):
    """An encoder-decoder of another kind: its targets begin and end in special tokens, here BERT's."""
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ends = {"bos_token_id": 101, "eos_token_id": 102, "pad_token_id": 0, "decoder_start_token_id": 102}
    sizes = {"vocab_size": len(tokenizer), "d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = BartConfig(**sizes, **layers, **ends, forced_eos_token_id=None, init_std=1.0)
    BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["t5", "bart"])
def encoder_decoder(request, tiny_t5, minilm, tmp_path_factory):
    """(model, tokenizer), random and small."""
    folder = tiny_t5 if request.param == "t5" else bart(tmp_path_factory.mktemp("bart"), minilm[1])
    return load_model(folder, ENCODER_DECODER)


def decoded_log_prob(model, prompt, word):
    """Log-probability of the tokens of `word`, one decoder step after another: `model` is in float64."""
    read, total = [model.config.decoder_start_token_id], 0.0
    for token in word:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([read])).logits
        total += logits[0, -1].log_softmax(dim=-1)[token].item()
        read.append(token)
    return total


def test_label_words_score_as_a_loop_over_decoder_steps_says(encoder_decoder):
    model, tokenizer = encoder_decoder
    chosen = task(kind=SEQ2SEQ, template="first: {text} second: {text_pair}", label_words=WORDS)
    data = Dataset.from_dict({"text": TEXTS, "text_pair": TEXTS[::-1], "label": [0, 1, 2, 3] * 2})
    encoded = chosen.encode(data, tokenizer)
    probabilities = chosen.score(model, encoded, tokenizer, batch_size=3)
    exact = copy.deepcopy(model).double().eval()
    for first, second, row in zip(TEXTS, TEXTS[::-1], probabilities, strict=True):
        prompt = tokenizer(f"first: {first} second: {second}")["input_ids"]
        scores = np.array([decoded_log_prob(exact, prompt, tokenizer(word)["input_ids"]) for word in WORDS])
        expected = np.exp(scores - scores.max())
        np.testing.assert_allclose(row, expected / expected.sum(), rtol=1e-3, atol=1e-6)
    assert (probabilities.std(axis=0) / probabilities.mean(axis=0)).max() > 0.02  # the prompt matters


def test_the_encoder_reads_a_batch_once(encoder_decoder):
    model, tokenizer = encoder_decoder
    chosen = task(kind=SEQ2SEQ, label_words=WORDS)
    encoded = chosen.encode(REVIEWS, tokenizer)
    calls = []
    hook = model.get_encoder().register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        chosen.score(model, encoded, tokenizer)
    finally:
        hook.remove()
    assert len(calls) == 1


def test_training_loss_is_that_of_the_right_word(encoder_decoder):
    model, tokenizer = encoder_decoder
    chosen = task(kind=SEQ2SEQ, label_words=["wonderful", "not good"])
    encoded = chosen.encode(REVIEWS, tokenizer)
    exact = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        loss = exact(**chosen.collator(tokenizer)(encoded.to_list())).loss.item()
    total = sum(decoded_log_prob(exact, row["input_ids"], row["labels"]) for row in encoded)
    assert loss == pytest.approx(-total / sum(len(row["labels"]) for row in encoded), rel=1e-9)


def test_seq2seq_metrics_and_an_adapted_model(encoder_decoder):
    model, tokenizer = encoder_decoder
    chosen = task(kind=SEQ2SEQ, label_words=["wonderful", "not good"])
    encoded = chosen.encode(REVIEWS, tokenizer)
    metrics = evaluate(chosen, model, encoded, tokenizer)
    assert list(metrics) == ["accuracy", "f1", "mcc", "log_loss", "brier", "ece"]
    adapted = add_adapter(copy.deepcopy(model), {"r": 2, "target_modules": "all-linear"}, ENCODER_DECODER)
    after = evaluate(chosen, adapted, encoded, tokenizer)
    assert after["log_loss"].value == pytest.approx(metrics["log_loss"].value, abs=1e-5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    assert evaluate(chosen, adapted, encoded, tokenizer)["log_loss"].value != after["log_loss"].value


# --- completions ---------------------------------------------------------------------------------------------------


def test_completion_loss_is_teacher_forcing_per_token(smollm2):
    model, tokenizer = smollm2
    chosen = task(kind="sft")
    encoded = chosen.encode(PAIRS, tokenizer)
    metrics = evaluate(chosen, model, encoded, tokenizer, batch_size=2)
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
    chosen = task(kind="sft")
    encoded = chosen.encode(PAIRS, tokenizer)
    with torch.no_grad():
        trained_on = model(**task(kind="sft").collator(tokenizer)(encoded.to_list())).loss.item()
    assert evaluate(chosen, model, encoded, tokenizer)["loss"].value == pytest.approx(trained_on, rel=1e-4)
