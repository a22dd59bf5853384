"""Every tuner and LoRA variant of the installed peft on a small net: the noise is x eps^T on top of what PEFT's own
layer returns, the sizes follow the dense gradient, and evaluation, merging and detaching are PEFT's own."""

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", minversion="0.21")
from peft import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    LoHaConfig,
    LoraConfig,
    MontecloraConfig,
    PeftMixedModel,
    PolyConfig,
    VeloraConfig,
    XLoraConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ggpo.perturbation import GGPO, GGPOConfig
from lora_ggpo.perturbation.layers import perturbed_by

from .nets import loss_of

SETTINGS = {
    "ADALORA": {"total_step": 10, "init_r": 4},
    "ADAMSS": {"r": 4},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "DEFT": {},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 10},
    "FROD": {},
    "GLORA": {},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["down"]},
    "LILY": {"r": 4},
    "LN_TUNING": {},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "LORA": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "OSF": {},
    "PEANUT": {},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "UNILORA": {},
    "VBLORA": {"vector_length": 4, "num_vectors": 8},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 10},
}
"""What each tuner needs to be built on the net below."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:aLoRA is currently:UserWarning"),
]


def build(kind, **settings):
    torch.manual_seed(0)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](target_modules=["up", "down"], **settings)
    model = get_peft_model(Net(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return (model if kind == "ADAMSS" else model.double()).train()


def x_of(model, rows=5, n=8):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(3)).to(model.base_model.model.up.weight.dtype)


def attached(kind, **settings):
    """A perturbed model, a copy of it without GGPO, and its GGPO; no layer may be left out."""
    model = build(kind, **settings)
    stock = copy.deepcopy(model)
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=0.5, rule="relative", strict=True))
    assert [layer.name.rpartition(".")[2] for layer in ggpo.layers] == ["up", "down"]
    return model, stock, ggpo


def close(found, expected, dtype):
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **tolerance)


def noise_of(ggpo, layer, rows=5):
    """What the noise adds to the output of a layer and to dL/dx, with x, dL/dy and eps."""
    layer.noise = ggpo._drawn[layer.index]
    eps = layer.noise.matrix()
    x = torch.randn(rows, layer.n, dtype=eps.dtype)
    dy = torch.randn(rows, layer.m, dtype=eps.dtype)
    layer.passes.begin(training=True)
    results = []
    for forward in (layer.forward, layer.original):
        torch.manual_seed(0)  # PVeRA draws, too, and MonteCLoRA takes one draw of many
        for sampler in getattr(layer.module, "lora_monteclora_sampler", {}).values():
            sampler.sampler.index = 0
        given = x.clone().requires_grad_()
        y = forward(given)
        results.append((y.detach(), torch.autograd.grad(y, given, dy)[0]))
    layer.passes.end()
    (y, dx), (plain, plain_dx) = results
    return y - plain, dx - plain_dx, x, dy, eps


def assert_trains_under_exact_noise(model, ggpo):
    """Two steps: what the noise adds, dL/dS = G R^T of the dense G, and a change of all that trains."""
    x = x_of(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        torch.manual_seed(1)
        inputs, outputs = recorded(ggpo)
        loss_of(model(x)).backward()
        for layer in ggpo.layers:
            change, dx, given, dy, eps = noise_of(ggpo, layer)
            assert eps.norm() > 0
            close(change, given @ eps.T, x.dtype)
            close(dx, dy @ eps, x.dtype)
            if layer.sketch is not None:
                r, s = layer.sketch
                g = outputs[layer.index].grad.T @ inputs[layer.index]
                assert g.norm() > 0
                close(s.grad, g @ r.T, x.dtype)
        optimizer.step()
        ggpo.step()
        optimizer.zero_grad()
        assert ggpo.metrics()["ggpo/coverage"] == 1
    changed = [not torch.equal(before[key], p) for key, p in model.named_parameters() if p.requires_grad]
    assert sum(changed) > 0.6 * len(changed)  # some of a tuner's parameters are not of every layer


def recorded(ggpo):
    """The input and the output, gradients kept, of each layer's next call."""
    inputs, outputs, handles = {}, {}, {}
    for layer in ggpo.layers:

        def hook(module, args, y, layer=layer):
            inputs[layer.index] = args[0].detach()
            outputs[layer.index] = y
            y.retain_grad()
            handles[layer.index].remove()

        handles[layer.index] = layer.module.register_forward_hook(hook)
    return inputs, outputs


