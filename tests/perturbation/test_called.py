"""Base layers of other libraries, whose weight only their own forward knows: a stand-in under peft's layers for GPTQ,
AWQ and AQLM, and the real HQQ where it is installed."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn

from lora_ggpo.perturbation import GGPO, GGPOConfig
from lora_ggpo.perturbation.kinds import FOREIGN
from lora_ggpo.perturbation.weights import CalledWeight

from .nets import loss_of, shake

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
N, M = 6, 8
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Packed(nn.Module):
    """A linear layer in 8 bits, with no attribute `weight`."""

    def __init__(self, n=N, m=M, bias=0.1, dtype=torch.float32):
        super().__init__()
        self.in_features, self.out_features, self.dtype = n, m, dtype
        weight = torch.randn(m, n) * n**-0.5
        scales = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales.to(dtype))
        self.register_buffer("bias", (bias * torch.randn(m)).to(dtype))

    def dense(self):
        return self.qweight.to(self.dtype) * self.scales

    def forward(self, x):
        return nn.functional.linear(x.to(self.dtype), self.dense(), self.bias)


class Normalised(Packed):
    def forward(self, x):
        return super().forward(nn.functional.layer_norm(x, x.shape[-1:]))


class WithBias(Packed):
    """As Megatron's."""

    def forward(self, x):
        return super().forward(x), self.bias


class Two(nn.Module):
    def __init__(self, peft_layer, base):
        super().__init__()
        config = LoraConfig(r=3, lora_alpha=5)
        self.up = peft_layer(base(N, M), "default", config=config, r=3, lora_alpha=5)
        self.down = peft_layer(base(M, N), "default", config=config, r=3, lora_alpha=5)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def build(peft_layer, base=Packed):
    torch.manual_seed(0)
    model = Two(peft_layer, base).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    shake(model)
    return model


def dense_forward(model, x, eps):
    for name in ("up", "down"):
        module = getattr(model, name)
        delta = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
        x = x @ (module.base_layer.dense() + eps[name] + delta).T + module.base_layer.bias
        x = torch.tanh(x) if name == "up" else x
    return x


@pytest.mark.parametrize("noise", ["factored", "dense"])
@pytest.mark.parametrize("peft_layer", [GPTQLoraLinear, AwqLoraLinear, AqlmLoraLinear])
def test_output_gradients_and_sizes_are_those_of_the_dense_weight(peft_layer, noise):
    model = build(peft_layer)
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=0.5, rule="relative", noise=noise, strict=True))
    assert all(layer.kind is FOREIGN and layer.a and layer._fusable for layer in ggpo.layers)
    factors = [p for p in model.parameters() if p.requires_grad]
    for i in range(2):
        x = torch.randn(7, N, generator=torch.Generator().manual_seed(i))
        x1, x2 = (x.clone().requires_grad_() for _ in range(2))
        y = model(x1)
        loss_of(y).backward()
        eps = {name: ggpo._drawn[j].matrix() for j, name in enumerate(("up", "down"))}
        expected = dense_forward(model, x2, eps)
        torch.testing.assert_close(y, expected, **CLOSE)
        gradients = torch.autograd.grad(loss_of(expected), [x2, *factors])
        torch.testing.assert_close([x1.grad, *(p.grad for p in factors)], list(gradients), **CLOSE)
        if i == 0:
            for layer in ggpo.layers:
                module = layer.module
                delta = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
                norms = (layer.base.dense() + delta).norm(dim=1)
                torch.testing.assert_close(layer.tau, 0.3 * norms.detach() / layer.n**0.5, **CLOSE)
        ggpo.step()
        model.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_is_told_by_calls_in_blocks_also_beside_a_large_bias(dtype):
    torch.manual_seed(0)
    base = Packed(3000, 700, bias=100.0, dtype=dtype)
    weight, dense = CalledWeight(base, 3000), base.dense().float()
    relative = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(weight.row_norms_squared(), dense.square().sum(1), rtol=relative, atol=0)
    columns = torch.randn(3000, 4)
    exact = dense @ columns
    assert (weight.times(columns) - exact).norm() < relative * exact.norm()
    assert (weight.m, weight.n, weight.dtype) == (700, 3000, torch.float32)


@pytest.mark.parametrize(
    ("base", "reason"),
    [(Normalised, "Normalised, which is not linear"), (WithBias, "WithBias, which cannot be called")],
)
def test_a_layer_that_is_no_linear_one_is_named(base, reason):
    with pytest.raises(ValueError, match=f"found no adapted layer .*{reason}"):
        GGPO(build(GPTQLoraLinear, base))


def test_hqq():
    quantize = pytest.importorskip("hqq.core.quantize")
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            config = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
            settings = {"compute_dtype": torch.float32, "device": "cpu"}
            self.up = quantize.HQQLinear(nn.Linear(64, 96), config, **settings)
            self.down = quantize.HQQLinear(nn.Linear(96, 32), config, **settings)

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    model = get_peft_model(Net(), LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)).train()
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=0.5, rule="relative", strict=True))
    x = torch.randn(5, 64)
    y = model(x)
    loss_of(y).backward()
    expected = x
    for layer, noise in zip(ggpo.layers, ggpo._drawn, strict=True):
        module, w0 = layer.module, layer.base.dequantize()
        weight = w0 + module.get_delta_weight("default")
        torch.testing.assert_close(layer.tau, 0.3 * weight.detach().norm(dim=1) / layer.n**0.5, **CLOSE)
        expected = expected @ (weight + noise.matrix()).T + layer.base.bias
        expected = torch.tanh(expected) if layer is ggpo.layers[0] else expected
    torch.testing.assert_close(y, expected, **CLOSE)
    ggpo.step()
    assert ggpo.metrics()["ggpo/coverage"] == 1
