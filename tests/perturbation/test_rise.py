"""The size of the noise by what it does to the loss, against the closed form of a quadratic loss."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_ggpo.perturbation import GGPO, GGPOConfig
from lora_ggpo.perturbation.rise import Rise

TARGET = 0.05


class Quadratic(nn.Module):
    """Mean squared error of a linear layer: its Hessian in the weight is 2 / m of I x <x x^T>, the same everywhere."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear, self.dropout = nn.Linear(12, 10), nn.Dropout(dropout)

    def forward(self, x, labels):
        return SimpleNamespace(loss=(self.dropout(self.linear(x)) - labels).square().mean())


def model_and_batch(dropout=0.0, rows=64):
    torch.manual_seed(0)  # and weights so large that the noise they have does some harm
    config = LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
    model = get_peft_model(Quadratic(dropout), config).double().train()
    model.base_model.model.linear.base_layer.weight.data *= 10
    x = torch.randn(rows, 12, dtype=torch.float64)
    return model, {"x": x, "labels": 3 * torch.randn(rows, 10, dtype=torch.float64)}


def expected_share(ggpo, batch, loss):
    """1/2 tr(H Sigma) / L = sum_i tau_i^2 <|x|^2> / m / L at the present size of the noise."""
    (layer,) = ggpo.layers
    return float(layer.tau.square().sum() * batch["x"].square().sum(1).mean() / layer.m / loss)


def run(model, batch, steps, config, ggpo=None, optimizer=None):
    """Steps on one batch; without an optimizer the weights stay."""
    ggpo = ggpo or GGPO(model, config)
    losses = []
    for _ in range(steps):
        output = model(**batch)
        output.loss.backward()
        if optimizer:
            optimizer.step()
        ggpo.step()
        model.zero_grad()
        losses.append(output.loss.item())
    return ggpo, losses


def clean_loss(model, batch):
    with torch.no_grad():
        return float(model(**batch).loss)


@pytest.mark.parametrize("noise", ["factored", "dense"])
def test_what_is_measured_is_the_trace_of_the_hessian(noise):
    """Of a quadratic loss the pair of draws leaves 1/2 eps^T H eps alone, whose mean over draws is known."""
    model, batch = model_and_batch()
    loss, shares, expected = clean_loss(model, batch), [], 0.0
    for seed in range(120):
        config = GGPOConfig(sigma=0.1, beta=0, rise=TARGET, noise=noise, seed=seed)
        ggpo, _ = run(model, batch, 5, config)
        shares.append(ggpo.metrics()["ggpo/rise"])
        expected = expected_share(ggpo, batch, loss)
        ggpo.detach()
    shares = torch.tensor(shares)
    assert shares.mean().item() == pytest.approx(expected, abs=4 * float(shares.std()) / 120**0.5)
    assert shares.min() > 0


@pytest.mark.parametrize("sigma", [0.01, 1.0])
def test_sigma_is_steered_to_the_rise_from_either_side(sigma):
    model, batch = model_and_batch()
    ggpo, _ = run(model, batch, 602, GGPOConfig(sigma=sigma, beta=0, rise=TARGET))
    model(**batch)  # takes up the last measurement
    assert expected_share(ggpo, batch, clean_loss(model, batch)) == pytest.approx(TARGET, rel=0.5)
    assert ggpo.metrics()["ggpo/sigma"] == pytest.approx(
        float(ggpo.layers[0].tau.square().sum() / weight_size(model)) ** 0.5
    )


def weight_size(model):
    module = model.base_model.model.linear
    weight = module.base_layer.weight.detach() + module.get_delta_weight("default")
    return weight.detach().square().sum() / weight.shape[1]


def test_a_ramp_is_on_what_is_steered():
    """Whatever the ramp is when it is measured, f is that of noise at its full size."""
    model, batch = model_and_batch()
    found = []
    for schedule in ("constant", "linear"):
        ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=0, rise=TARGET, schedule=schedule), total_steps=100)
        run(model, batch, 20, None, ggpo)
        found.append(ggpo.metrics()["ggpo/sigma"])
        ggpo.detach()
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_measuring_changes_nothing_but_sigma():
    """The pass to measure with, its gradient and what is drawn after it, dropout masks included."""
    config = GGPOConfig(sigma=0.3, beta=0, rise=TARGET)
    found = []
    for chosen in (config, GGPOConfig(sigma=0.3, beta=0)):
        model, batch = model_and_batch(dropout=0.3)
        torch.manual_seed(5)
        ggpo, losses = run(model, batch, 5, chosen)
        found.append((losses, torch.rand(3)))
        ggpo.detach()
    (losses, after), (plain, same) = found
    assert losses == plain
    assert torch.equal(after, same)


def test_dropout_masks_are_those_of_the_pass():
    """Else a rise would be measured between different networks: at next to no noise it must be next to none."""
    model, batch = model_and_batch(dropout=0.5)
    ggpo, _ = run(model, batch, 5, GGPOConfig(sigma=1e-6, beta=0, rise=TARGET))
    assert abs(ggpo.metrics()["ggpo/rise"]) < 1e-8


def test_resumes_exactly():
    config = GGPOConfig(sigma=0.3, rise=TARGET)
    model, batch = model_and_batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ggpo, _ = run(model, batch, 18, config, optimizer=optimizer)
    state, weights = ggpo.state_dict(), copy.deepcopy(model.state_dict())
    _, straight = run(model, batch, 60, config, ggpo, optimizer)
    ggpo.detach()
    model.load_state_dict(weights)
    resumed = GGPO(model, config)
    resumed.load_state_dict(state)
    _, again = run(model, batch, 60, config, resumed, optimizer)
    assert again == straight
    assert resumed.state_dict()["rise"].tolist() == ggpo.state_dict()["rise"].tolist()


def test_a_loss_that_is_not_finite_makes_the_noise_smaller():
    steering = Rise(TARGET, 0.03)
    steering.take(torch.tensor(torch.inf), torch.tensor(1.0), torch.tensor(1.0))
    assert steering.factor == 0.5
    assert torch.isnan(torch.tensor(steering.curvature))


def test_noise_that_does_no_harm_grows_within_bounds():
    for sigma, largest in ((0.02, 0.2), (0.5, 0.5)):
        steering = Rise(TARGET, sigma)
        for _ in range(20):
            steering.take(*(torch.tensor(1.0),) * 3)
        assert sigma * steering.factor == pytest.approx(largest)


def test_a_model_without_loss_is_told():
    model, batch = model_and_batch()
    inner = model.base_model.model
    inner.forward = lambda x, labels: inner.linear(x)
    ggpo = GGPO(model, GGPOConfig(sigma=0.3, beta=0, rise=TARGET))
    with pytest.raises(RuntimeError, match="returns none: give it the labels"):
        model(**batch)
    ggpo.detach()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rise": 0}, "rise must be a finite number > 0"),
        ({"rise": 0.1, "sigma": 0}, "sigma must be > 0 with rise"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        GGPOConfig(**settings)


def test_compiled():
    """Hooks stay outside of the graph, which is compiled once with gradients and once for measuring."""
    model, batch = model_and_batch()
    config = GGPOConfig(sigma=0.3, beta=0, rise=TARGET)
    plain, straight = run(copy.deepcopy(model), batch, 8, config)
    compiled = torch.compile(model, backend="eager")
    ggpo = GGPO(model, config)
    _, losses = run(compiled, batch, 8, config, ggpo)
    assert losses == pytest.approx(straight, rel=1e-12)
    assert ggpo.metrics()["ggpo/sigma"] == pytest.approx(plain.metrics()["ggpo/sigma"])