@pytest.mark.parametrize("kind", SETTINGS)
def test_noise_is_exact_and_the_tuner_trains(kind):
    model, _, ggpo = attached(kind, **SETTINGS[kind])
    assert_trains_under_exact_noise(model, ggpo)
    for layer in ggpo.layers:
        assert bool(layer.a) == (kind == "LORA")
        assert (layer.sketch is None) == (kind == "LORA")


@pytest.mark.parametrize("kind", SETTINGS)
def test_outside_training_and_once_detached_it_is_the_stock_model(kind):
    model, stock, ggpo = attached(kind, **SETTINGS[kind])
    x = x_of(model)
    for way in (lambda m: m.eval(), lambda m: m.train()):
        torch.manual_seed(0)
        with torch.no_grad():
            expected = way(stock)(x)
            torch.manual_seed(0)
            assert torch.equal(way(model)(x), expected)
    with model.disable_adapter(), stock.disable_adapter():
        assert torch.equal(model(x), stock(x))
    assert not torch.equal(model(x), stock(x))
    ggpo.detach()
    assert not any("forward" in vars(module) for module in model.modules())
    torch.manual_seed(0)
    expected = stock(x)
    torch.manual_seed(0)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", SETTINGS)
def test_once_merged_it_is_the_stock_model(kind):
    model, stock, _ = attached(kind, **SETTINGS[kind])
    x = x_of(model)
    if kind in ("LILY", "OSF"):
        pytest.skip("peft does not merge it")
    for one in (model, stock):
        one.merge_adapter()
    torch.manual_seed(0)
    expected = stock(x)
    torch.manual_seed(0)
    close(model(x), expected, x.dtype)


# --- variants of LoRA, and adapters that read more than x ---

ARROW = ArrowConfig(top_k=1)
ARROW.task_adapter_names, ARROW.gks_adapter_names = ["task"], []

VARIANTS = {
    "aLoRA": {"alora_invocation_tokens": [1]},
    "Arrow": {"arrow_config": ARROW},
    "BD-LoRA": {"use_bdlora": BdLoraConfig(target_modules_bd_b=["up"], target_modules_bd_a=["down"], nblocks=2)},
    "DoRA": {"use_dora": True},
    "KaSA": {"kasa_config": KasaConfig()},
    "MiCA": {"init_lora_weights": "mica"},
    "MonteCLoRA": {"monteclora_config": MontecloraConfig()},
    "PiSSA": {"init_lora_weights": "pissa"},
    "rsLoRA": {"use_rslora": True},
    "VeLoRA": {"velora_config": VeloraConfig(num_groups=2)},
}
WITH_FACTORS = ("DoRA", "PiSSA", "rsLoRA")


def build_variant(name):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["up", "down"], **VARIANTS[name])
    if name != "Arrow":
        return get_peft_model(Net(), config).double().train()
    task = LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
    model = get_peft_model(Net(), task, adapter_name="task")
    model.add_adapter("arrow_router", config)
    model.set_adapter("arrow_router")
    return model.double().train()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_lora_has_exact_noise(name):
    model = build_variant(name)
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=0.5, rule="relative", strict=True))
    assert all(bool(layer.a) == (name in WITH_FACTORS) for layer in ggpo.layers)
    if name not in ("Arrow", "aLoRA"):  # which train nothing here
        assert_trains_under_exact_noise(model, ggpo)
        return
    model(x_of(model))
    for layer in ggpo.layers:
        change, dx, x, dy, eps = noise_of(ggpo, layer)
        close(change, x @ eps.T, x.dtype)
        close(dx, dy @ eps, x.dtype)


