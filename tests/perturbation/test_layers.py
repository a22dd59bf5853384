"""PEFT's layers: each kind of adapter against dense autograd on W' + eps, and what is left in the model."""

import copy
import inspect

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.ln_tuning.layer import LNTuningLayer
from torch import nn

from lora_ggpo.perturbation import GGPO, GGPOConfig
from lora_ggpo.perturbation.find import find_layers

from .nets import TARGETS, Net, TiedNet, adapted, batch, conv1d, gradients, loss_of, net, shake
from .reference import Twin

LR = 0.05
CLOSE = {"rtol": 1e-9, "atol": 1e-12}

ADAPTERS = {
    "plain": {},
    "one layer": {"target_modules": ["up"]},
    "conv1d": {"fan_in_fan_out": True},
    "no bias": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora, conv1d": {"use_dora": True, "fan_in_fan_out": True},
    "dora, dropout": {"use_dora": True, "lora_dropout": 0.4},
    "dropout": {"lora_dropout": 0.4},
    "pissa": {"init_lora_weights": "pissa"},
    "patterns": {"rank_pattern": {"up": 2, "head": 5}, "alpha_pattern": {"down": 11, "head": 1}},
    "bias": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["head"], "target_modules": ["inp", "up", "down"]},
    "tied": {"target_modules": ["up", "head"]},
}


def build(case: str) -> tuple[PeftModel, dict[str, LoraConfig]]:
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS} | ADAPTERS[case])
    torch.manual_seed(1)
    base = TiedNet() if case == "tied" else Net(conv1d if "conv1d" in case else nn.Linear, bias=case != "no bias")
    return adapted(base, config), {"default": config}


def assert_equals_twin(model, ggpo, twin, steps=3, micro_batches=2, number=0):
    """Outputs, dL/dx, every parameter's gradient, tau and the parameters after each of several steps."""
    for step in range(steps):
        for micro in range(micro_batches):
            number += 1
            x, dense_x = (batch(10 * step + micro).requires_grad_() for _ in range(2))
            torch.manual_seed(number)
            y = model(x)
            (loss_of(y) / micro_batches).backward()
            torch.manual_seed(number)
            expected = twin(dense_x, number)
            (loss_of(expected) / micro_batches).backward()
            torch.testing.assert_close(y, expected, **CLOSE)
            torch.testing.assert_close(x.grad, dense_x.grad, **CLOSE)
            torch.testing.assert_close(gradients(model), twin.gradients(), **CLOSE)
        noise = {layer.name: layer.tau for layer in ggpo.layers}
        for name, tau in twin.taus().items():
            torch.testing.assert_close(noise[name], tau, **CLOSE)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= LR * parameter.grad
        twin.step(LR)
        ggpo.step()
        model.zero_grad()
    return number


