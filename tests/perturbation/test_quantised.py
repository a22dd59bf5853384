"""QLoRA: noise on a quantised base weight against dense autograd on the weight that it stands for."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_ggpo.perturbation import GGPO, GGPOConfig

bnb = pytest.importorskip("bitsandbytes")

N, HIDDEN, M = 64, 96, 32
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


class Two(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.up, self.down = linear(N, HIDDEN), linear(HIDDEN, M)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def nf4(n, m):
    layer = bnb.nn.Linear4bit(n, m, quant_type="nf4", compute_dtype=torch.float32)
    layer.support_avx512bf16_for_cpu = False  # bitsandbytes' packed weights, which evaluation makes, have no gradient
    return layer


def int8(n, m):
    return bnb.nn.Linear8bitLt(n, m, has_fp16_weights=False, threshold=0.0)


def dense_weight(layer):
    """W0 (m, n) by bitsandbytes' own formula."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return layer.weight.data.float() * layer.weight.SCB[:, None].float() / 127


def build(kind, **settings):
    torch.manual_seed(0)
    if kind == "torchao":
        return build_torchao(**settings)
    model = Two({"nf4": nf4, "int8": int8}[kind]).to("cpu")  # quantises
    setattr(model, {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}[kind], True)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"], **settings))
    shake(model)
    return model, {name: dense_weight(getattr(model, name).base_layer) for name in ("up", "down")}


def build_torchao(**settings):
    quantization = pytest.importorskip("torchao.quantization")
    model = Two(nn.Linear)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"], **settings))
    shake(model)
    return model, {name: getattr(model, name).base_layer.weight.dequantize().float() for name in ("up", "down")}


def shake(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)


def noise_of(ggpo, layer):
    """eps (m, n): what the layer adds to each unit vector."""
    layer.noise = ggpo._drawn[ggpo.layers.index(layer)]
    eye = torch.eye(layer.n)
    layer.passes.begin(training=True)
    with torch.no_grad():
        eps = (layer.forward(eye) - layer.original(eye)).T
    layer.passes.end()
    return eps


def dense_forward(x, w0, eps, layers):
    for name in ("up", "down"):
        module = layers[name].module
        delta = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
        x = x @ (w0[name] + eps[name] + delta).T + module.base_layer.bias
        x = torch.tanh(x) if name == "up" else x
    return x


KINDS = ["nf4", "int8", "torchao"]


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_the_dense_noisy_weight(kind):
    model, w0 = build(kind)
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=0.5, rule="relative"))
    layers = {layer.name.rpartition(".")[2]: layer for layer in ggpo.layers}
    assert set(layers) == {"up", "down"}
    x = torch.randn(7, N)
    for _ in range(2):  # the second step has gradient norms
        x1 = x.clone().requires_grad_()
        model(x1).square().sum().backward()
        eps = {name: noise_of(ggpo, layer) for name, layer in layers.items()}
        assert all(one.norm() > 0.1 * w0[name].norm() for name, one in eps.items())
        x2 = x.clone().requires_grad_()
        found = dense_forward(x2, w0, eps, layers)
        expected = torch.autograd.grad(found.square().sum(), [x2, *factors(layers)])
        # LLM.int8 rounds its inputs too: there only what the noise adds is exact.
        close = {"rtol": 0.1, "atol": 0.02 * float(expected[0].abs().max())} if kind == "int8" else CLOSE
        torch.testing.assert_close(x1.grad, expected[0], **close)
        if kind != "int8":
            torch.testing.assert_close([p.grad for p in factors(layers)], list(expected[1:]), **close)
        ggpo.step()
        model.zero_grad()


def factors(layers):
    return [
        getattr(layers[name].module, factor)["default"].weight for name in layers for factor in ("lora_A", "lora_B")
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_noise_alone_has_the_gradient_of_a_dense_product(kind):
    """Exact for every kind: subtract the layer's output without noise."""
    model, _ = build(kind)
    ggpo = GGPO(model, GGPOConfig(sigma=0.3))
    model(torch.randn(2, N))
    layer = ggpo.layers[0]
    eps = noise_of(ggpo, layer)
    x = torch.randn(5, layer.n, requires_grad=True)
    dy = torch.randn(5, layer.m)
    layer.noise = ggpo._drawn[0]
    layer.passes.begin(training=True)
    (noisy,) = torch.autograd.grad(layer.forward(x), x, dy)
    (plain,) = torch.autograd.grad(layer.original(x), x, dy)
    torch.testing.assert_close(noisy - plain, dy @ eps, rtol=1e-3, atol=1e-3 * float((dy @ eps).abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_row_norms_are_those_of_the_weight_it_stands_for(kind):
    model, w0 = build(kind)
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=0.0))
    model(torch.randn(2, N))
    for layer in ggpo.layers:
        module = layer.module
        b, a = (getattr(module, name)["default"].weight.detach().double() for name in ("lora_B", "lora_A"))
        adapted = w0[layer.name.rpartition(".")[2]].double() + module.scaling["default"] * b @ a
        expected = 0.3 * adapted.norm(dim=1) / layer.n**0.5
        torch.testing.assert_close(layer.tau.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_has_the_variance_of_tau(kind):
    model, _ = build(kind)
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, noise="dense"))
    layer, squares, draws = ggpo.layers[0], 0.0, 300
    for _ in range(draws):
        model(torch.randn(1, N))
        squares = squares + noise_of(ggpo, layer).square().mean(1)
    ratio = squares / draws / layer.tau.square()
    assert (ratio - 1).abs().max() < 5 * (2 / (draws * layer.n)) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_weight_is_never_written_and_evaluation_is_plain(kind):
    model, _ = build(kind)
    before = [copy.deepcopy(getattr(model, name).base_layer.weight) for name in ("up", "down")]
    x = torch.randn(3, N)
    plain = model.eval()(x)
    ggpo = GGPO(model.train(), GGPOConfig(sigma=0.5))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for _ in range(20):
        model(x).sum().backward()
        optimizer.step()
        ggpo.step()
        optimizer.zero_grad()
    assert not torch.equal(model(x), plain)
    assert torch.equal(model.eval()(x), plain)
    with model.train().disable_adapter():
        first, second = model(x), model(x)
    assert torch.equal(first, second)
    ggpo.detach()
    assert torch.equal(model.eval()(x), plain)
    for weight, name in zip(before, ("up", "down"), strict=True):
        now = getattr(model, name).base_layer.weight
        if kind == "torchao":
            weight, now = weight.dequantize(), now.dequantize()
        assert torch.equal(weight, now)


def test_autocast_gives_the_type_that_plain_lora_gives():
    model, _ = build("nf4")
    x = torch.randn(3, N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(x)
        GGPO(model, GGPOConfig(sigma=0.3))
        y = model(x)
    assert y.dtype == plain.dtype
    assert not torch.equal(y, plain)
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
