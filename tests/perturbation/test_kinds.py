"""Each type of layer against its own forward on dense matrices in float64: eps in place of the weight is what the noise
adds, and sizes are those of the dense W' and of the dense G."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call

from lora_ggpo.perturbation import GGPO, GGPOConfig
from lora_ggpo.perturbation.scales import ESTIMATORS

from .nets import conv1d, loss_of, shake

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class ScaledEmbedding(nn.Embedding):
    """As Gemma's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(3.0))

    def forward(self, x):
        return super().forward(x) * self.embed_scale


TOKENS = torch.tensor([[1, 4, 2, 2, 0], [3, 3, 9, 8, 1]])

LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), (7, 6)),
    "transposed linear": (lambda: conv1d(6, 8), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0)), (2, 4, 5, 6)),
    "conv2d, circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 6)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 6)),
    "conv2d, dilation": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=2), (2, 2, 4, 4, 4)),
    "embedding": (lambda: nn.Embedding(10, 6), TOKENS),
    "embedding, padded": (lambda: nn.Embedding(10, 6, padding_idx=2), TOKENS),
    "embedding, scaled": (lambda: ScaledEmbedding(10, 6), TOKENS),
}
"""A layer, and an input or its shape."""

ADAPTERS = {
    "lora": {},
    "dropout": {"lora_dropout": 0.4},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "two": {},
}

OTHER_INPUT = ("conv2d, circular", "conv2d, groups", "conv2d, dilation")
"""Convolutions whose LoRA, as PEFT makes it, is no change of the weight: it has no such padding, groups or dilation."""

NOT_IN_PEFT = {("conv2d, groups", "dora")}


class Holder(nn.Module):
    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def build(layer, adapter):
    make, x = LAYERS[layer]
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"], "fan_in_fan_out": layer == "transposed linear"}
    model = get_peft_model(Holder(make()), LoraConfig(**settings, **ADAPTERS[adapter]))
    if adapter == "two":
        model.add_adapter("other", LoraConfig(**settings | {"r": 2}))
        model.base_model.set_adapter(["default", "other"])
    shake(model)
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            nn.init.normal_(parameter, std=0.3)
    x = x if isinstance(x, torch.Tensor) else torch.randn(x, dtype=torch.float64)
    return model.double().train(), x


def stored(base, w):
    """A matrix (m, n) in the form in which the layer keeps its weight."""
    w = w.T if isinstance(base, nn.Embedding) or type(base).__name__ == "Conv1D" else w
    return w.reshape(base.weight.shape)


def rows(base, weight):
    """The other way round."""
    weight = weight.T if isinstance(base, nn.Embedding) or type(base).__name__ == "Conv1D" else weight
    return weight.flatten(1)


def own_forward(base, w, x):
    """The layer's own forward with w (m, n) in place of its weight, and no bias."""
    bare = copy.deepcopy(base)
    bare.padding_idx = None  # which keeps a gradient from the weight and nothing else
    weights = {"weight": stored(base, w)}
    if getattr(base, "bias", None) is not None:
        weights["bias"] = torch.zeros_like(base.bias)
    return functional_call(bare, weights, (x,))


def adapted_weight(module):
    """W' (m, n) as PEFT merges it."""
    merged = copy.deepcopy(module)
    del merged.__dict__["forward"]
    merged.merge()
    return rows(module.get_base_layer(), merged.get_base_layer().weight.detach())


CASES = [(layer, adapter) for layer in LAYERS for adapter in ADAPTERS if (layer, adapter) not in NOT_IN_PEFT]


def differences(ggpo, x, dy=None):
    """What the noise of the last draw adds to the output and to dL/dx."""
    (layer,) = ggpo.layers
    layer.noise = ggpo._drawn[0]
    layer.passes.begin(training=True)
    results = []
    for forward in (layer.forward, layer.original):
        torch.manual_seed(0)
        given = x.clone().requires_grad_(x.is_floating_point())
        y = forward(given)
        dy = torch.randn_like(y) if dy is None else dy
        results.append((y.detach(), torch.autograd.grad(y, given, dy)[0] if given.requires_grad else None))
    layer.passes.end()
    (y, dx), (plain, plain_dx) = results
    return y - plain, None if dx is None else dx - plain_dx, dy


