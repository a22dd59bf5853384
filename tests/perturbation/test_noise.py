"""Bounds are 5 standard errors from the central limit theorem; seeds are fixed, so a pass stays a pass."""

import math
from types import SimpleNamespace

import pytest
import torch

from lora_ggpo.perturbation import GGPO, GGPOConfig, noise, perturbed_linear

from .nets import adapted, batch, loss_of, net
from .reference import unit_noise

KINDS = ["factored", "dense"]
DRAWS, ROWS, COLUMNS = 4000, 4, 64


@pytest.fixture(scope="module", params=[("factored", 8), ("factored", 1), ("dense", 8)], ids=str)
def draws(request):
    """z of two layers over many draws, (DRAWS, 2 * ROWS, COLUMNS)."""
    kind, rank = request.param
    config = GGPOConfig(noise=kind, noise_rank=rank)
    return torch.stack([torch.cat(unit_noise(config, number, [(ROWS, COLUMNS)] * 2)) for number in range(DRAWS)])


def test_rows_have_the_moments_of_independent_normal_entries(draws):
    count = DRAWS * COLUMNS
    assert draws.mean((0, 2)).abs().max() < 5 * count**-0.5
    assert (draws.square().mean((0, 2)) - 1).abs().max() <= 5 * (2 / count) ** 0.5
    assert (draws.pow(4).mean((0, 2)) - 3).abs().max() <= 5 * (96 / count) ** 0.5  # Var z^4 = 105 - 9


def test_the_squared_norm_of_a_row_is_chi_squared(draws):
    """Each row is N(0, I) as a whole: its squared norm has variance 2 n, as that of independent entries has."""
    norms = draws.square().sum(-1)
    assert (norms.mean(0) / COLUMNS - 1).abs().max() < 5 * (2 / COLUMNS / DRAWS) ** 0.5
    assert (norms.var(0) / (2 * COLUMNS) - 1).abs().max() < 6 * ((2 + 12 / COLUMNS) / DRAWS) ** 0.5


def test_single_entries_have_mean_0_and_variance_1(draws):
    assert draws.mean(0).abs().max() < 5.5 * DRAWS**-0.5
    assert (draws.square().mean(0) - 1).abs().max() <= 5.5 * (2 / DRAWS) ** 0.5


def test_all_entries_are_uncorrelated_within_a_row_between_rows_and_between_layers(draws):
    entries = draws.flatten(1)
    covariance = entries.T @ entries / DRAWS
    # Products of two entries have variance 1, or up to 3 where factored rows share V; 131,000 pairs.
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 5.5 * (3 / DRAWS) ** 0.5
    rows = torch.einsum("dic,dkc->ik", draws, draws) / (DRAWS * COLUMNS)
    assert (rows - torch.diag(rows.diagonal())).abs().max() < 5 * DRAWS**-0.5


def test_draws_follow_each_other_independently(draws):
    assert (draws[1:] * draws[:-1]).mean((0, 2)).abs().max() < 5 * (DRAWS * COLUMNS) ** -0.5


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_rows_depend_on_one_another_the_less_the_larger_k(rank):
    """E <z_1, z_2>^2 of two rows: with independent rows it is n, with factors n + n (n + 1) / k - n / k, from
    <z_1, z_2> = sum_ab u_a w_b <v_a, v_b> / k with random signs u, w."""
    config, count = GGPOConfig(noise_rank=rank), 4000
    products = []
    for number in range(count):
        (z,) = unit_noise(config, number, [(2, 8)])
        products.append((z[0] @ z[1]).item() ** 2)
    products = torch.tensor(products, dtype=torch.float64)
    expected = (rank * (8 * 10) + rank * (rank - 1) * 8) / rank**2  # E ||v||^4 = n (n + 2), E <v, w>^2 = n
    assert abs(products.mean() - expected) < 5 * products.std() / math.sqrt(count)


def sized(*taus):
    return [SimpleNamespace(index=i, m=5, n=7, tau=tau, w0_norms=torch.ones(5)) for i, tau in enumerate(taus)]


def test_factors_have_tau_in_them_and_the_dtype_asked_for():
    tau = torch.linspace(0.1, 2, 5)
    first, none, last = noise.draw_factors(sized(tau, None, 3 * tau), 1, 2, 4, torch.bfloat16)
    assert none is None
    assert (first.v.shape, first.u.shape) == ((4, 7), (5, 4))
    assert {part.dtype for part in (*first, *last)} == {torch.bfloat16}
    exact, _, other = noise.draw_factors(sized(tau, None, 3 * tau), 1, 2, 4, None)
    assert torch.equal(exact.v.bfloat16(), first.v)
    torch.testing.assert_close(exact.u.abs(), (tau / 2)[:, None].expand(5, 4))
    torch.testing.assert_close(other.u.abs(), (3 * tau / 2)[:, None].expand(5, 4))
    assert set(exact.u.sign().unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_a_function_of_its_arguments_alone(kind):
    def draw(seed=5, number=1):
        return unit_noise(GGPOConfig(noise=kind, seed=seed), number, [(9, 33), (9, 33)])

    first = draw()
    torch.randn(10)
    assert all(torch.equal(one, other) for one, other in zip(draw(), first, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(draw(seed=6)[0], first[0])
    assert not torch.equal(draw(number=2)[0], first[0])


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (7, 3), (4096, 256), (4097, 256), (300, 5000), (3, 1 << 20), (5, 2_000_000)]
)
def test_blocks_cover_the_rows_exactly_and_stay_small(rows, columns):
    blocks = list(noise.row_blocks(rows, columns))
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(rows))
    assert all(stop - start == 1 or (stop - start) * columns <= 1 << 20 for start, stop in blocks)


def test_seeds_of_draws_and_layers_do_not_collide():
    seeds = {noise.mix(seed, draw, layer) for seed in range(3) for draw in range(200) for layer in range(100)}
    assert len(seeds) == 3 * 200 * 100
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert noise.mix(0, 1) != noise.mix(1, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_global_generator_is_never_touched(kind):
    noise._generator.cache_clear()
    noise._sign_bytes.cache_clear()
    model = adapted(net())
    before = torch.get_rng_state()
    x = batch(0).requires_grad_()
    perturbed_linear(x, torch.ones(3, 6, dtype=torch.float64), None, torch.ones(3), 1).sum().backward()
    ggpo = GGPO(model, GGPOConfig(noise=kind))
    for _ in range(2):
        loss_of(model(x)).backward()
        ggpo.step()
    ggpo.detach()
    assert torch.equal(torch.get_rng_state(), before)
