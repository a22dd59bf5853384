"""What the noise does to the objective: E L(W' + eps) = L + 1/2 tr(H Sigma) to second order, whatever its law."""

import pytest
import torch
from torch.func import functional_call

from lora_ggpo.perturbation import GGPO, GGPOConfig

from .nets import adapted, batch, loss_of, net

SIGMA = 0.05
NAMES = ["inp", "up", "down", "head"]


def dense_copy(model):
    """The network with W' as its weights."""
    with torch.no_grad():
        return model.merge_and_unload().eval()


def distance_loss(dense, x):
    """Mostly the squared distance to the outputs of W': its curvature is positive, so few draws make a tight bound."""
    target = dense(x).detach()
    return lambda y: (y - target).square().mean() + 0.02 * loss_of(y)


def half_trace(dense, x, taus, loss_at):
    """1/2 sum_ij tau_i^2 d^2 L / d W'_ij^2, with the exact Hessian of each layer."""
    total = 0.0
    for name in NAMES:
        weight = dense.get_submodule(name).weight.detach()

        def loss(w, key=f"{name}.weight"):
            return loss_at(functional_call(dense, {key: w}, (x,)))

        hessian = torch.autograd.functional.hessian(loss, weight)
        diagonal = torch.einsum("ijij->ij", hessian)
        total += 0.5 * (taus[name].square()[:, None] * diagonal).sum().item()
    return total


@pytest.mark.parametrize(("kind", "seed"), [("factored", 1), ("dense", 2)])
def test_mean_loss_under_noise_has_the_curvature_term(kind, seed, pytestconfig):
    draws, bound = (2000, 0.03) if pytestconfig.getoption("thorough") else (500, 0.06)
    model, x = adapted(net()), 1.5 * batch(0, 30)
    stock = adapted(net())
    dense = dense_copy(stock)
    loss_at = distance_loss(dense, x)
    ggpo = GGPO(
        model, GGPOConfig(sigma=SIGMA, beta=0.5, rule="relative", noise=kind, seed=seed, redraw="optimizer-step")
    )
    loss_of(model(x)).backward()
    ggpo.step()
    model(x)  # with gradients, as noise is in no other pass
    expected = half_trace(dense, x, {layer.name.rpartition(".")[2]: layer.tau for layer in ggpo.layers}, loss_at)
    plain = loss_at(dense(x)).item()
    rises = []
    for draw in range(draws):
        # One draw with both signs of tau: what is odd in eps, the gradient's term above all, cancels exactly.
        ggpo._steps = 1 + draw
        pair = []
        for _ in range(2):
            pair.append(loss_at(model(x)).item())
            for layer in ggpo.layers:
                layer.tau = -layer.tau
        rises.append(sum(pair) / 2 - plain)
    rises = torch.tensor(rises, dtype=torch.float64)
    error = (rises.std() / draws**0.5).item()
    assert 3 * error < bound * expected, "too few draws for such a bound"
    assert rises.mean().item() == pytest.approx(expected, abs=3 * error + 0.003 * expected)
