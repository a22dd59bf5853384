"""What peft makes of each method's settings, on MiniLM, against linear algebra and peft's own types."""

import copy
import math

import pytest
import torch
from peft import PeftModel
from peft.optimizers.lorafa import LoraFAOptimizer
from peft.tuners.adalora import AdaLoraModel
from transformers import TrainingArguments

from lora_ggpo.errors import UserError
from lora_ggpo.methods.initialise import save_difference, save_start
from lora_ggpo.methods.optimizers import lora_fa, lora_plus
from lora_ggpo.models.adapters import add_adapter, freeze_body
from lora_ggpo.models.architecture import CAUSAL, HEADED
from lora_ggpo.models.load import load_model

TEXTS = ["A delight from start to finish.", "Dull, overlong and badly acted.", "I laughed.", "Why was this made?"]
FIELDS = {"r": 4, "lora_alpha": 6, "target_modules": r".*layer\.[01]\.attention\.self\.query|.*pooler\.dense"}
MOVED = ["pissa", "pissa_niter_8", "olora", "corda", "lora_ga"]


@pytest.fixture
def base(minilm):
    torch.manual_seed(0)
    return copy.deepcopy(minilm[0])


def batches_of(minilm):
    def batches():
        for _ in range(2):
            batch = minilm[1](TEXTS, padding=True, return_tensors="pt")
            yield {
                "input_ids": batch["input_ids"],
                "attention_mask": batch["attention_mask"],
                "labels": torch.tensor([1, 0, 1, 0]),
            }

    return batches


def lora_layers(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def product(layer):
    return layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


def logits(model, minilm):
    batch = minilm[1](TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("init", MOVED)
def test_the_full_weight_starts_where_it_was(base, minilm, init):
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = add_adapter(base, FIELDS | {"init_lora_weights": init}, HEADED, batches=batches_of(minilm))
    layers = lora_layers(model)
    assert len(layers) == 3
    for name, layer in layers.items():
        whole = layer.base_layer.weight + product(layer)
        original = weights[name.removeprefix("base_model.model.") + ".weight"]
        torch.testing.assert_close(whole, original, rtol=1e-4, atol=1e-5)
        assert product(layer).norm() > 0


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_starting_values_of_embeddings_cannot_be_saved_as_a_difference(tiny_llama, target):
    base, _ = load_model(str(tiny_llama))
    fields = {"r": 4, "target_modules": ["q_proj", target], "init_lora_weights": "pissa"}
    with pytest.raises(UserError, match=rf"which peft cannot do for .*{target}; leave it out of target_modules"):
        add_adapter(base, fields, CAUSAL)


def test_pissa_holds_the_principal_part(base):
    weight = base.bert.encoder.layer[0].attention.self.query.weight.detach().double()
    u, s, v = torch.linalg.svd(weight)
    principal = (u[:, :4] * s[:4]) @ v[:4]
    model = add_adapter(base, FIELDS | {"init_lora_weights": "pissa"}, HEADED)
    layer = next(iter(lora_layers(model).values()))
    torch.testing.assert_close(product(layer).double(), principal, rtol=1e-3, atol=1e-4)


def test_lora_ga_holds_the_gradients_directions(base, minilm):
    for batch in batches_of(minilm)():
        base.train()(**batch).loss.backward()
    layer = base.bert.encoder.layer[0].attention.self.query
    rows = torch.linalg.svd(layer.weight.grad.double())[2][: 2 * FIELDS["r"]]
    base.zero_grad()
    torch.manual_seed(1)
    model = add_adapter(base, FIELDS | {"init_lora_weights": "lora_ga"}, HEADED, batches=batches_of(minilm))
    a = next(iter(lora_layers(model).values())).lora_A["default"].weight.double()
    inside = (a @ rows.T @ rows).norm() / a.norm()  # dropout changes the gradient a little
    assert inside > 0.8


def test_eva_explains_the_layers_inputs(base, minilm):
    seen = []
    query = base.bert.encoder.layer[0].attention.self.query
    handle = query.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    batch = next(iter(batches_of(minilm)()))
    with torch.no_grad():
        base.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    tokens = seen[0][batch["attention_mask"].bool()].double()
    first = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)[2][0]
    fields = {"r": 1, "target_modules": r".*layer\.0\.attention\.self\.query", "init_lora_weights": "eva"}
    eva = {"eva_config": {"rho": 1.0}}
    model = add_adapter(base, fields | eva, HEADED, batches=batches_of(minilm))
    (layer,) = lora_layers(model).values()
    a = layer.lora_A["default"].weight[0].double()
    assert (a @ first).abs() / a.norm() > 0.95


def test_eva_gives_up_where_the_data_is_too_little(base, minilm):
    fields = {"r": 8, "target_modules": r".*pooler\.dense", "init_lora_weights": "eva"}  # four texts, eight directions
    with pytest.raises(UserError, match="have not settled after 20 passes over 2 batches"):
        add_adapter(base, fields, HEADED, batches=batches_of(minilm))


@pytest.mark.parametrize("init", MOVED)
def test_what_is_saved_fits_the_untouched_model(base, minilm, init, tmp_path):
    untouched = copy.deepcopy(base)
    model = add_adapter(base, FIELDS | {"init_lora_weights": init}, HEADED, batches=batches_of(minilm))
    assert save_start(model, tmp_path / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    expected = logits(model, minilm)
    save_difference(model, tmp_path / "adapter", tmp_path / "start")
    torch.testing.assert_close(logits(model, minilm), expected, rtol=0, atol=0)
    loaded = PeftModel.from_pretrained(untouched, tmp_path / "adapter")
    assert loaded.peft_config["default"].r == 2 * FIELDS["r"]
    torch.testing.assert_close(logits(loaded, minilm), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_other_starts_are_saved_as_they_are(base, minilm, init, tmp_path):
    model = add_adapter(base, FIELDS | {"init_lora_weights": init}, HEADED, batches=batches_of(minilm))
    assert not save_start(model, tmp_path / "start")


def test_rslora_and_dora(base):
    model = add_adapter(base, FIELDS | {"use_rslora": True, "use_dora": True}, HEADED)
    for layer in lora_layers(model).values():
        assert layer.scaling["default"] == pytest.approx(FIELDS["lora_alpha"] / math.sqrt(FIELDS["r"]))
        norms = layer.base_layer.weight.norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, norms)


def test_adalora(base):
    model = add_adapter(base, FIELDS | {"type": "adalora"}, HEADED, total_steps=50)
    assert isinstance(model.base_model, AdaLoraModel)
    config = model.peft_config["default"]
    assert (config.target_r, config.init_r, config.total_step, config.tinit, config.tfinal) == (4, 6, 50, 5, 15)


def test_lora_plus_learns_b_faster(base, tmp_path):
    model = add_adapter(base, FIELDS, HEADED)
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=1e-3, weight_decay=0.01, use_cpu=True)
    optimizer = lora_plus(model, args, 8.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            assert rates[id(parameter)] == 1e-3
        if "lora_B" in name:
            assert rates[id(parameter)] == 8e-3


def test_lora_fa_freezes_a(base, tmp_path):
    model = add_adapter(base, FIELDS, HEADED)
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=1e-3, use_cpu=True)
    assert isinstance(lora_fa(model, args), LoraFAOptimizer)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.requires_grad == ("lora_B" in name), name


def test_head_only(base):
    trained = {name for name, p in freeze_body(base).named_parameters() if p.requires_grad}
    assert trained == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "corda", "use_dora": True}, "DoRA"),
        ({"init_lora_weights": "olora", "alora_invocation_tokens": [1]}, "aLoRA"),
    ],
)
def test_what_does_not_go_together(base, minilm, fields, message):
    with pytest.raises(UserError, match=message):
        add_adapter(base, FIELDS | fields, HEADED, batches=batches_of(minilm))


