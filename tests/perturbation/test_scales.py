import math

import pytest
import torch

from lora_ggpo.perturbation import scales

from . import reference

L, M, N, R = 3, 11, 7, 4
CLOSE = {"rtol": 1e-10, "atol": 1e-14}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def layers():
    """W0, B, A, dB, dA of L layers, and s of each of the R columns (two adapters side by side)."""
    tensors = [normal(L, *shape, seed=i) for i, shape in enumerate([(M, N), (M, R), (R, N), (M, R), (R, N)])]
    return [*tensors, torch.tensor([0.5, 0.5, 3.0, 3.0], dtype=torch.float64).expand(L, R)]


def test_row_norms_of_a_product(layers):
    _, p, q, *_ = layers
    torch.testing.assert_close(scales.product_row_norms_squared(p, q), (p @ q).square().sum(-1), **CLOSE)


def test_row_norms_of_the_adapted_weight(layers):
    w0, b, a, _, _, s = layers
    sb = b * s[:, None]
    found = scales.weight_row_norms_squared(w0.square().sum(-1), (sb * (w0 @ a.mT)).sum(-1), sb, a)
    dense = w0 + torch.einsum("lmr,lr,lrn->lmn", b, s, a)
    torch.testing.assert_close(found, dense.square().sum(-1), **CLOSE)


def test_row_norms_that_cancel_are_not_negative():
    b, a = normal(1, M, R), normal(1, R, N)
    w0 = -(b @ a)
    terms = (b * (w0 @ a.mT)).sum(-1)
    found = scales.weight_row_norms_squared(w0.square().sum(-1).float(), terms.float(), b.float(), a.float())
    assert (found >= 0).all()
    assert found.max() < 1e-4


@pytest.mark.parametrize("estimator", ["lora", "lstsq"])
def test_gradient_estimators(layers, estimator):
    _, b, a, db, da, s = layers
    found = (
        scales.lora_row_norms_squared(b, a, db, da, s)
        if estimator == "lora"
        else scales.lstsq_row_norms_squared(a, db, s)
    )
    for i in range(L):
        # With a scale per column: s (B dA + dB A) = (B s) dA + (dB s) A, and dB = G (s A)^T.
        scaled = (
            (b[i] * s[i], a[i], db[i] * s[i], da[i])
            if estimator == "lora"
            else (None, s[i, :, None] * a[i], db[i], None)
        )
        dense = reference.gradient_estimate(estimator, *scaled, 1.0)
        torch.testing.assert_close(found[i], reference.row_norms_squared(dense), **CLOSE)


def test_lora_estimate_is_a_known_function_of_the_exact_gradient(layers):
    _, b, a, _, _, _ = layers
    g, s = normal(L, M, N, seed=9), 1.7
    db, da = s * g @ a.mT, s * b.mT @ g
    dense = s**2 * (b @ b.mT @ g + g @ a.mT @ a)
    found = scales.lora_row_norms_squared(b, a, db, da, torch.full((L, R), s, dtype=torch.float64))
    torch.testing.assert_close(found, dense.square().sum(-1), **CLOSE)


def test_lstsq_never_exceeds_the_exact_norm_and_is_exact_on_the_rows_of_a(layers):
    a = layers[2]
    s = torch.full((L, R), 1.7, dtype=torch.float64)
    g, inside = normal(L, M, N, seed=9), normal(L, M, R, seed=10) @ a
    found = scales.lstsq_row_norms_squared(a, 1.7 * g @ a.mT, s)
    assert (found <= g.square().sum(-1)).all()
    found = scales.lstsq_row_norms_squared(a, 1.7 * inside @ a.mT, s)
    torch.testing.assert_close(found, inside.square().sum(-1), **CLOSE)


def test_lstsq_survives_rows_of_a_that_depend_on_each_other(layers):
    a, s = layers[2], layers[5]
    a = torch.cat([a[:, :2], a[:, :2]], 1)
    g = normal(L, M, N, seed=9)
    found = scales.lstsq_row_norms_squared(a, (g @ a.mT) * s[:, None], s)
    basis = torch.linalg.qr(a[:, :2].mT).Q
    torch.testing.assert_close(found, (g @ basis).square().sum(-1), rtol=1e-8, atol=1e-12)


def norms_of(weight, gradient, w0, product):
    """What a rule reads, from matrices (L, m, n)."""
    squares = [None if matrix is None else matrix.square().sum(-1) for matrix in (weight, gradient, w0, product)]
    return scales.Norms(*squares[:3], lambda: squares[3], weight.shape[-1])


@pytest.mark.parametrize("rule", ["paper", "relative", "sd-scripts"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["first step", "zero", "some"])
def test_tau_of_each_rule(rule, beta, kind):
    weight = normal(L, M, N)
    gradient = None if kind == "first step" else normal(L, M, N, seed=1) * torch.tensor([1e-3, 1, 10]).view(L, 1, 1)
    if kind == "zero":
        gradient[1] = 0
    w0, product = normal(L, M, N, seed=2), normal(L, M, N, seed=3)
    tau2, guided = scales.RULES[rule].tau_squared(0.2, beta, norms_of(weight, gradient, w0, product))
    for i in range(L):
        others, g = (w0[i], product[i]), None if gradient is None else gradient[i]
        expected = reference.tau(rule, 0.2, beta, weight[i], g, *others)
        torch.testing.assert_close(tau2[i].sqrt(), expected, **CLOSE)
        g = None if g is None else 0 * g
        without = reference.tau(rule, 0.2, beta, weight[i], g, *others).square()
        active = gradient is not None and bool(gradient[i].any())
        unguided = without * (1 - beta) if rule == "relative" and active else without
        torch.testing.assert_close(guided[i], expected.square() - unguided, rtol=1e-9, atol=1e-15)


def test_relative_keeps_the_energy_of_the_layer_and_follows_the_gradient():
    weight, gradient = normal(L, M, N).square().sum(-1), normal(L, M, N, seed=1).square().sum(-1)
    energies, taus = [], []
    for beta in (0.0, 0.5, 1.0):
        tau2, _ = scales.relative(0.03, beta, scales.Norms(weight, gradient, weight, weight.clone, N))
        energies.append(tau2.sum(-1))
        taus.append(tau2)
    torch.testing.assert_close(energies[1], energies[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(energies[2], energies[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(taus[2] / taus[2].sum(-1, keepdim=True), gradient / gradient.sum(-1, keepdim=True))
    rescaled, _ = scales.relative(0.03, 0.5, scales.Norms(weight, gradient * 1e-30, weight, weight.clone, N))
    torch.testing.assert_close(rescaled, taus[1])


def test_ramps():
    assert [scales.ramp("constant", step, None) for step in (0, 5, 99)] == [1, 1, 1]
    assert [scales.ramp("linear", step, 10) for step in (0, 5, 10, 12)] == [0, 0.5, 1, 1]
    cosine = [scales.ramp("cosine", step, 12) for step in (0, 4, 6, 12, 20)]
    assert cosine == pytest.approx([0, 0.25, 0.5, 1, 1])
    assert scales.ramp("cosine", 3, 12) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("total", [None, 0])
def test_a_ramp_needs_the_number_of_steps(schedule, total):
    with pytest.raises(ValueError, match=f'schedule="{schedule}" needs total_steps'):
        scales.ramp(schedule, 0, total)