@pytest.mark.parametrize("noise", ["factored", "dense"])
@pytest.mark.parametrize(("layer", "adapter"), CASES)
def test_the_noise_is_eps_in_the_layers_own_forward(layer, adapter, noise):
    model, x = build(layer, adapter)
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, noise=noise, beta=0, strict=True))
    base = ggpo.layers[0].base
    for _ in range(2):
        model(x)
        eps = ggpo._drawn[0].matrix()
        change, dx, dy = differences(ggpo, x)
        given = x.clone().requires_grad_(x.is_floating_point())
        expected = own_forward(base, eps, given)
        assert eps.norm() > 0
        torch.testing.assert_close(change, expected.detach(), **CLOSE)
        if dx is not None:
            torch.testing.assert_close(dx, torch.autograd.grad(expected, given, dy)[0], **CLOSE)


@pytest.mark.parametrize(("layer", "adapter"), CASES)
def test_the_weights_rows_are_those_of_the_dense_weight(layer, adapter):
    """Of W' where A and B see what W0 sees; of W0 elsewhere."""
    model, x = build(layer, adapter)
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=0, strict=True))
    model(x)
    (one,) = ggpo.layers
    factorless = layer in OTHER_INPUT or (adapter == "dora" and "embedding" in layer)
    assert bool(one.a) != factorless
    weight = rows(one.base, one.base.weight.detach()) if factorless else adapted_weight(one.module)
    torch.testing.assert_close(one.tau, 0.3 * weight.norm(dim=1) / one.n**0.5, **CLOSE)


def noisy_step(layer, adapter, gradient):
    """One pass with gradients: the perturbed layer, and the dense G = dL/dW' at W' + eps."""
    model, x = build(layer, adapter)
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=0.5, gradient=gradient, rule="relative", strict=True))
    y = model(x)
    y.retain_grad()
    loss_of(y).backward()
    (one,) = ggpo.layers
    w = rows(one.base, one.base.weight.detach()).clone().requires_grad_()
    (g,) = torch.autograd.grad(own_forward(one.base, w, x), w, y.grad)
    return ggpo, one, g


@pytest.mark.parametrize(("layer", "adapter"), CASES)
def test_a_sketch_is_of_the_dense_gradient(layer, adapter):
    ggpo, one, g = noisy_step(layer, adapter, "sketch")
    r, s = one.sketch
    torch.testing.assert_close(s.grad, g @ r.T, **CLOSE)
    ggpo.step()
    found = ggpo._groups[0].gradient[0]
    torch.testing.assert_close(found, (g @ r.T).square().mean(1), **CLOSE)


@pytest.mark.parametrize("gradient", ["lora", "lstsq"])
@pytest.mark.parametrize(
    ("layer", "adapter"),
    [(layer, adapter) for layer, adapter in CASES if layer not in OTHER_INPUT and adapter not in ("dropout", "dora")],
)
def test_estimates_from_a_and_b_are_those_of_the_dense_gradient(layer, adapter, gradient):
    ggpo, one, g = noisy_step(layer, adapter, gradient)
    module, names = one.module, list(one.module.active_adapters)
    kind = "lora_embedding" if "embedding" in layer else "lora"
    a, b = ([getattr(module, f"{kind}_{factor}")[name] for name in names] for factor in "AB")
    a, b = ([getattr(one, "weight", one) for one in factors] for factors in (a, b))
    s = [module.scaling[name] for name in names]
    a = torch.cat([one.detach().flatten(1) * k for one, k in zip(a, s, strict=True)])
    b = torch.cat([one.detach().flatten(1) for one in b], 1)
    seen = g.clone()
    if layer == "embedding, padded":
        seen[:, 2] = 0  # where PEFT's A gets no gradient
    estimate = b @ b.T @ seen * s[0] ** 2 + g @ a.T @ a
    if gradient == "lstsq":
        estimate = torch.linalg.lstsq(a, (g @ a.T).T, driver="gelsd").solution.T
    ggpo.step()
    if len(set(s)) == 1 or gradient == "lstsq":
        torch.testing.assert_close(ggpo._groups[0].gradient[0], estimate.square().sum(1), **CLOSE)


def test_a_sketch_is_unbiased_over_draws():
    ggpo, one, g = noisy_step("linear", "lora", "sketch")
    (group,), draws, total = ggpo._groups, 4000, 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        group.draw_sketches(8, generator)
        r, s = one.sketch
        s.grad = g @ r.T
        total = total + ESTIMATORS["sketch"](group)[0]
    exact = g.square().sum(1)
    assert ((total / draws / exact - 1).abs() < 5 * (2 / 8 / draws) ** 0.5).all()