MONTECLORA = {"monteclora_config": {"num_samples": 3, "sample_scaler": 0.2, "kl_loss_weight": 1e-3}}


def test_monteclora_is_a_mixture_of_draws_around_a(base):
    """A + sum_k p_k c Z_k diag(sd): log-normal weights p, and variances e^(2 s) W_ii of a Wishart draw W."""
    model = add_adapter(base, FIELDS | MONTECLORA, HEADED).train()
    layer = next(iter(lora_layers(model).values()))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    sampler, drawn = layer.lora_monteclora_sampler["default"], []
    get = sampler.sampler.get
    sampler.sampler.get = lambda: drawn.append(get()) or drawn[-1]
    x = torch.randn(5, layer.in_features)
    y = layer(x)
    z = drawn[0]
    w, s = sampler.expert_weights_prior.detach(), sampler.std_prior.detach()
    inverse = (-w).exp()
    spread = torch.sqrt(inverse * (1 - 2 / 3) + inverse.sum() / 9 + 1e-6)
    p = torch.softmax(w - w.mean() + spread * z["z_dirichlet"], dim=0)
    sd = ((2 * s).exp() * z["z_wishart"].diag()).clamp(min=1e-3).sqrt()
    A = layer.lora_A["default"].weight + 0.2 * torch.einsum("k,kir,r->ri", p, z["z_mvn"], sd)
    expected = layer.base_layer(x) + layer.scaling["default"] * x @ A.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    layer(x)
    assert not torch.equal(drawn[1]["z_mvn"], z["z_mvn"])
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ product(layer).T)


def test_checkpointed_layers_draw_the_same_again(base, minilm):
    model = add_adapter(base, FIELDS | MONTECLORA, HEADED).train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model.zero_grad()
        (model(**next(iter(batches_of(minilm)()))).loss + model.base_model._get_monteclora_loss()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
