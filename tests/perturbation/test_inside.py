"""Weights that are read, not called: of nn.MultiheadAttention and of experts, against dense autograd on W' + eps."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call
from transformers import MixtralConfig, MixtralForCausalLM

from lora_ggpo.perturbation import GGPO, GGPOConfig

from .nets import loss_of, shake

CLOSE = {"rtol": 1e-8, "atol": 1e-10}


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Stack(nn.Module):
    """Experts whose weights are stored as (E, m, n), or as (E, n, m)."""

    def __init__(self, transposed):
        super().__init__()
        self.is_transposed = transposed
        up, down = (3, 6, 10), (3, 10, 6)
        self.up = nn.Parameter(torch.randn(up if transposed else down) * 0.4)
        self.down = nn.Parameter(torch.randn(down if transposed else up) * 0.4)

    def forward(self, x):
        up, down = (w if self.is_transposed else w.transpose(1, 2) for w in (self.up, self.down))
        return (torch.tanh(x.unsqueeze(-3) @ up) @ down).mean(-3)


class Experts(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        self.experts = Stack(transposed)

    def forward(self, x):
        return self.experts(x)


CASES = {
    "attention": (Attending, {"target_modules": ["attention"]}),
    "experts": (lambda: Experts(False), {"target_parameters": ["experts.up", "experts.down"]}),
    "transposed experts": (lambda: Experts(True), {"target_parameters": ["experts.up", "experts.down"]}),
    "one parameter": (lambda: nn.Sequential(nn.Linear(6, 8)), {"target_parameters": ["0.weight"]}),
}


def build(case, two=False):
    make, targets = CASES[case]
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **{"target_modules": []} | targets)
    net = make()
    model = get_peft_model(copy.deepcopy(net), config)
    if two:
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    shake(model)
    return model.double().train(), net.double()


def merged_weights(model):
    """W' by the names that the plain net has, as PEFT merges it."""
    return dict(copy.deepcopy(model).merge_and_unload().named_parameters())


def name_in_net(layer):
    if layer.parameter == "in_proj_weight":
        return "attention.in_proj_weight"
    if layer.outer is not layer:
        return "attention.out_proj.weight"
    return {"weight": "0.weight"}.get(layer.parameter, f"experts.{layer.parameter}")


def rows(weight, transposed):
    """A parameter as a matrix (m, n), experts one below the other."""
    return (weight.transpose(1, 2) if transposed else weight).reshape(-1, weight.shape[1 if transposed else -1])


def unrows(matrix, weight, transposed):
    shape = weight.transpose(1, 2).shape if transposed else weight.shape
    return matrix.reshape(shape).transpose(1, 2) if transposed else matrix.reshape(shape)


@pytest.mark.parametrize("noise", ["factored", "dense"])
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_output_gradients_and_sizes_are_those_of_the_dense_weights(case, two, noise):
    model, net = build(case, two)
    weights = merged_weights(model)
    transposed = case == "transposed experts"
    base = {key: value.detach().clone() for key, value in net.named_parameters()}
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=0.5, rule="relative", noise=noise, gradient="sketch", strict=True))
    assert len(ggpo.layers) == (1 if case == "one parameter" else 2)
    x1, x2 = (torch.randn(2, 5, 6).double().requires_grad_() for _ in range(2))
    x2.data.copy_(x1.data)
    y = model(x1)
    loss_of(y).backward()
    noisy = {key: value.detach().clone() for key, value in weights.items()}
    for layer, drawn in zip(ggpo.layers, ggpo._drawn, strict=True):
        key = name_in_net(layer)
        noisy[key] += unrows(drawn.matrix(), noisy[key], transposed)
        of = weights[key] if layer.a else base[key]
        norms = rows(of.detach(), transposed).norm(dim=1)
        torch.testing.assert_close(layer.tau, 0.3 * norms / layer.n**0.5, **CLOSE)
        assert bool(layer.a) == (key in ("attention.in_proj_weight", "0.weight"))
    noisy = {key: value.requires_grad_() for key, value in noisy.items()}
    expected = functional_call(net, noisy, (x2,))
    loss_of(expected).backward()
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(x1.grad, x2.grad, **CLOSE)
    for layer in ggpo.layers:
        r, s = layer.sketch
        g = rows(noisy[name_in_net(layer)].grad, transposed)
        assert g.norm() > 0
        torch.testing.assert_close(s.grad, g @ r.T, **CLOSE)
    ggpo.step()
    assert ggpo.metrics()["ggpo/coverage"] == ggpo.metrics()["ggpo/coverage_parameters"] == 1


@pytest.mark.parametrize("case", CASES)
def test_w0_is_never_written_and_outside_training_it_is_the_stock_model(case):
    model, _ = build(case)
    stock, x = copy.deepcopy(model), torch.randn(2, 5, 6).double()
    ggpo = GGPO(model, GGPOConfig(sigma=0.5, strict=True))
    assert not torch.allclose(model(x), stock(x))
    with pytest.raises((RuntimeError, AssertionError)):
        model(torch.randn(2, 5, 7).double())
    state = stock.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(model(x), stock(x), **CLOSE)
    torch.testing.assert_close(model.eval()(x), stock.eval()(x), **CLOSE)
    model.train(), stock.train()
    with model.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(model(x), stock(x), **CLOSE)
    model.merge_adapter(), stock.merge_adapter()
    torch.testing.assert_close(model(x), stock(x), **CLOSE)
    model.unmerge_adapter(), stock.unmerge_adapter()
    assert not torch.allclose(model(x), stock(x))
    ggpo.detach()
    torch.testing.assert_close(model(x), stock(x), **CLOSE)
    for module in model.modules():
        assert not any((module._forward_hooks, module._forward_pre_hooks, "forward" in vars(module)))


def test_a_mixture_of_experts_trains():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    net = MixtralForCausalLM(MixtralConfig(vocab_size=20, num_hidden_layers=2, num_local_experts=3, **sizes))
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = get_peft_model(net, config).train()
    ggpo = GGPO(model, GGPOConfig(sigma=0.1, beta=0.5, rule="relative", strict=True))
    assert len(ggpo.layers) == 6
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = torch.randint(0, 20, (4, 8)), []
    for _ in range(8):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        ggpo.step()
        optimizer.zero_grad()
        assert ggpo.metrics()["ggpo/coverage"] == 1
    assert losses[-1] < losses[0]


def test_experts_in_8_bits_are_named():
    model, _ = build("experts")
    stack = model.base_model.model.experts.get_base_layer()
    stack.up.data = stack.up.data.to(torch.float8_e4m3fn)
    with pytest.warns(UserWarning, match="adapter on up, of dtype torch.float8_e4m3fn on cpu"):
        ggpo = GGPO(model)
    assert [layer.parameter for layer in ggpo.layers] == ["down"]


@pytest.mark.parametrize("case", CASES)
def test_a_copy_is_independent(case):
    model, _ = build(case)
    ggpo = GGPO(model, GGPOConfig(sigma=0.5, strict=True))
    model(x := torch.randn(2, 5, 6).double())
    twin = copy.deepcopy(model)
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(twin(x), expected, **CLOSE)
    ggpo.detach()
    torch.testing.assert_close(model(x), model(x), **CLOSE)
    assert not torch.allclose(twin(x), twin(x))
