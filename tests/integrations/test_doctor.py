"""What is pasted into an issue: what it says of each layer is held against what the noise does to the output."""

import copy
import getpass
import platform
import socket
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_ggpo
from lora_ggpo.perturbation import GGPO, GGPOConfig
from lora_ggpo.workspace import environment
from tests.perturbation.nets import TARGETS, Net, adapted, batch, loss_of, net
from tests.perturbation.test_coverage import Attending, Routed


def routed(branch):
    torch.manual_seed(0)
    model = adapted(Routed())
    model.base_model.model.branch = branch
    return model


def moves_the_output(model, name, x):
    """Whether the output hangs on the draw, where this layer alone has noise."""
    ggpo = GGPO(copy.deepcopy(model), GGPOConfig(sigma=0.3))
    ggpo._model(x)  # sizes are taken
    for layer in ggpo.layers:
        layer.tau = layer.tau * (layer.name == name)
    first, second = ggpo._model(x), ggpo._model(x)
    return not torch.equal(first, second)


@pytest.mark.parametrize("branch", ["layers", "fused", "none"])
def test_a_layer_is_called_perturbed_if_its_noise_moves_the_output(branch):
    model, x = routed(branch), batch(0)
    found = lora_ggpo.doctor(model, x)
    assert {layer.name.rpartition(".")[2] for layer in found.layers} == set(TARGETS)
    for layer in found.layers:
        assert layer.perturbed == moves_the_output(model, layer.name, x), layer


def test_layers_that_a_kernel_bypasses_are_named_with_what_to_do():
    found = lora_ggpo.doctor(routed("fused"), batch(0), loss=loss_of)
    assert [layer.name.rpartition(".")[2] for layer in found.bypassed] == ["up", "down"]
    text = str(found)
    assert "2 of 4 adapted layers train without noise" in text
    assert "base_model.model.up, base_model.model.down: it trains, but" in text
    assert "lora_mlp_kernel" in text


@pytest.mark.parametrize(("branch", "frozen"), [("none", False), ("fused", True)])
def test_a_branch_that_does_not_run_or_does_not_train_is_no_fault(branch, frozen):
    model = routed(branch)
    for name, parameter in model.named_parameters():
        if frozen and ("up" in name or "down" in name):
            parameter.requires_grad_(False)
    found = lora_ggpo.doctor(model, batch(0))
    assert [layer.perturbed for layer in found.layers] == [True, False, False, True]
    assert not found.bypassed
    assert "The noise reaches 2 of 4 adapted layers; the others do not train." in str(found)


def test_a_layer_that_cannot_be_perturbed_is_named_with_the_reason():
    model = get_peft_model(Attending(), LoraConfig(r=2, target_modules=["up", "out_proj"]))
    found = lora_ggpo.doctor(model, batch(0, dtype=torch.float32))
    (layer,) = found.bypassed
    assert layer.name.endswith("out_proj")
    assert "never calls it" in layer.why
    assert "target_modules" in layer.why


def test_a_layer_of_an_adapter_that_is_not_active_is_no_fault():
    model = adapted(net(), LoraConfig(r=2, target_modules=["inp", "head"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"]))
    found = {layer.name.rpartition(".")[2]: layer for layer in lora_ggpo.doctor(model.double(), batch(0)).layers}
    assert (found["up"].perturbed, found["up"].bypassed, found["up"].why) == (False, False, "no active adapter has it")
    assert found["inp"].perturbed


class Normalised(Routed):
    """What it returns sums to a constant, and so do its squares: neither has a gradient."""

    def forward(self, x):
        return nn.functional.layer_norm(super().forward(x), (5,), eps=0.0)


def test_without_a_loss_gradients_are_seen_even_behind_a_normalisation():
    torch.manual_seed(0)
    model = adapted(Normalised())
    model.base_model.model.branch = "fused"
    assert len(lora_ggpo.doctor(model, batch(0)).bypassed) == 2


class Counting(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


def test_the_model_is_left_as_it_was():
    model = adapted(Counting()).eval()
    model.base_model.model.inp.train()
    loss_of(model(batch(1))).backward()
    parameters = {name: (p.clone(), p.grad) for name, p in model.named_parameters()}
    modes, drawn = [m.training for m in model.modules()], torch.get_rng_state()
    calls = model.base_model.model.calls.clone()
    lora_ggpo.doctor(model, batch(0))
    for name, parameter in model.named_parameters():
        before, gradient = parameters[name]
        assert torch.equal(parameter, before)
        assert parameter.grad is gradient
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.base_model.model.calls == calls
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
    GGPO(model)  # nothing is left that would refuse it


def test_settings_and_what_they_come_to_are_said():
    config = GGPOConfig(sigma=0.1, noise="dense", schedule="cosine", strict=True)
    facts = lora_ggpo.doctor(adapted(net()), batch(0), config).facts
    assert facts["ggpo"] == "sigma 0.1, noise dense, schedule cosine"
    assert facts["noise"] == "dense, in blocks of rows"
    assert lora_ggpo.doctor(adapted(net()), {"x": batch(0)}, GGPOConfig(sigma=0)).facts["ggpo"] == "defaults"


def test_a_model_that_returns_nothing_to_differentiate_is_refused():
    class Silent(Net):
        def forward(self, x):
            super().forward(x)

    model = adapted(Silent())
    with pytest.raises(ValueError, match="give doctor"):
        lora_ggpo.doctor(model, batch(0))
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_machine_is_told_without_names_of_people_and_places():
    facts = environment.environment()
    assert facts["python"] == platform.python_version()
    assert facts["torch"] == version("torch")
    assert "axolotl" not in facts
    text = "\n".join(environment.aligned(facts.items()))
    private = {str(Path.home()), str(Path.cwd()), socket.gethostname(), getpass.getuser() + "@"}
    assert not [word for word in private if word in text]


def test_an_installed_library_whose_kernels_noise_does_not_reach_is_named(monkeypatch):
    from lora_ggpo.perturbation.watch import REMEDY

    known = environment.version
    monkeypatch.setattr(environment, "version", lambda name: "1.0" if name == "axolotl" else known(name))
    assert environment.environment()["beware of axolotl"].endswith("switch it off")
    for why in environment.BYPASSES.values():  # both say the same
        kernels = [word.strip(",") for word in why.split() if word.startswith("lora_") or word == "fast"]
        assert kernels
        assert all(kernel in REMEDY for kernel in kernels)


@pytest.mark.parametrize(
    ("place", "expected"),
    [("minilm", "minilm"), ("owner/model", "owner/model"), ("CWD/a/b", "a/b"), ("HOME/m", "~/m"), ("/srv/x/m", "m")],
)
def test_paths_are_shown_without_what_is_above_them(tmp_path, monkeypatch, place, expected):
    for name in ("cwd", "home"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(environment.Path, name, lambda name=name: tmp_path / name)
        place = place.replace(name.upper(), str(tmp_path / name))
    assert environment.shown(place) == expected
