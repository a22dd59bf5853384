"""The loss of few tokens at a time against torch's cross-entropy of all logits at once."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from lora_ggpo import GGPO, GGPOConfig
from lora_ggpo.models.adapters import add_adapter
from lora_ggpo.models.architecture import CAUSAL
from lora_ggpo.training import head_loss
from lora_ggpo.training.head_loss import HeadLoss, summed_loss, takes_head_loss

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 50, "pad_token_id": 0}
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.fixture(autouse=True)
def _few_at_a_time(monkeypatch):
    monkeypatch.setattr(head_loss, "ENTRIES", 50 * 4)


def make(adapter=LORA, dtype=torch.float64, tied=False):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).to(dtype)
    return add_adapter(model, adapter, CAUSAL).train()


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (3, 9), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -100)
    labels[1] = -100  # a row in which nothing is learnt
    return ids, labels


def gradients(model, loss):
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def plain_loss(logits, labels, smoothing):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradients_of_hidden_states_weight_and_bias(smoothing):
    torch.manual_seed(0)
    shapes = (11, 6), (50, 6), (50,)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    targets = torch.randint(50, (11,))
    loss = summed_loss(*leaves, targets, smoothing)
    logits = F.linear(*leaves)
    expected = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    found, wanted = (torch.autograd.grad(3 * one, leaves) for one in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("case", ["lora", "full", "tied", "ggpo"])
def test_a_model_gives_the_loss_and_gradients_of_its_logits(case, smoothing):
    model, (ids, labels) = make(None if case in ("full", "tied") else LORA, tied=case == "tied"), batch()
    if case == "ggpo":
        GGPO(model, GGPOConfig(sigma=0.5, redraw="optimizer-step"))
    assert takes_head_loss(model)
    expected = plain_loss(model(input_ids=ids).logits, labels, smoothing)
    wanted = gradients(model, expected)
    with HeadLoss(model, smoothing).over(labels):
        loss = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(model, loss), wanted, rtol=1e-9, atol=1e-12)
    logits = model(input_ids=ids).logits
    assert logits.shape == (3, 9, 50)  # the model is its own again


@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "full"])
def test_under_autocast_it_is_as_exact_as_the_logits(adapter):
    (ids, labels), far = batch(), []
    exact = gradients(model := make(adapter, torch.float32), plain_loss(model(input_ids=ids).logits, labels, 0.0))
    for chunked in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if chunked:
                with HeadLoss(model, 0.0).over(labels):
                    loss = model(input_ids=ids, labels=labels).loss
            else:
                loss = model(input_ids=ids, labels=labels).loss
        assert loss.dtype == torch.float32
        found = gradients(model, loss)
        far.append(sum(float((found[name] - exact[name]).square().sum()) for name in exact) ** 0.5)
    assert 0 < far[1] < 1.2 * far[0]


class Largest(TorchDispatchMode):
    """The most entries that a result has."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for one in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(one, torch.Tensor):
                self.entries = max(self.entries, one.numel())
        return results


def test_logits_of_more_than_a_few_tokens_never_exist(monkeypatch):
    monkeypatch.setattr(head_loss, "ENTRIES", 50 * 16 * 2)
    model, ids = make(), torch.randint(1, 50, (8, 64), generator=torch.Generator().manual_seed(0))
    largest = {}
    for chunked in (False, True):
        with Largest() as mode:
            if chunked:
                with HeadLoss(model, 0.0).over(ids):
                    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            else:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        largest[chunked] = mode.entries
    assert largest[False] == 8 * 64 * 50
    assert largest[True] == 8 * 64 * 32  # of the MLP


def test_a_batch_that_teaches_nothing_has_no_loss():
    model, (ids, labels) = make(), batch()
    with HeadLoss(model, 0.0).over(labels.fill_(-100)):
        loss = model(input_ids=ids, labels=labels).loss
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


def test_models_whose_logits_are_not_what_their_head_returns():
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=30.0))
    scaled = CohereForCausalLM(CohereConfig(**SIZES))
    adapted = make(LORA | {"target_modules": ["q_proj", "lm_head"]})
    for model in (capped, scaled, adapted):
        before = model.get_output_embeddings().forward
        assert not takes_head_loss(model)
        assert model.get_output_embeddings().forward == before
    assert takes_head_loss(Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=None)))
