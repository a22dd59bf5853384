"""Bounds are 5 standard errors from the central limit theorem; seeds are fixed, so a pass stays a pass."""

import pytest
import torch

from lora_ggpo.perturbation import GGPO, GGPOConfig, noise, perturbed_linear

from .nets import adapted, batch, loss_of, net
from .reference import CPU, unit_noise

KINDS = ["table", "gaussian", "rademacher"]
FOURTH_MOMENT = {"table": 3.0, "gaussian": 3.0, "rademacher": 1.0}
DRAWS, ROWS, COLUMNS = 4000, 4, 64


@pytest.fixture(scope="module", params=KINDS)
def draws(request):
    """Two layers' noise over many draws: (kind, z of shape (DRAWS, 2 * ROWS, COLUMNS))."""
    layers = [
        torch.stack([unit_noise(request.param, noise.mix(0, number, layer), ROWS, COLUMNS) for number in range(DRAWS)])
        for layer in (0, 1)
    ]
    return request.param, torch.cat(layers, 1)


def test_rows_have_mean_0_variance_1_and_the_fourth_moment_of_their_law(draws):
    kind, z = draws
    count, fourth = DRAWS * COLUMNS, FOURTH_MOMENT[kind]
    assert z.mean((0, 2)).abs().max() < 5 * count**-0.5
    # Var z^2 = fourth - 1; Var z^4 = 105 - 9 for a Gaussian; a sign's even powers are exactly 1.
    assert (z.square().mean((0, 2)) - 1).abs().max() <= 5 * ((fourth - 1) / count) ** 0.5
    assert (z.pow(4).mean((0, 2)) - fourth).abs().max() <= 5 * ((96 if fourth == 3 else 0) / count) ** 0.5


def test_single_entries_have_mean_0_and_variance_1(draws):
    kind, z = draws
    assert z.mean(0).abs().max() < 5.5 * DRAWS**-0.5
    assert (z.square().mean(0) - 1).abs().max() <= 5.5 * ((FOURTH_MOMENT[kind] - 1) / DRAWS) ** 0.5


def test_rows_of_a_layer_and_of_two_layers_are_uncorrelated(draws):
    _, z = draws
    correlation = torch.einsum("dic,dkc->ik", z, z) / (DRAWS * COLUMNS)
    off_diagonal = correlation - torch.diag(correlation.diagonal())
    assert off_diagonal.abs().max() < 5 * (DRAWS * COLUMNS) ** -0.5


def test_entries_of_a_row_are_uncorrelated_and_draws_follow_each_other_independently(draws):
    _, z = draws
    within = torch.einsum("dic,die->ce", z, z) / (DRAWS * 2 * ROWS)
    # The rows of one draw from the table share their window, so only draws count as independent here.
    assert (within - torch.diag(within.diagonal())).abs().max() < 6 * DRAWS**-0.5
    assert (z[1:] * z[:-1]).mean((0, 2)).abs().max() < 5 * (DRAWS * COLUMNS) ** -0.5


def test_overlapping_rows_of_the_table_are_uncorrelated_by_their_signs():
    rows, columns = 3, 192
    z = torch.stack([unit_noise("table", noise.mix(1, number), rows, columns) for number in range(DRAWS)])
    assert torch.equal(z[:, 0, 64:].abs(), z[:, 1, :-64].abs())  # they do overlap
    entries = z.flatten(1)
    covariance = entries.T @ entries / DRAWS
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 8.5 * DRAWS**-0.5  # z^4 of 165,000 pairs
    assert (covariance.diagonal() - 1).abs().max() < 6 * (2 / DRAWS) ** 0.5


def test_row_signs_are_fair_and_independent():
    signs = torch.stack([noise.NOISES["table"].signs(seed, 16, CPU) for seed in range(DRAWS)])
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    moments = signs.T @ signs / DRAWS
    assert torch.equal(moments.diagonal(), torch.ones(16))
    assert (moments - torch.eye(16)).abs().max() < 5 * DRAWS**-0.5
    assert signs.mean(0).abs().max() < 5 * DRAWS**-0.5
    assert noise.NOISES["gaussian"].signs is noise.NOISES["rademacher"].signs is None


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_a_function_of_its_arguments_alone(kind):
    first = unit_noise(kind, 5, 9, 33)
    torch.randn(10)
    assert torch.equal(unit_noise(kind, 5, 9, 33), first)
    assert not torch.equal(unit_noise(kind, 6, 9, 33), first)
    block = noise.NOISES[kind].rows(5, 0, 9, 33, CPU)
    assert block.shape == (9, 33)
    assert block.dtype == torch.float32
    assert not torch.equal(noise.NOISES[kind].rows(5, 9, 9, 33, CPU), block)


def test_rademacher_is_signs_only_and_uses_every_bit():
    z = noise.NOISES["rademacher"].rows(3, 0, 1000, 37, CPU)
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert z.view(-1)[: 1000 * 37 // 8 * 8].view(-1, 8).mean(0).abs().max() < 5 * (1000 * 37 / 8) ** -0.5


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (7, 3), (4096, 256), (4097, 256), (300, 5000), (3, 1 << 20), (5, 2_000_000)]
)
def test_blocks_cover_the_rows_exactly_and_stay_small(rows, columns):
    blocks = list(noise.row_blocks(rows, columns, CPU))
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(rows))
    assert all(stop - start == 1 or (stop - start) * columns <= 1 << 20 for start, stop in blocks)


def test_table_is_standardised_and_read_from_end_to_end():
    table = noise.noise_table(CPU)
    assert table.numel() == 1 << 21
    assert table.dtype == torch.float32
    assert abs(table.double().mean()) < 1e-8
    assert abs(table.double().square().mean() - 1) < 1e-7
    starts = {noise.NOISES["table"].rows(seed, 0, 1, 1 << 20, CPU).storage_offset() for seed in range(300)}
    assert min(starts) < (1 << 20) * 0.05
    assert max(starts) > (1 << 20) * 0.95
    assert noise.NOISES["table"].rows(1, 0, 1, 1 << 21, CPU).shape == (1, 1 << 21)
    with pytest.raises(ValueError, match="longer than the noise table"):
        noise.NOISES["table"].rows(1, 0, 1, (1 << 21) + 1, CPU)


def test_seeds_of_draws_and_layers_do_not_collide():
    seeds = {noise.mix(seed, draw, layer) for seed in range(3) for draw in range(200) for layer in range(100)}
    assert len(seeds) == 3 * 200 * 100
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert noise.mix(0, 1) != noise.mix(1, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_global_generator_is_never_touched(kind):
    noise.noise_table.cache_clear()
    noise._generator.cache_clear()
    noise._sign_bytes.cache_clear()
    model = adapted(net())
    before = torch.get_rng_state()
    x = batch(0).requires_grad_()
    perturbed_linear(x, torch.ones(3, 6, dtype=torch.float64), None, torch.ones(3), kind, 1).sum().backward()
    ggpo = GGPO(model, GGPOConfig(noise=kind))
    for _ in range(2):
        loss_of(model(x)).backward()
        ggpo.step()
    ggpo.detach()
    assert torch.equal(torch.get_rng_state(), before)
