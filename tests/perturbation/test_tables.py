"""A new rule, estimator, schedule or noise is one entry of a table, and the documentation names every entry."""

import math
import re
from pathlib import Path

import pytest
import torch

from lora_ggpo.perturbation import GGPO, GGPOConfig
from lora_ggpo.perturbation.config import CHOICES
from lora_ggpo.perturbation.noise import NOISES, Factors, mix
from lora_ggpo.perturbation.scales import ESTIMATORS, RAMPS, RULES, Rule

from .nets import adapted, batch, loss_of, net


def uniform_factors(layers, seed, number, rank, dtype):
    """eps = diag(tau) u, with u uniform in [-sqrt(3), sqrt(3)]: one factor is the identity."""
    generator = torch.Generator().manual_seed(mix(seed, number))
    sized = [(layer, (2 * torch.rand(layer.m, layer.n, generator=generator) - 1) * math.sqrt(3)) for layer in layers]
    return [Factors(torch.eye(layer.n).double(), layer.tau[:, None] * u) for layer, u in sized]


def constant(sigma, beta, norms):
    guided = torch.zeros_like(norms.weight) if norms.gradient is None else beta * norms.gradient
    return sigma**2 + guided, guided


NEW = {
    "rule": (RULES, "constant", Rule(constant)),
    "gradient": (ESTIMATORS, "columns of B", lambda of: of.db().square().sum(-1)),
    "schedule": (RAMPS, "half", lambda progress: 0.5),
    "noise": (NOISES, "uniform", uniform_factors),
}


@pytest.fixture
def entries(monkeypatch):
    for field, (table, name, entry) in NEW.items():
        with pytest.raises(ValueError, match=rf"GGPOConfig\.{field} must be one of"):
            GGPOConfig(**{field: name})
        monkeypatch.setitem(table, name, entry)
    return {field: name for field, (_, name, _) in NEW.items()}


def test_one_entry_each_makes_a_new_rule_estimator_schedule_and_noise(entries):
    model = adapted(net())
    ggpo = GGPO(model, GGPOConfig(sigma=0.2, beta=1.0, **entries), total_steps=2)
    loss_of(model(batch(0))).backward()
    for layer in ggpo.layers:
        torch.testing.assert_close(layer.tau, torch.full((layer.m,), 0.1, dtype=torch.float64))
    gradients = {layer.name: layer.b[0].weight.grad.square().sum(1) for layer in ggpo.layers}
    ggpo.step()
    x = torch.eye(6, dtype=torch.float64)
    model(batch(1))
    for layer in ggpo.layers:
        torch.testing.assert_close(layer.tau, 0.5 * (0.2**2 + gradients[layer.name]).sqrt())
    layer = ggpo.layers[0]
    layer.passes.begin(training=True)
    layer.noise = ggpo._drawn[0]
    eps = (layer.forward(x) - layer.original(x)).T
    assert 0 < (eps.abs() / layer.tau[:, None]).max() <= math.sqrt(3)


def test_the_guide_names_every_entry():
    guide = (Path(__file__).parents[2] / "docs/method.md").read_text(encoding="utf-8")
    for field in ("rule", "gradient", "noise"):
        rows = re.search(rf"^\| `{field}` \|.*\n\|[-|]+\n((?:\|.*\n)+)", guide, re.MULTILINE)[1]
        assert set(re.findall(r"^\| `([\w-]+)`", rows, re.MULTILINE)) == set(CHOICES[field])
