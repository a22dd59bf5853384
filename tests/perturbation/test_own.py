"""Layers of LoRA classes that are not PEFT's, against the same net with dense matrices in float64."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from lora_ggpo import GGPO, GGPOConfig, Parts, register_layer
from lora_ggpo.perturbation.own import _PARTS
from lora_ggpo.perturbation.reach import reach

from .nets import batch, gradients, loss_of
from .reference import gradient_estimate, tau, unit_noise

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Inside(nn.Module):
    """A layer of the model that holds its base layer, and A and B as parameters; as LitGPT's."""

    def __init__(self, n, m, rank=3, scaling=1.5):
        super().__init__()
        self.linear, self.scaling, self.merged = nn.Linear(n, m), scaling, False
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(rank, n)), nn.Parameter(0.3 * torch.randn(m, rank))
        self.linear.requires_grad_(False)

    def forward(self, x):
        return self.linear(x) + (x @ self.lora_A.T @ self.lora_B.T) * self.scaling


class Halves(Inside):
    """Each half of the outputs has a thin part of its own; as the joined queries, keys and values of LitGPT."""

    def __init__(self, n, m, rank=3, scaling=1.5):
        super().__init__(n, m, rank, scaling)
        self.lora_A = nn.Parameter(torch.randn(2 * rank, n))

    def wide(self):
        return torch.block_diag(*self.lora_B.chunk(2))

    def forward(self, x):
        first, second = (x @ self.lora_A.T).chunk(2, -1)
        upper, lower = self.lora_B.chunk(2)
        return self.linear(x) + torch.cat([first @ upper.T, second @ lower.T], -1) * self.scaling


class StandIn(nn.Module):
    """What is no part of the model, and takes the place of a layer's forward; as those of sd-scripts and LyCORIS."""

    def __init__(self, org, rank=3, scale=0.7):
        super().__init__()
        self.org, self.scale, self.multiplier = [org], scale, 1.0
        if isinstance(org, nn.Conv2d):
            self.lora_down = nn.Conv2d(org.in_channels, rank, org.kernel_size, org.stride, org.padding, bias=False)
            self.lora_up = nn.Conv2d(rank, org.out_channels, 1, bias=False)
        else:
            self.lora_down, self.lora_up = nn.Linear(org.in_features, rank, bias=False), None
            self.lora_up = nn.Linear(rank, org.out_features, bias=False)
        self.org_forward, org.forward = org.forward, self.forward

    def forward(self, x):
        return self.org_forward(x) + self.lora_up(self.lora_down(x)) * self.multiplier * self.scale


class Bilinear(nn.Module):
    """A layer that has no type GGPO knows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Bilinear(4, 4, 4)

    def forward(self, x):
        return self.linear(x, x)


@pytest.fixture(autouse=True)
def registered():
    before = dict(_PARTS)
    register_layer(Inside, lambda m: None if m.merged else Parts(m.linear, m.lora_A, m.lora_B, m.scaling))
    register_layer(Halves, lambda m: Parts(m.linear, m.lora_A, m.wide, m.scaling))
    register_layer(StandIn, lambda m: Parts(m.org[0], m.lora_down, m.lora_up, m.scale * m.multiplier))
    register_layer(Bilinear, lambda m: Parts(m.linear))
    yield
    _PARTS.clear()
    _PARTS.update(before)


class Net(nn.Module):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.out = make(6, 8), make(8, 4)
        self.double()

    def forward(self, x):
        return self.out(torch.tanh(self.inp(x)))


class Images(nn.Module):
    """A convolution with a stride and a linear layer, with adapters that stand in for their forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.out = nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.Linear(6, 4)
        self.double().requires_grad_(False).eval()

    def forward(self, x):
        return self.out(torch.tanh(self.inp(x)).flatten(2).mean(-1))


def images():
    """The model in evaluation mode, as sd-scripts has it, and its adapters in training mode."""
    model = Images()
    adapters = nn.ModuleList([StandIn(model.inp), StandIn(model.out)]).double()
    return model, adapters


