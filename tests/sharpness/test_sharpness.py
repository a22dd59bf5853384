"""Sharpness against dense Hessians, and against losses whose rise is known."""

import math

import numpy as np
import pytest
import torch

from lora_ggpo.sharpness.sharpness import (
    expected_sharpness,
    flat,
    noise_sizes,
    spectral_density,
    top_eigenvalues,
    trace,
    worst_sharpness,
)
from tests.sharpness.small import bowl_point, dense_loss, flat_values, net_point

LAWS = ("isotropic", "rows", "guided")


@pytest.fixture(scope="module")
def net():
    point, x, labels = net_point()
    loss = dense_loss(point, x, labels)
    dense = torch.autograd.functional.hessian(loss, flat_values(point))
    return point, loss, dense


def test_loss_and_gradient_are_those_of_the_whole_sample(net):
    point, loss, _ = net
    at = flat_values(point).requires_grad_()
    assert point.loss(point.parameters) == pytest.approx(float(loss(at)), rel=1e-12)
    (expected,) = torch.autograd.grad(loss(at), at)
    found = torch.cat([g.reshape(-1) for g in point.gradient(point.parameters).values()])
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_hessian_products_are_those_of_the_dense_hessian(net):
    point, _, dense = net
    operator = point.hessian_product
    for seed in range(3):
        v = torch.randn(point.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(operator(v), dense @ v, rtol=1e-8, atol=1e-10)


def test_top_eigenvalues(net):
    point, _, dense = net
    exact = torch.linalg.eigvalsh(dense).flip(0)[:3].tolist()
    found = top_eigenvalues(point, 3, tol=1e-8, products=400)
    assert [one.value for one in found] == pytest.approx(exact, rel=1e-6)
    assert all(one.se < 1e-5 for one in found)


def test_a_residual_bounds_the_error_of_an_eigenvalue_that_has_not_converged(net):
    point, _, dense = net
    exact = torch.linalg.eigvalsh(dense)
    for one in top_eigenvalues(point, 2, tol=0.3, products=20):
        assert (exact - one.value).abs().min() <= one.se + 1e-9


def test_trace(net):
    point, _, dense = net
    found = trace(point, 300)
    assert found.se < 0.1 * abs(float(dense.trace()))
    assert abs(found.value - float(dense.trace())) < 4 * found.se


def test_trace_in_the_metric_of_a_noise_law(net):
    point, _, dense = net
    sizes = flat(noise_sizes(point, "rows"), point.parameters)
    exact = float((dense.diagonal() * sizes.square()).sum())
    found = trace(point, 300, sizes=sizes)
    assert abs(found.value - exact) < 4 * found.se
    assert found.se < 0.2 * abs(exact)


def test_spectral_density_has_mass_one_and_the_first_two_moments(net):
    point, _, dense = net
    exact = torch.linalg.eigvalsh(dense)
    grid, density, se = spectral_density(point, vectors=12, repeats=40)
    step = grid[1] - grid[0]
    spread = float(exact[-1] - exact[0])
    mean = (grid * density).sum() * step
    assert density.sum() * step == pytest.approx(1, abs=0.01)
    assert mean == pytest.approx(float(exact.mean()), abs=0.03 * spread)
    variance = (grid**2 * density).sum() * step - mean**2 - (spread / 12) ** 2  # less that of the peaks' own width
    assert variance == pytest.approx(float(exact.var(correction=0)), abs=0.03 * spread**2)
    assert np.isfinite(se).all()


def test_spectrum_of_a_bowl_is_its_curvatures():
    """Two eigenvalues: the Krylov space is exhausted after two steps, and the quadrature is exact."""
    curvature = torch.full((3, 4), 1.0, dtype=torch.float64)
    curvature[0, :3] = 5.0
    grid, density, se = spectral_density(bowl_point(torch.zeros_like(curvature), curvature), vectors=20)
    upper = density[grid > 3].sum() * (grid[1] - grid[0])
    assert upper == pytest.approx(3 / 12, abs=1e-3)
    assert se.max() < 1e-9


@pytest.mark.parametrize("law", LAWS)
def test_laws_share_out_the_same_energy(net, law):
    point, _, _ = net
    sizes = noise_sizes(point, law)
    whole = flat_values(point).square().sum()
    assert flat(sizes, point.parameters).square().sum() == pytest.approx(float(whole), rel=1e-10)


def test_rows_and_guided_laws_entry_by_entry(net):
    point, loss, _ = net
    at = flat_values(point).requires_grad_()
    (g,) = torch.autograd.grad(loss(at), at)
    rows, guided = (noise_sizes(point, law, beta=0.3) for law in ("rows", "guided"))
    parts = {"first.weight": (g[:20].view(5, 4), 4), "second.weight": (g[20:].view(3, 5), 5)}
    for name, (gradient, n) in parts.items():
        w = point.parameters[name]
        assert torch.allclose(rows[name][:, 0], w.norm(dim=1) / math.sqrt(n))
        w2, g2 = w.square().sum(1), gradient.square().sum(1)
        expected = (0.7 * w2 + 0.3 * w2.mean() * g2 / g2.mean()) / n
        assert torch.allclose(guided[name][:, 0].square(), expected)


@pytest.mark.parametrize("law", LAWS)
def test_expected_sharpness_is_half_the_trace_for_small_noise(net, law):
    point, _, dense = net
    sizes = noise_sizes(point, law)
    exact = float((dense.diagonal() * flat(sizes, point.parameters).square()).sum()) / 2
    sigma = 0.02
    found = expected_sharpness(point, sizes, sigma, draws=400)
    assert found.se < 0.2 * abs(exact) * sigma**2
    assert abs(found.value - exact * sigma**2) < 4 * found.se


def test_expected_sharpness_of_a_slope_is_zero():
    point = bowl_point(torch.randn(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64))
    found = expected_sharpness(point, noise_sizes(point, "rows"), 0.5, draws=4)
    assert abs(found.value) < 1e-12


def test_worst_rise_of_a_slope_is_its_length_times_the_radius():
    torch.manual_seed(0)
    theta, slope = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    point = bowl_point(slope, torch.zeros_like(slope), theta)
    found = worst_sharpness(point, rho=0.1)
    assert found.value == pytest.approx(0.1 * math.sqrt(12) * float((theta * slope).norm()), rel=1e-6)
    assert found.se < 1e-2 * found.value


def test_worst_rise_of_a_bowl_is_along_its_steepest_axis_even_from_its_bottom():
    curvature = torch.ones(3, 4, dtype=torch.float64)
    curvature[1, 2] = 20.0
    point = bowl_point(torch.zeros_like(curvature), curvature)
    found = worst_sharpness(point, rho=0.1, steps=20).value
    exact = 20.0 * 0.1**2 * 12 / 2
    assert 0.97 * exact < found <= exact * (1 + 1e-9)


def test_one_step_from_the_centre_is_adaptive_sam(net):
    point, loss, _ = net
    at = flat_values(point).requires_grad_()
    (g,) = torch.autograd.grad(loss(at), at)
    scaled = at.detach().abs() * g
    radius = 0.05 * math.sqrt(point.size)
    step = radius * at.detach().abs() * scaled / scaled.norm()
    found = worst_sharpness(point, rho=0.05, steps=1, restarts=1).value
    assert found == pytest.approx(float(loss(at.detach() + step) - loss(at.detach())), rel=1e-9)


def test_the_model_is_left_as_it_was(net):
    point, _, _ = net
    before = {name: p.clone() for name, p in point.model.named_parameters()}
    sizes = noise_sizes(point, "rows")
    expected_sharpness(point, sizes, 0.1, draws=2)
    worst_sharpness(point, rho=0.01, steps=2)
    top_eigenvalues(point, 1)
    assert all(torch.equal(p, before[name]) for name, p in point.model.named_parameters())
