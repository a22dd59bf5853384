"""A dense float64 reference of the method: every matrix materialised, every derivative left to autograd.

Written from the equations of the paper (arXiv 2502.14538v1) and from PEFT's documentation of its adapters. Of the code
under test it uses the unit noise z alone, because z is a free choice that nothing else determines.
"""

import copy
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ggpo.perturbation import GGPOConfig
from lora_ggpo.perturbation.noise import NOISES


def unit_noise(config: GGPOConfig, number: int, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """z (m, n) of each layer, float64, of draw ``number``: what the layers' noise is for tau = 1."""
    ones = [SimpleNamespace(index=i, m=m, n=n, tau=torch.ones(m).double()) for i, (m, n) in enumerate(shapes)]
    for layer in ones:
        layer.w0_norms = layer.tau
    return [noise.matrix() for noise in NOISES[config.noise](ones, config.seed, number, config.noise_rank, None)]


def row_norms_squared(matrix: Tensor) -> Tensor:
    return (matrix * matrix).sum(1)


def gradient_estimate(estimator: str, b: Tensor, a: Tensor, db: Tensor, da: Tensor, s: float) -> Tensor:
    """The m x n estimate of G: s (B dA + dB A), or the least-norm solution of dB = s G A^T."""
    if estimator == "lora":
        return s * (b @ da + db @ a)
    return torch.linalg.lstsq(s * a, db.T, driver="gelsd").solution.T


def tau(
    rule: str, sigma: float, beta: float, weight: Tensor, gradient: Tensor | None, w0: Tensor, product: Tensor
) -> Tensor:
    """Noise size of each row (m,) from the m x n matrices W', G (None: there was no step before), W0 and B A."""
    m, n = weight.shape
    w = row_norms_squared(weight)
    g = torch.zeros_like(w) if gradient is None else row_norms_squared(gradient)
    if rule == "paper":
        return (sigma**2 / n * (w + beta * g)).sqrt()
    if rule == "sd-scripts":
        if gradient is None:
            return torch.zeros_like(w)
        mean_norm = w0.norm(dim=1).mean()
        return (sigma * (mean_norm**2 + row_norms_squared(product)).sqrt() + beta * g) / math.sqrt(m)
    assert rule == "relative"
    if g.sum() == 0:
        return (sigma**2 / n * w).sqrt()
    return (sigma**2 / n * w.mean() * ((1 - beta) * w / w.mean() + beta * g / g.mean())).sqrt()


def scaling(config: LoraConfig, name: str) -> float:
    """s = alpha / r, or alpha / sqrt(r) with rsLoRA, after PEFT's patterns."""
    r, alpha = config.rank_pattern.get(name, config.r), config.alpha_pattern.get(name, config.lora_alpha)
    return alpha / (math.sqrt(r) if config.use_rslora else r)


class DenseLora(nn.Module):
    """y = x (W' + eps)^T + bias with W' and eps materialised; A, B, magnitude and bias are its own leaves.

    W' = W0 + sum_k s_k B_k A_k over the active adapters, or with DoRA (one adapter)
    W' = magnitude / ||W0 + s B A|| * (W0 + s B A), the norm held constant in the derivative.
    With dropout, the adapter's part of W' sees dropout(x), and W0 + eps sees x.
    """

    def __init__(self, lora: LoraLinear, configs: dict[str, LoraConfig], name: str) -> None:
        super().__init__()
        base = lora.get_base_layer()
        weight = base.weight.detach().double().clone()
        self.w0 = weight.T if isinstance(base, Conv1D) else weight
        self.adapters = list(lora.active_adapters)
        self.s = {k: scaling(configs[k], name) for k in configs}
        self.a = nn.ParameterDict({k: lora.lora_A[k].weight.detach().double().clone() for k in configs})
        self.b = nn.ParameterDict({k: lora.lora_B[k].weight.detach().double().clone() for k in configs})
        self.bias = None
        if base.bias is not None:
            self.bias = nn.Parameter(base.bias.detach().double().clone(), requires_grad=base.bias.requires_grad)
        self.magnitude = None
        if configs[self.adapters[0]].use_dora:
            self.magnitude = nn.Parameter(lora.lora_magnitude_vector[self.adapters[0]].weight.detach().double().clone())
        self.p = configs[self.adapters[0]].lora_dropout
        self.eps = torch.zeros_like(self.w0)
        self.gradient: Tensor | None = None

    def gain(self) -> Tensor:
        if self.magnitude is None:
            return torch.ones(len(self.w0), 1, dtype=torch.float64)
        return (self.magnitude / self._sum().norm(dim=1).detach())[:, None]

    def _sum(self) -> Tensor:
        return self.w0 + sum(self.s[k] * self.b[k] @ self.a[k] for k in self.adapters)

    def product(self) -> Tensor:
        return sum(self.b[k] @ self.a[k] for k in self.adapters)

    def weight(self) -> Tensor:
        return self.gain() * self._sum()

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0:
            return F.linear(x, self.weight() + self.eps, self.bias)
        return F.linear(x, self.w0 + self.eps, self.bias) + F.linear(F.dropout(x, self.p), self.weight() - self.w0)

    def estimate(self, estimator: str) -> Tensor:
        """Row norms belong to G = dL/dW' of everything active: adapters are joined along their rank."""
        b = torch.cat([self.s[k] * self.b[k].detach() for k in self.adapters], 1)
        db = torch.cat([self.s[k] * self.b[k].grad for k in self.adapters], 1)
        a = torch.cat([self.a[k].detach() for k in self.adapters])
        da = torch.cat([self.a[k].grad for k in self.adapters])
        if estimator == "lstsq":
            db = torch.cat([self.b[k].grad for k in self.adapters], 1)
            a = torch.cat([self.s[k] * self.a[k].detach() for k in self.adapters])
        return gradient_estimate(estimator, b, a, db, da, 1.0) / self.gain().detach()


class Twin:
    """A dense copy of a small PEFT model, with the method written out on top."""

    def __init__(self, model: nn.Module, configs: dict[str, LoraConfig], config: GGPOConfig) -> None:
        self.config, self.number, self.factor = config, 0, 1.0
        self.model = copy.deepcopy(model).double()
        loras = [(k, v) for k, v in self.model.named_modules() if isinstance(v, LoraLinear)]
        self.layers: dict[str, DenseLora] = {}
        for name, lora in loras:
            parent, _, child = name.rpartition(".")
            dense = DenseLora(lora, configs, child)
            setattr(self.model.get_submodule(parent), child, dense)
            self.layers[name] = dense

    def taus(self) -> dict[str, Tensor]:
        c = self.config
        with torch.no_grad():
            return {
                name: tau(c.rule, c.sigma, c.beta, layer.weight(), layer.gradient, layer.w0, layer.product())
                * self.factor
                for name, layer in self.layers.items()
            }

    def __call__(self, x: Tensor, number: int) -> Tensor:
        layers = list(self.layers.values())
        z = unit_noise(self.config, number, [tuple(layer.w0.shape) for layer in layers])
        for layer, size, unit in zip(layers, self.taus().values(), z, strict=True):
            layer.eps = size[:, None] * unit
        return self.model(x)

    def step(self, lr: float) -> None:
        """Remember G, then plain SGD."""
        for layer in self.layers.values():
            layer.gradient = layer.estimate(self.config.gradient)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None and parameter.requires_grad:
                    parameter -= lr * parameter.grad
                parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by PEFT's parameter names."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                found[name] = parameter.grad
        renamed = {}
        for name, value in found.items():
            layer = next((k for k in self.layers if name.startswith(k + ".")), None)
            if layer is not None:
                kind, _, adapter = name[len(layer) + 1 :].partition(".")
                key = {"a": f"lora_A.{adapter}.weight", "b": f"lora_B.{adapter}.weight", "bias": "base_layer.bias"}
                key["magnitude"] = f"lora_magnitude_vector.{self.layers[layer].adapters[0]}.weight"
                name = f"{layer}.{key[kind]}"
            renamed[name] = value
        return renamed