PICTURES = torch.randn(5, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def build(kind):
    """Model, what holds A and B, their names, and the input."""
    if kind == "stand-in":
        model, adapters = images()
        names = ["lora_down.weight", "lora_up.weight"]
        return model, list(adapters), names, PICTURES
    model = Net({"inside": Inside, "halves": Halves}[kind])
    return model, [model.inp, model.out], ["lora_A", "lora_B"], batch(0)


class Dense:
    """The same function of A and B with all matrices in sight, and eps on the whole weight."""

    def __init__(self, model, adapters, names):
        self.model, self.leaves, self.adapters, self.names = model, [], adapters, names
        for adapter in adapters:
            self.leaves.append([adapter.get_parameter(name).detach().clone().requires_grad_() for name in names])

    def bases(self):
        return [one.linear if isinstance(one, Inside) else one.org[0] for one in self.adapters]

    def factors(self, index, values):
        """A (r, n) and B (m, r) of the adapter, from its parameters or their gradients."""
        a, b = (value.flatten(1) for value in values)
        return (a, torch.block_diag(*b.chunk(2))) if isinstance(self.adapters[index], Halves) else (a, b)

    def weight(self, index):
        adapter = self.adapters[index]
        a, b = self.factors(index, self.leaves[index])
        s = adapter.scaling if isinstance(adapter, Inside) else adapter.scale
        return self.bases()[index].weight.flatten(1) + s * b @ a

    def __call__(self, x, eps):
        weights = [self.weight(index) + one for index, one in enumerate(eps)]
        first, second = self.bases()
        shape = first.weight.shape
        if len(shape) == 4:
            h = functional.conv2d(x, weights[0].view(shape), first.bias, first.stride, first.padding)
            h = torch.tanh(h).flatten(2).mean(-1)
        else:
            h = torch.tanh(functional.linear(x, weights[0], first.bias))
        return functional.linear(h, weights[1], second.bias)


def eps_of(config, dense, gradient, number):
    """eps of each layer by the paper's rule, for G (m, n) of the step before, or None."""
    weights = [dense.weight(index).detach() for index in range(2)]
    units = unit_noise(config, number, [tuple(weight.shape) for weight in weights])
    sizes = [tau("paper", config.sigma, config.beta, w, g, w, w) for w, g in zip(weights, gradient, strict=True)]
    return [size[:, None] * unit for size, unit in zip(sizes, units, strict=True)]


@pytest.mark.parametrize("kind", ["inside", "halves", "stand-in"])
@pytest.mark.parametrize("noise", ["factored", "dense"])
def test_two_steps_are_those_of_the_dense_net(kind, noise):
    model, adapters, names, x = build(kind)
    config = GGPOConfig(sigma=0.3, beta=0.5, noise=noise, seed=3)
    dense, ggpo = Dense(model, adapters, names), GGPO(model, config)
    gradient = [None, None]
    for number in (1, 2):
        x = x.detach().clone().requires_grad_()
        loss_of(model(x)).backward()
        given = x.grad.clone()
        eps = eps_of(config, dense, gradient, number)
        x.grad = None
        loss_of(dense(x, eps)).backward()
        torch.testing.assert_close(given, x.grad, **CLOSE)
        for index, adapter in enumerate(adapters):
            for name, leaf in zip(names, dense.leaves[index], strict=True):
                torch.testing.assert_close(adapter.get_parameter(name).grad, leaf.grad, **CLOSE)
        if kind == "halves":  # its gradient comes from a sketch
            break
        s = adapters[0].scaling if kind == "inside" else adapters[0].scale
        for index, leaves in enumerate(dense.leaves):
            a, b = dense.factors(index, [leaf.detach() for leaf in leaves])
            da, db = dense.factors(index, [leaf.grad for leaf in leaves])
            gradient[index] = gradient_estimate("lora", b, a, db, da, s)
        ggpo.step()
        with torch.no_grad():
            for index, adapter in enumerate(adapters):
                for name, leaf in zip(names, dense.leaves[index], strict=True):
                    adapter.get_parameter(name).sub_(0.1 * leaf.grad)
                    leaf.sub_(0.1 * leaf.grad)
                    adapter.get_parameter(name).grad = leaf.grad = None
    assert ggpo.metrics()["ggpo/coverage"] == 1


def test_a_factor_that_is_computed_has_a_sketched_gradient():
    """dL/dS of the sketch is G R^T of the dense G, so the mean of many estimates is ||G_i||^2."""
    model, adapters, names, x = build("halves")
    ggpo, dense = GGPO(model, GGPOConfig(sigma=1e-9, beta=0.5, noise_rank=4096)), Dense(model, adapters, names)
    zeros = [torch.zeros_like(dense.weight(index)).requires_grad_() for index in range(2)]
    loss_of(dense(x, zeros)).backward()
    loss_of(model(x)).backward()
    ggpo.step()
    for layer, zero in zip(ggpo.layers, zeros, strict=True):
        found = ggpo.state_dict()[f"gradient_norms_squared.{layer.name}"]
        torch.testing.assert_close(found, zero.grad.square().sum(1), rtol=5 * math.sqrt(2 / 4096), atol=0)


@pytest.mark.parametrize("kind", ["inside", "halves", "stand-in"])
def test_sigma_zero_evaluation_and_detaching_leave_the_model_as_it_was(kind):
    model, _, _, x = build(kind)
    plain = model(x)
    for config in (GGPOConfig(sigma=0.0), GGPOConfig(sigma=0.3)):
        ggpo = GGPO(model, config)
        assert torch.equal(model(x), plain) == (config.sigma == 0)
        with torch.no_grad():
            assert torch.equal(model(x), plain)
        ggpo.detach()
        assert torch.equal(model(x), plain)


def test_an_adapter_outside_of_the_model_has_a_training_mode_of_its_own():
    model, adapters, _, x = build("stand-in")
    plain, ggpo = model(x), GGPO(model, GGPOConfig(sigma=0.3))
    assert not model.training
    assert not torch.equal(model(x), plain)
    for adapter in adapters:
        adapter.eval()
    assert torch.equal(model(x), plain)
    ggpo.detach()


def test_a_layer_inside_of_a_model_in_evaluation_is_plain():
    model, *_, x = build("inside")
    plain = model.eval()(x)
    GGPO(model, GGPOConfig(sigma=0.3))
    assert torch.equal(model(x), plain)


def test_scaling_is_that_of_now():
    """||W'|| follows a multiplier that a training loop changes."""
    model, adapters, names, x = build("stand-in")
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=0.0))
    for multiplier in (1.0, 5.0):
        for adapter in adapters:
            adapter.multiplier = multiplier
        loss_of(model(x)).backward()
        ggpo.step()
        dense = Dense(model, adapters, names)
        a, b = dense.factors(1, dense.leaves[1])
        weight = model.out.weight + 0.7 * multiplier * b @ a
        torch.testing.assert_close(ggpo.layers[1].tau, 0.3 * weight.norm(dim=1).detach() / math.sqrt(6), **CLOSE)