@pytest.mark.parametrize("rule", ["paper", "relative", "sd-scripts"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_network_equals_dense_autograd_over_several_steps(case, rule):
    model, configs = build(case)
    beta = {"paper": 3.0, "relative": 0.6, "sd-scripts": 0.05}[rule]
    gradient = "lora" if case in ("plain", "dora", "pissa") else "lstsq"
    config = GGPOConfig(sigma=0.3, beta=beta, rule=rule, gradient=gradient, seed=4)
    twin = Twin(model, configs, config)
    ggpo = GGPO(model, config)
    assert len(ggpo.layers) == len(twin.layers) == len(configs["default"].target_modules)
    assert_equals_twin(model, ggpo, twin)


@pytest.mark.parametrize("case", ["plain", "conv1d", "bias", "dora", "dropout"])
def test_network_equals_dense_autograd_with_dense_noise(case):
    model, configs = build(case)
    config = GGPOConfig(sigma=0.3, beta=1.0, noise="dense")
    twin = Twin(model, configs, config)
    assert_equals_twin(model, GGPO(model, config), twin)


@pytest.mark.parametrize("gradient", ["lora", "lstsq"])
def test_two_adapters_active_at_once(gradient):
    model, configs = build("plain")
    configs["other"] = LoraConfig(r=2, lora_alpha=9, target_modules=TARGETS)
    model.add_adapter("other", configs["other"])
    shake(model)
    model.double().base_model.set_adapter(["default", "other"])
    config = GGPOConfig(sigma=0.3, beta=3.0, gradient=gradient)
    twin = Twin(model, configs, config)
    assert twin.layers[next(iter(twin.layers))].adapters == ["default", "other"]
    assert_equals_twin(model, GGPO(model, config), twin)


def test_two_adapters_one_after_the_other():
    """The adapter that is active is the one perturbed, and starts with no gradient of another one."""
    model, configs = build("plain")
    configs["other"] = LoraConfig(r=2, lora_alpha=9, target_modules=["up", "head"])
    model.add_adapter("other", configs["other"])
    shake(model)
    model.double()
    config = GGPOConfig(sigma=0.3, beta=3.0)
    ggpo = GGPO(model, config)
    number = assert_equals_twin(model, ggpo, Twin(_detached(model), {"default": configs["default"]}, config))
    model.set_adapter("other")
    plain = _detached(model)
    number += 1
    torch.manual_seed(0)
    y = model(batch(0))
    taus = {layer.name.rpartition(".")[2]: layer.tau for layer in ggpo.layers}
    assert taus["inp"] is None
    assert taus["down"] is None
    for name in ("up", "head"):
        module = plain.get_submodule(f"base_model.model.{name}")
        weight = module.base_layer.weight + module.get_delta_weight("other")
        expected = 0.3 * (weight.square().sum(1) / weight.shape[1]).sqrt()
        torch.testing.assert_close(taus[name], expected, **CLOSE)
    assert not torch.allclose(y, plain.eval()(batch(0)))


def _detached(model):
    """A copy of a perturbed model that is the stock PEFT model."""
    twin = copy.deepcopy(model)
    twin._forward_pre_hooks.clear()
    twin._forward_hooks.clear()
    for module in twin.modules():
        module.__dict__.pop("forward", None)
    return twin


SILENT = {
    "eval": lambda model: model.eval(),
    "merge_adapter": lambda model: model.merge_adapter(),
    "merge_and_unload": lambda model: model.merge_and_unload().train(),
    "unload": lambda model: model.unload().eval(),
}


@pytest.mark.parametrize("case", ["plain", "conv1d", "dora", "bias", "modules_to_save"])
@pytest.mark.parametrize("how", SILENT)
def test_no_noise_in_eval_and_once_merged_or_unloaded(case, how):
    model, _ = build(case)
    stock, x = copy.deepcopy(model), batch(0)
    GGPO(model, GGPOConfig(sigma=0.5))
    assert not torch.allclose(model(x), stock(x))
    quiet, expected = SILENT[how](model), SILENT[how](stock)
    quiet = model if quiet is None else quiet
    expected = stock if expected is None else expected
    assert torch.equal(quiet(x), expected(x))
    assert torch.equal(quiet(x), quiet(x))
    if how == "merge_adapter":
        model.unmerge_adapter()
        assert not torch.allclose(model(x), model(x))
    if how == "eval":
        model.train()
        assert not torch.allclose(model(x), model(x))


def test_no_noise_under_disable_adapter():
    model, _ = build("plain")
    base = copy.deepcopy(model).unload()
    GGPO(model, GGPOConfig(sigma=0.5))
    x = batch(0)
    model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert not torch.allclose(model(x), model(x))


@pytest.mark.parametrize("case", ["plain", "dora", "modules_to_save"])
def test_saved_adapter_is_the_stock_one(case, tmp_path):
    model, _ = build(case)
    model.float()
    torch.manual_seed(1)
    base = Net()
    stock_state = copy.deepcopy(model).state_dict()
    ggpo = GGPO(model, GGPOConfig(sigma=0.5))
    model(batch(0, dtype=torch.float32)).sum().backward()
    ggpo.step()
    assert model.state_dict().keys() == stock_state.keys()
    assert all(torch.equal(value, stock_state[key]) for key, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    x = batch(1, dtype=torch.float32)
    assert torch.equal(loaded(x), model.eval()(x))


def _everything(model):
    """All that an attached object could leave behind: attributes and hooks of every module."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("case", ["plain", "dora", "conv1d"])
def test_detach_leaves_the_model_as_it_was(case):
    model, _ = build(case)
    before, state = _everything(model), copy.deepcopy(model.state_dict())
    ggpo = GGPO(model, GGPOConfig(sigma=0.5))
    assert _everything(model).keys() == before.keys()
    assert any("forward" in vars(module) for module in model.modules())
    loss_of(model(batch(0))).backward()
    ggpo.step()
    model.zero_grad()
    ggpo.detach()
    ggpo.detach()
    after = _everything(model)
    for name, attributes in before.items():
        assert after[name].keys() == attributes.keys(), name
        for key in attributes:
            if key not in ("_parameters", "_dora_cache"):
                assert after[name][key] == attributes[key], (name, key)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(batch(0)), model(batch(0)))
    GGPO(model)


def test_detach_gives_back_a_forward_that_was_set_on_the_instance():
    model, _ = build("plain")
    layer = model.base_model.model.up
    calls, original = [], layer.forward
    layer.forward = lambda x: calls.append(1) or original(x)
    own = layer.forward
    ggpo = GGPO(model)
    model.eval()(batch(0))
    ggpo.detach()
    assert layer.forward is own
    assert calls == [1]


def test_a_parameter_returned_by_the_model_keeps_no_hook():
    class Returning(Net):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return super().forward(x), self.temperature

    model = adapted(Returning(), LoraConfig(r=3, target_modules=TARGETS, modules_to_save=[]))
    model.base_model.model.temperature.requires_grad_()
    ggpo = GGPO(model)
    for _ in range(3):
        loss_of(model(batch(0))[0]).backward()
        ggpo.step()
    ggpo.detach()
    assert not model.base_model.model.temperature._backward_hooks


class Mixed(nn.Module):
    """A layer that can be perturbed, and one that PEFT can adapt and that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(6, 5), nn.LayerNorm(5)

    def forward(self, x):
        return self.norm(self.up(x))


def mixed(targets):
    model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    if "norm" in targets:
        options = {"config": LNTuningConfig(target_modules=["norm"])}
        known = inspect.signature(LNTuningLayer).parameters  # older releases of peft take no configuration
        options = {name: value for name, value in options.items() if name in known}
        model.base_model.model.norm = LNTuningLayer(model.base_model.model.norm, "default", **options)
    return model.train()


def test_layers_that_cannot_be_perturbed_are_named_once_and_trained_plainly():
    model = mixed(["norm", "up"])
    with pytest.warns(UserWarning, match="cannot perturb") as caught:
        ggpo = GGPO(model, GGPOConfig(sigma=0.3))
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "model.norm (an adapter on LayerNorm)" in message
    assert "model.up" not in message
    assert caught[0].filename == __file__
    assert [layer.name for layer in ggpo.layers] == ["base_model.model.up"]
    model(batch(0, dtype=torch.float32)).sum().backward()
    ggpo.step()
    assert all(p.grad is not None for k, p in model.named_parameters() if "ln_tuning" in k and p.requires_grad)


def test_strict_refuses_layers_that_cannot_be_perturbed():
    with pytest.raises(ValueError, match=r"model\.norm \(an adapter on LayerNorm\).*target_modules"):
        GGPO(mixed(["norm", "up"]), GGPOConfig(strict=True))


@pytest.mark.parametrize("model", [nn.Linear(3, 3), Mixed()])
def test_no_adapted_layer_is_an_error(model):
    with pytest.raises(ValueError, match="no adapted layer"):
        GGPO(model)


def test_only_layers_that_cannot_be_perturbed_is_an_error():
    with pytest.raises(ValueError, match="no adapted layer"):
        GGPO(get_peft_model(Mixed(), LNTuningConfig(target_modules=["norm"])))


def test_attaching_twice_is_refused_and_leaves_the_first_intact():
    model, _ = build("plain")
    ggpo = GGPO(model)
    with pytest.raises(ValueError, match="perturbed already"):
        GGPO(model)
    assert not torch.equal(model(batch(0)), model(batch(0)))
    ggpo.detach()
    GGPO(model)


def test_row_norms_of_w0_over_several_blocks_and_layouts():
    for linear in (nn.Linear, conv1d):
        wide = nn.Sequential(linear(5000, 301))
        config = LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=linear is conv1d)
        (layer,), _ = find_layers(get_peft_model(wide, config))
        w0 = layer.base.weight.detach().double()
        w0 = w0.T if linear is conv1d else w0
        torch.testing.assert_close(layer.w0_norms.double(), w0.square().sum(1), rtol=1e-5, atol=0)
        a = torch.randn(2, 5000)
        torch.testing.assert_close(layer.w0.times(a.T).double(), w0 @ a.double().T, rtol=1e-4, atol=1e-5)


def test_copy_of_a_perturbed_model_is_independent():
    model = adapted(net())
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, noise="dense"))
    model(batch(0))
    twin = copy.deepcopy(model)
    x = batch(1)
    expected = copy.deepcopy(model)(x)
    assert torch.equal(twin(x), expected)
    for _ in range(3):
        loss_of(twin(x)).backward()
    assert torch.equal(model(x), expected), "the copy's draws moved the original's"
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    model.zero_grad()
    loss_of(model(x)).backward()
    ggpo.step()
    assert model(x).abs().min() > 0
    ggpo.detach()
    assert torch.equal(model(x), model(x))
    assert not torch.equal(twin(x), twin(x)), "detaching the original detached the copy"


