"""A new rule, estimator, schedule or noise is one entry of a table, and the documentation names every entry."""

import math
import re
from pathlib import Path

import pytest
import torch

from lora_ggpo.perturbation import GGPO, GGPOConfig
from lora_ggpo.perturbation.config import CHOICES
from lora_ggpo.perturbation.noise import NOISES, Noise, mix
from lora_ggpo.perturbation.scales import ESTIMATORS, RAMPS, RULES, Rule

from .nets import adapted, batch, loss_of, net


def uniform_rows(seed, start, rows, columns, device):
    generator = torch.Generator(device).manual_seed(mix(seed, start))
    return (2 * torch.rand(rows, columns, generator=generator, device=device) - 1) * math.sqrt(3)


NEW = {
    "rule": (RULES, "constant", Rule(lambda sigma, beta, w, g, n: (sigma**2 + beta * g, beta * g))),
    "gradient": (ESTIMATORS, "columns of B", lambda of: of.db().square().sum(-1)),
    "schedule": (RAMPS, "half", lambda progress: 0.5),
    "noise": (NOISES, "uniform", Noise(uniform_rows)),
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
    eps = (layer(x) - layer.original(x)).T
    assert 0 < (eps.abs() / layer.tau[:, None]).max() <= math.sqrt(3)


def test_the_guide_names_every_entry():
    guide = (Path(__file__).parents[2] / "docs/method.md").read_text(encoding="utf-8")
    for field in ("rule", "gradient", "noise"):
        rows = re.search(rf"^\| `{field}` \|.*\n\|[-|]+\n((?:\|.*\n)+)", guide, re.MULTILINE)[1]
        assert set(re.findall(r"^\| `([\w-]+)`", rows, re.MULTILINE)) == set(CHOICES[field])