def test_two_doras_are_no_scaled_rows():
    """Each scales what the others made of W0: no one vector of magnitudes has the norms of W'."""
    model = build_variant("DoRA")
    model.add_adapter("other", LoraConfig(r=4, target_modules=["up", "down"]))
    model.base_model.set_adapter(["default", "other"])
    ggpo = GGPO(model.double(), GGPOConfig(sigma=0.3, strict=True))
    assert not any(layer.a or layer.magnitudes for layer in ggpo.layers)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_hidden_layers=2, use_cache=False, **sizes))


IDS = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))


def assert_trains_under_noise(model, **inputs):
    ggpo = GGPO(model.train(), GGPOConfig(sigma=0.3, beta=0.5, rule="relative", strict=True))
    losses = [model(input_ids=IDS, labels=IDS, **inputs).loss for _ in range(2)]
    assert losses[0] != losses[1]
    sum(losses).backward()
    ggpo.step()
    assert ggpo.metrics()["ggpo/coverage"] == 1
    model.eval()
    quiet = [model(input_ids=IDS, **inputs).logits for _ in range(2)]
    assert torch.equal(*quiet)


def test_poly_whose_weight_is_each_tasks(llama):
    config = PolyConfig(task_type="CAUSAL_LM", r=2, n_tasks=2, target_modules=["q_proj"])
    assert_trains_under_noise(get_peft_model(copy.deepcopy(llama), config), task_ids=torch.tensor([0, 1]))


def test_x_lora_is_neither_fused_nor_summed(llama, tmp_path):
    """Its weight is a mixture of LoRAs by the input, so that the factors of all do not tell the size of W'."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(copy.deepcopy(llama), config).save_pretrained(tmp_path)
    adapters = {str(i): str(tmp_path) for i in range(2)}
    xlora = XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters=adapters)
    model = get_peft_model(copy.deepcopy(llama), xlora)
    assert_trains_under_noise(model)
    layers = [layer for layer in map(perturbed_by, model.modules()) if layer]
    assert len(layers) == 2
    assert not any(layer.a or layer._fusable for layer in layers)


# --- what cannot be perturbed ---

WITHOUT_WEIGHT = {
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "CARTRIDGE": {"num_virtual_tokens": 2},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 2},
    "P_TUNING": {"num_virtual_tokens": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 2},
    "PROMPT_TUNING": {"num_virtual_tokens": 2},
    "SHADOW": {},
    "TRAINABLE_TOKENS": {"token_indices": [1], "target_modules": ["embed_tokens"]},
}


@pytest.mark.parametrize("kind", WITHOUT_WEIGHT)
def test_a_tuner_that_changes_no_layers_weight_is_refused_by_name(kind, llama):
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **WITHOUT_WEIGHT[kind])
    model = get_peft_model(copy.deepcopy(llama), config)
    reason = "an adapter on LlamaDecoderLayer" if kind == "SHADOW" else f"its adapter is {kind}"
    with pytest.raises(ValueError, match=f"no adapted layer .*{reason}"):
        GGPO(model)


def test_two_tuners_on_one_layer_are_named():
    """Each of them would add a noise of its own."""
    model = PeftMixedModel(Net(), LoraConfig(target_modules=["up", "down"]), "lora")
    model.add_adapter("loha", LoHaConfig(target_modules=["up"]))
    model.set_adapter(["lora", "loha"])
    with pytest.warns(UserWarning, match=r"model\.up \(adapters of two kinds, one on the other\)"):
        ggpo = GGPO(model)
    assert [layer.name for layer in ggpo.layers] == ["base_model.model.down"]


# --- the table in docs ---


def test_the_table_in_docs_has_every_tuner_and_what_these_tests_found():
    page = Path(__file__).parents[2] / "docs" / "layers.md"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines() if "|" in line]
    named = {row[0].strip("`"): row[1] for row in cells if row[0].startswith("`")}
    known = {str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    assert named.keys() == known | {"QALoRA"} | VARIANTS.keys()
    perturbed = {kind for kind, verdict in named.items() if verdict == "yes"}
    assert perturbed == SETTINGS.keys() | VARIANTS.keys() | {"POLY", "XLORA"}
    assert WITHOUT_WEIGHT.keys() == known - perturbed
