"""SC-LoRA's start against a dense float64 reference that reads each text alone, without padding or a batch."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from lora_ggpo.errors import UserError
from lora_ggpo.methods import subspace
from lora_ggpo.methods.initialise import save_difference, save_start
from lora_ggpo.models.adapters import add_adapter
from lora_ggpo.models.architecture import CAUSAL, HEADED

TASK = ["A delight from start to finish.", "Dull, overlong and badly acted.", "I laughed.", "Why was this made?", "No."]
GENERAL = ["Rome was founded on seven hills and grew.", "Water boils at one hundred degrees.", "The whale is a mammal."]
BASES = {
    "bert": (
        AutoModelForSequenceClassification,
        HEADED,
        r".*layer\.1\.attention\.self\.query|.*pooler\.dense|.*1.output.dense",
    ),
    "llama": (AutoModelForCausalLM, CAUSAL, r".*layers\.1\.(self_attn\.k_proj|mlp\.up_proj|mlp\.down_proj)"),
}
R, ALPHA = 3, 5


@pytest.fixture(scope="module", params=BASES)
def base(request, tiny_bert, tiny_llama):
    """(model, tokenizer, architecture, fields): its biases are not 0, and the layers' outputs are far from centred."""
    cls, architecture, targets = BASES[request.param]
    folder = {"bert": tiny_bert, "llama": tiny_llama}[request.param]
    torch.manual_seed(0)
    model = cls.from_pretrained(folder).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fields = {"r": R, "lora_alpha": ALPHA, "target_modules": targets, "init_lora_weights": "sc_lora"}
    return model, tokenizer, architecture, fields


def batches_of(tokenizer, texts, size):
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def batches():
        for begin in range(0, len(texts), size):
            batch = tokenizer(texts[begin : begin + size], padding=True, return_tensors="pt")
            yield {name: batch[name] for name in ("input_ids", "attention_mask")} | {"labels": torch.tensor([0])}

    return batches


def adapted(base, model=None, **changes):
    untouched, tokenizer, architecture, fields = base
    return add_adapter(
        copy.deepcopy(untouched) if model is None else model,
        fields | changes,
        architecture,
        batches=batches_of(tokenizer, TASK, 2),
        general=batches_of(tokenizer, GENERAL, 3),
    )


def lora_layers(model):
    return {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "lora_A")}


def covariance(base, layer, texts):
    """The mean of h h^T over the tokens of `texts`, with h = W0 x: one text at a time, in float64."""
    model, tokenizer, *_ = base
    module, inputs = model.get_submodule(layer), []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2).double().numpy()))
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")
            model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])
    handle.remove()
    h = np.concatenate(inputs) @ module.weight.detach().double().numpy().T
    return h.T @ h / len(h)


@pytest.mark.parametrize("beta", [0.0, None, 1.0])
def test_the_factors_span_what_the_task_has_more_of(base, beta):
    weight = subspace.BETA if beta is None else beta
    layers = lora_layers(adapted(base, sc_lora_beta=beta))
    assert len(layers) == 3
    for name, layer in layers.items():
        difference = (1 - weight) * covariance(base, name, TASK) - weight * covariance(base, name, GENERAL)
        W0 = base[0].get_submodule(name).weight.detach().double().numpy()
        span = np.linalg.svd(W0, full_matrices=False)[0]  # all that the layer can give
        values, vectors = np.linalg.eigh(span.T @ difference @ span)
        Q = span @ vectors[:, -R:]
        if values[-R] > 1e-6 * np.abs(values).max():
            np.testing.assert_allclose(values[-R:], np.linalg.eigvalsh(difference)[-R:])
        A, B = (getattr(layer, part)["default"].weight.detach().double().numpy() for part in ("lora_A", "lora_B"))
        np.testing.assert_allclose(B.T @ B, np.eye(R), atol=1e-5)
        np.testing.assert_allclose(B.T @ W0 * R / ALPHA, A, atol=1e-5)
        inside = np.linalg.eigvalsh(B.T @ difference @ B)  # tells apart even what eigenvalues that are close do not
        np.testing.assert_allclose(inside, values[-R:], rtol=1e-4, atol=1e-6 * np.abs(values).max())
        if values[-R] - values[-R - 1] > 1e-2 * np.abs(values).max():
            np.testing.assert_allclose(B @ B.T, Q @ Q.T, atol=1e-3)


def test_without_general_text_another_subspace_is_found(base):
    one, other = (next(iter(lora_layers(adapted(base, sc_lora_beta=beta)).values())) for beta in (0.0, 0.9))
    overlap = torch.linalg.svdvals(one.lora_B["default"].weight.T @ other.lora_B["default"].weight)
    assert overlap.min() < 0.9