def test_two_perturbed_models_do_not_disturb_each_other():
    def run(models):
        torch.manual_seed(0)
        ggpos = [GGPO(model, GGPOConfig(sigma=0.3, seed=i)) for i, model in enumerate(models)]
        outputs = [[] for _ in models]
        for step in range(3):
            losses = []
            for y, model in zip(outputs, models, strict=True):
                y.append(model(batch(step)))
                losses.append(loss_of(y[-1]))
            sum(losses).backward()
            for ggpo in ggpos:
                ggpo.step()
        return [(torch.stack(y), gradients(model)) for y, model in zip(outputs, models, strict=True)]

    together = run([adapted(net(0)), adapted(net(1))])
    for i in (0, 1):
        alone = adapted(net(i))
        ggpo = GGPO(alone, GGPOConfig(sigma=0.3, seed=i))
        for step in range(3):
            y = alone(batch(step))
            assert torch.equal(y, together[i][0][step])
            loss_of(y).backward()
            ggpo.step()
        torch.testing.assert_close(gradients(alone), together[i][1], rtol=0, atol=0)


def test_an_adapter_made_anew_under_the_same_name_is_the_one_perturbed():
    model, configs = build("plain")
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=0, noise="dense"))
    model(batch(0))
    model.delete_adapter("default")
    model.add_adapter("default", configs["default"])
    model.set_adapter("default")
    shake(model)
    model.double()(batch(0))
    for layer in ggpo.layers:
        weight = layer.base.weight + layer.module.get_delta_weight("default")
        expected = 0.3 * (weight.square().sum(1) / layer.n).sqrt()
        torch.testing.assert_close(layer.tau, expected, **CLOSE)