def test_without_a_and_b_the_size_is_that_of_w0():
    register_layer(Inside, lambda m: Parts(m.linear))
    model, *_, x = build("inside")
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=0.0))
    loss_of(model(x)).backward()
    expected = 0.3 * model.inp.linear.weight.norm(dim=1) / math.sqrt(6)
    torch.testing.assert_close(ggpo.layers[0].tau, expected.detach(), **CLOSE)


def test_a_layer_that_adapts_nothing_is_left_alone():
    model, *_, x = build("inside")
    model.inp.merged = True
    ggpo = GGPO(model, GGPOConfig(sigma=0.3))
    assert [layer.name for layer in ggpo.layers] == ["out"]
    model(x)
    assert ggpo.metrics()["ggpo/coverage"] == 1


def test_a_layer_that_cannot_be_perturbed_is_named():
    model = nn.Sequential(Net(Inside).inp, nn.Linear(8, 4).double(), Bilinear().double())
    with pytest.warns(UserWarning, match=r"cannot perturb 2 \(Bilinear on Bilinear\): trained without noise"):
        ggpo = GGPO(model, GGPOConfig(sigma=0.3))
    model(batch(0))
    assert ggpo.metrics()["ggpo/coverage"] == 0.5
    assert [(one.name, one.kind, one.perturbed) for one in reach(ggpo)] == [
        ("0", "Linear", True),
        ("2", "Bilinear", False),
    ]


def test_compiled_it_is_the_same_in_one_graph():
    found = []
    for compiles in (False, True):
        model, *_, x = build("inside")
        if compiles:
            model.compile(backend="eager", fullgraph=True)
        ggpo = GGPO(model, GGPOConfig(sigma=0.3, rule="relative", beta=0.5))
        for _ in range(2):
            loss_of(model(x)).backward()
            ggpo.step()
        found.append(gradients(model))
        assert ggpo.metrics()["ggpo/coverage"] == 1
    torch.testing.assert_close(found[0], found[1], **CLOSE)


def test_a_second_ggpo_is_refused():
    model, *_ = build("stand-in")
    GGPO(model, GGPOConfig(sigma=0.3))
    with pytest.raises(ValueError, match="perturbed already"):
        GGPO(model, GGPOConfig(sigma=0.3))


def test_only_classes_of_modules_are_taken():
    with pytest.raises(TypeError, match="register_layer takes a class that inherits from"):
        register_layer(Inside(4, 4), lambda m: None)


def test_a_copy_has_its_own_adapters():
    model, *_, x = build("inside")
    GGPO(model, GGPOConfig(sigma=0.3))
    twin = copy.deepcopy(model)
    loss_of(twin(x)).backward()
    assert gradients(twin)
    assert not gradients(model)


def test_weights_in_eight_bits_are_read():
    """sd-scripts keeps a model in float8 (fp8_base), which torch promotes to nothing."""
    model, _ = images()
    norms = model.out.weight.to(torch.float8_e4m3fn).float().norm(dim=1)
    model.out.to(torch.float8_e4m3fn)
    layer = GGPO(model, GGPOConfig(sigma=0.3)).layers[1]
    torch.testing.assert_close(layer.w0_norms, norms.square())