def outputs(model, base):
    batch = base[1](TASK, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[batch["attention_mask"].bool()] if logits.dim() == 3 else logits


def test_the_model_begins_as_it_was_and_is_saved_as_what_fits_it(base, tmp_path, recwarn):
    model = adapted(base)
    layer = next(iter(lora_layers(model).values()))
    assert (layer.get_base_layer().weight - base[0].get_submodule(next(iter(lora_layers(model)))).weight).norm() > 0.01
    torch.testing.assert_close(outputs(model, base), outputs(base[0], base), rtol=1e-4, atol=1e-5)
    assert save_start(model, tmp_path / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    expected = outputs(model, base)
    assert not torch.allclose(expected, outputs(base[0], base), atol=1e-3)
    save_difference(model, tmp_path / "adapter", tmp_path / "start")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base[0]), tmp_path / "adapter")
    assert (loaded.peft_config["default"].r, loaded.peft_config["default"].init_lora_weights) == (2 * R, True)
    torch.testing.assert_close(outputs(loaded, base), expected, rtol=1e-4, atol=1e-5)
    assert not [w for w in recwarn if "path_initial_model" in str(w.message) or "init_lora_weights" in str(w.message)]


def test_groups_of_layers_give_the_same(base, monkeypatch):
    whole = lora_layers(adapted(base))
    monkeypatch.setattr(subspace, "GROUP_BYTES", 4 * 32**2)
    for name, layer in lora_layers(adapted(base)).items():
        B, other = layer.lora_B["default"].weight, whole[name].lora_B["default"].weight
        torch.testing.assert_close(B @ B.T, other @ other.T, rtol=0, atol=0)


def test_no_more_rows_are_read_than_said(base, monkeypatch):
    monkeypatch.setattr(subspace, "ROWS", 3)
    read = subspace._first_rows(batches_of(base[1], TASK, 2)())
    assert [len(batch["input_ids"]) for batch in read] == [2, 1]


def test_packed_rows_count_each_token_once_and_no_padding(tiny_llama):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    model.config.use_cache = False
    ids = [tokenizer(text)["input_ids"] for text in TASK[:3]]
    rows, positions = [ids[0] + ids[1], ids[2]], [[*range(len(ids[0])), *range(len(ids[1]))], [*range(len(ids[2]))]]
    width = max(map(len, rows))
    packed = {
        "input_ids": torch.tensor([row + [2] * (width - len(row)) for row in rows]),
        "position_ids": torch.tensor([row + [0] * (width - len(row)) for row in positions]),
    }
    _, mask = subspace.read(packed)
    assert mask.sum(dim=1).tolist() == [len(row) for row in rows]
    found = {}
    for name, batches in {"packed": [packed], "apart": list(batches_of(tokenizer, TASK[:3], 1)())}.items():
        fields = {"r": R, "target_modules": ["o_proj"], "init_lora_weights": "sc_lora", "sc_lora_beta": 0.0}
        apart = lambda batches=batches: iter(batches)  # noqa: E731
        layers = lora_layers(add_adapter(copy.deepcopy(model), fields, CAUSAL, batches=apart, general=apart))
        found[name] = [layer.lora_B["default"].weight for layer in layers.values()]
    for packed_B, apart_B in zip(found["packed"], found["apart"], strict=True):
        torch.testing.assert_close(packed_B @ packed_B.T, apart_B @ apart_B.T, rtol=0, atol=1e-3)


class Turned(torch.nn.Module):
    """A layer of GPT-2's kind, whose weight is stored the other way round, for tokens that are one row of a matrix."""

    def __init__(self):
        super().__init__()
        self.inner = Conv1D(6, 4)
        torch.nn.init.normal_(self.inner.bias)

    def forward(self, input_ids, attention_mask):
        return self.inner(torch.nn.functional.one_hot(input_ids, 4).float().flatten(0, 1))


def test_a_layer_stored_the_other_way_round_whose_tokens_are_in_one_row():
    torch.manual_seed(0)
    model = Turned()
    W0, bias = model.inner.weight.detach().clone(), model.inner.bias.detach()
    ids, mask = torch.tensor([[0, 1, 3], [2, 2, 3]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["inner"], fan_in_fan_out=True))
    before = peft(**batch)
    subspace.begin_in_subspace(peft, [batch], [batch], 0.25)
    torch.testing.assert_close(peft(**batch), before)
    h = W0[[0, 1, 2]]  # the tokens that are not padding
    Q = torch.linalg.eigh((h.T @ h).double()).eigenvectors[:, -2:].float()
    B = peft.base_model.model.inner.lora_B["default"].weight
    torch.testing.assert_close(B @ B.T, Q @ Q.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        model.inner.base_layer.weight + 3 * (B @ peft.base_model.model.inner.lora_A["default"].weight).T, W0
    )
    assert bias.norm() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "'sc_lora' moves the base weights, which DoRA's magnitudes tie the adapter to"),
        ({"bias": "all"}, "is saved as a difference of two adapters, which peft cannot do with bias"),
        (
            {"r": 33, "target_modules": r".*(self.query|q_proj)$"},
            "'sc_lora' gives .*(query|q_proj) 32 at most; lower it",
        ),
        (
            {"target_modules": r".*(word_embeddings|embed_tokens)"},
            "needs linear layers that see each token, but .*embed.* is not linear; leave it",
        ),
    ],
)
def test_what_cannot_begin_so(base, changes, message):
    with pytest.raises(UserError, match=message):
        adapted(base, **changes)


def test_it_needs_both_texts(base):
    model, _, architecture, fields = base
    with pytest.raises(UserError, match=r"adapter.init_lora_weights 'sc_lora' needs training data"):
        add_adapter(copy.deepcopy(model), fields, architecture)
