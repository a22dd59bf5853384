"""What changes in the model while it is perturbed: noise sizes are those of the weights as they are."""

import warnings

import pytest
import torch
from peft import LoraConfig
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from lora_ggpo.perturbation import GGPO, GGPOConfig

from .nets import TARGETS, adapted, batch, loss_of, net, shake

SIGMA = 0.3


def assert_sizes_are_those_of_the_weights(model, ggpo):
    """tau_i = sigma ||W'_i|| / sqrt(n) with W' materialised; a layer without active adapter has none."""
    perturbed = {layer.name: layer for layer in ggpo.layers}
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        active = [a for a in module.active_adapters if a in module.lora_A]
        if not active:
            assert name not in perturbed or perturbed[name].tau is None
            continue
        weight = module.base_layer.weight + sum(module.get_delta_weight(a) for a in active)
        expected = SIGMA * (weight.square().sum(1) / weight.shape[1]).sqrt()
        torch.testing.assert_close(perturbed[name].tau, expected.to(perturbed[name].tau), rtol=3e-5, atol=1e-8)


def start(dtype=torch.float64, **config):
    model = adapted(net(), LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS} | config), dtype=dtype)
    ggpo = GGPO(model, GGPOConfig(sigma=SIGMA, beta=0, strict=True))
    step(model, ggpo)
    return model, ggpo


def step(model, ggpo, i=0):
    model.zero_grad()
    loss_of(model(batch(i, dtype=next(model.parameters()).dtype))).backward()
    ggpo.step()


def lora_layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def set_scale(model):
    for module in lora_layers(model):
        module.set_scale("default", 8.0)


def scale_one_layer(model):
    lora_layers(model)[-1].scale_layer(8.0)


def add_to_new_layers(model):
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=40, target_modules=TARGETS))
    model.set_adapter("other")
    shake(model)
    model.double()


def add_pissa(model):
    """It changes W0 too."""
    config = LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, init_lora_weights="pissa")
    model.add_adapter("other", config)
    model.set_adapter("other")


def add_weighted(model):
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=40, target_modules=TARGETS))
    shake(model)
    model.double()
    model.add_weighted_adapter(["default", "other"], [0.7, 2.0], "sum", combination_type="cat")
    model.set_adapter("sum")


CHANGES = {
    "set_scale": (set_scale, {}),
    "scale_layer of one": (scale_one_layer, {}),
    "adapter of new layers": (add_to_new_layers, {"target_modules": ["up", "down"]}),
    "pissa": (add_pissa, {"dtype": torch.float32}),
    "add_weighted_adapter": (add_weighted, {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_noise_follows_what_changes_in_the_model(change):
    function, config = CHANGES[change]
    model, ggpo = start(**config)
    before = [layer.tau.clone() for layer in ggpo.layers]
    function(model)
    for i in range(2):
        step(model, ggpo, i)
        assert_sizes_are_those_of_the_weights(model, ggpo)
        assert ggpo.metrics()["ggpo/coverage"] == 1
    after = [layer.tau for layer in ggpo.layers]
    assert len(after) == 4
    assert len(after) != len(before) or not all(map(torch.allclose, after, before)), "nothing changed"
    ggpo.detach()
    x = batch(0, dtype=next(model.parameters()).dtype)
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize(("rank", "alpha"), [(3, 64), (2, 8), (5, 64)])
def test_noise_follows_a_hot_swapped_adapter(rank, alpha, tensors, tmp_path):
    adapted(net(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS), torch.float32, 7).save_pretrained(
        tmp_path
    )
    model = adapted(net(), LoraConfig(r=3, lora_alpha=8, target_modules=TARGETS), dtype=torch.float32)
    if tensors:
        prepare_model_for_compiled_hotswap(model, target_rank=5)
    ggpo = GGPO(model, GGPOConfig(sigma=SIGMA, beta=0))
    step(model, ggpo)
    model.zero_grad()
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    for module in lora_layers(model):  # a swap to a larger rank leaves plain tensors
        for factors in (module.lora_A, module.lora_B):
            factors["default"].weight.requires_grad_()
    step(model, ggpo)
    assert_sizes_are_those_of_the_weights(model, ggpo)


def test_gradient_norms_stay_with_a_changed_scaling_and_not_with_another_adapter():
    model = adapted(net())
    ggpo = GGPO(model, GGPOConfig(sigma=SIGMA, beta=1.0))
    step(model, ggpo)
    before = ggpo.state_dict()
    set_scale(model)
    model(batch(1))
    norms = [key for key in before if "norms" in key]
    assert len(norms) == 4
    assert all(torch.equal(ggpo.state_dict()[key], before[key]) for key in norms)
    add_weighted(model)
    model(batch(1))
    assert not any("norms" in key for key in ggpo.state_dict())


def test_layers_added_later_that_cannot_be_perturbed_are_named_then():
    torch.manual_seed(0)
    base = net()
    base.extra = torch.nn.MultiheadAttention(4, 2)
    model = adapted(base)
    ggpo = GGPO(model, GGPOConfig(sigma=SIGMA))
    step(model, ggpo)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up", "out_proj"]))
    model.set_adapter("other")
    with pytest.warns(UserWarning, match=r"extra\.out_proj \(nn\.MultiheadAttention reads"):
        model.double()(batch(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(batch(0))
    assert ggpo.metrics()["ggpo/coverage"] == 1 / 2


def test_adapters_that_change_between_micro_batches():
    """The first layer has one adapter all the time, so it does not tell."""
    model, ggpo = start()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=40, target_modules=["head"]))
    shake(model)
    model.double()
    model(batch(0)).sum().backward()
    model.base_model.set_adapter(["default", "other"])
    model(batch(1)).sum().backward()
    assert_sizes_are_those_of_the_weights(model, ggpo)
    assert {layer.name.rpartition(".")[2]: layer.names for layer in ggpo.layers}["head"] == ["default", "other"]
