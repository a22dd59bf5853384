"""The score on curves whose double descent is known, and the test's error rates by simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lora_ggpo.statistics.descent import (
    FITTED_LOSS,
    average_windows,
    double_descent,
    interpolation_threshold,
    spread,
)

X = np.linspace(0, 1, 9)
SINGLE = {
    "falling": -X,
    "rising": X,
    "u": (X - 0.4) ** 2,
    "hill": -((X - 0.4) ** 2),
    "constant": np.zeros(9),
    "level between two falls": np.array([2, 1, 1, 1, 1, 1, 1, 1, 0.0]),
    "fall, rise, level": np.array([1, 0, 0, 0, 1, 1, 1, 1, 1.0]),
}


@pytest.mark.parametrize("curve", SINGLE.values(), ids=SINGLE)
def test_curves_without_a_double_descent_score_nothing(curve):
    found = double_descent(np.stack([curve, curve + 1]))
    assert (found.score, found.positions) == (0, None)


@pytest.mark.parametrize(
    ("curve", "score", "positions"),
    [
        ([3, 1, 2, 0], 1, (0, 1, 2, 3)),
        ([1.5, 1, 2, 0], 0.5, (0, 1, 2, 3)),  # as little as it fell before
        ([3, 1, 2, 1.75], 0.25, (0, 1, 2, 3)),  # as little as it falls after
        ([9, 5, 2, 3, 6, 4, 1, 2], 4, (0, 2, 4, 6)),  # the rise from 2 to 6 is in two steps
        ([4, 3, 3.5, 0, 2, 0], 2, (0, 3, 4, 5)),  # the larger of two rises
        ([9, 1, 0, 2, 0], 2, (0, 2, 3, 4)),
    ],
)
def test_double_descents_score_their_rise(curve, score, positions):
    found = double_descent(np.array([curve], dtype=float))
    assert (found.score, found.positions) == (score, positions)
    assert (found.relative, found.checked, found.p) == (None, None, None)


@given(st.lists(st.integers(-5, 5), min_size=4, max_size=9))
def test_the_score_is_that_of_a_search_over_all_positions(curve):
    scores = [
        min(curve[h] - curve[i], curve[j] - curve[i], curve[j] - curve[k])
        for h, i, j, k in itertools.combinations(range(len(curve)), 4)
    ]
    found = double_descent(np.array([curve], dtype=float))
    assert found.score == max(0, *scores)
    if found.positions:
        h, i, j, k = found.positions
        assert h < i < j < k
        assert min(curve[h] - curve[i], curve[j] - curve[i], curve[j] - curve[k]) == found.score


def test_values_on_seeds_that_did_not_choose():
    # The first seed alone puts the rise at points 1 to 2, the first two at 2 to 3.
    values = np.array([[5, 2.5, 3.5, 2.5, 0], [5, 2.5, 1, 4, 0], [5, 2, 1.75, 4.25, 0.0]])
    found = double_descent(values)
    assert found.checked.mean == pytest.approx(np.mean([-1.5, 2.5]))
    assert found.checked.n == 2
    assert found.p == pytest.approx(stats.ttest_1samp([-1.5, 2.5], 0, alternative="greater").pvalue)


def test_spread_is_that_of_the_points_and_not_of_whole_curves():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.3, size=(200, 9))
    shifts = rng.normal(0, 5, size=(200, 1))
    assert spread(SINGLE["u"] + shifts + noise) == pytest.approx(0.3, rel=0.05)
    assert spread(SINGLE["u"] + shifts) == 0
    assert spread(SINGLE["u"][None]) == 0
    curves = np.array([3, 1, 2, 0]) + noise[:, :4]
    assert double_descent(curves).relative == pytest.approx(1 / 0.3, rel=0.15)


@pytest.mark.parametrize("points", [0, 1, 3])
def test_too_few_points_score_nothing(points):
    found = double_descent(np.ones((3, points)))
    assert (found.score, found.positions, found.checked, found.p) == (0, None, None, None)


def test_seeds_that_do_not_differ_prove_nothing():
    found = double_descent(np.array([[3, 1, 2, 0.0]] * 4))
    assert (found.score, found.relative, found.p) == (1, None, None)
    assert found.checked.mean == 1


@pytest.mark.parametrize("values", [[[1, math.nan, 2, 0]], [[1, math.inf, 2, 0]], [1, 2, 3, 4], np.empty((0, 5))])
def test_what_is_no_table_of_numbers_is_refused(values):
    with pytest.raises(ValueError, match="table of finite numbers"):
        double_descent(np.array(values, dtype=float))


# Least favourable are those with a flat stretch in which noise can be taken for a rise.
TRUTHS = {
    "falling": -3 * X,
    "u": 40 * (X - 0.5) ** 2,
    "constant": np.zeros(9),
    "level between two falls": np.array([100, 0, 0, 0, 0, 0, 0, 0, -100.0]),
    "fall, rise, level": np.array([100, 0, 0, 0, 100, 100, 100, 100, 100.0]),
}
RUNS = 1000


def _share_found(truth, seeds, noise, rng):
    p_values = [double_descent(truth + noise(rng, (seeds, len(truth)))).p for _ in range(RUNS)]
    return np.mean([p < 0.05 for p in p_values])


def _independent(rng, shape):
    return rng.normal(size=shape)


def _wandering(rng, shape):
    return rng.normal(size=shape).cumsum(axis=1) / 3


def _loudest_in_the_middle(rng, shape):
    return rng.normal(size=shape) * (1 + 4 * np.exp(-((X - 0.5) ** 2) / 0.03))


@pytest.mark.parametrize("noise", [_independent, _wandering, _loudest_in_the_middle])
@pytest.mark.parametrize("truth", TRUTHS.values(), ids=TRUTHS)
def test_noise_is_not_taken_for_a_double_descent_more_often_than_said(truth, noise):
    found = _share_found(truth, 4, noise, np.random.default_rng(0))
    # 15 cases: each may exceed 5 % by chance so far that all together do once in a hundred times.
    limit = stats.binom.isf(0.01 / 15, RUNS, 0.05) / RUNS
    assert found <= limit


def test_a_double_descent_well_above_the_noise_is_found():
    truth = 6 * np.interp(X, [0, 0.25, 0.5, 1], [2, 0, 1, 0])
    assert _share_found(truth, 5, _independent, np.random.default_rng(0)) > 0.9


def test_a_double_descent_within_the_noise_is_found_seldom():
    truth = 0.5 * np.interp(X, [0, 0.25, 0.5, 1], [2, 0, 1, 0])
    assert _share_found(truth, 5, _independent, np.random.default_rng(0)) < 0.1


def test_a_loss_that_falls_rises_and_settles_in_windows():
    steps = np.arange(1, 401)
    truth = np.interp(steps, [1, 100, 200, 300, 400], [2.0, 0.5, 1.0, 0.3, 0.3])
    places, losses = average_windows(steps, truth + np.random.default_rng(0).normal(0, 0.1, size=(5, 400)))
    assert losses.shape == (5, 20)
    found = double_descent(losses)
    _, start, end, _ = found.positions
    assert (places[start], places[end]) == pytest.approx((100, 200), abs=20)
    assert found.score == pytest.approx(0.4, abs=0.05)  # from 0.55 in steps 101 to 120 to 0.95
    assert found.p < 0.01


def test_windows_are_means_of_neighbours():
    steps, values = average_windows(range(1, 41), np.arange(40.0)[None])
    assert steps == tuple(np.arange(1.5, 41, 2))
    assert values.tolist() == [np.arange(0.5, 40, 2).tolist()]
    assert average_windows([3, 7], np.array([[1.0, 2.0]]))[0] == (3, 7)
    assert average_windows([], np.empty((2, 0)))[1].shape == (2, 0)


@pytest.mark.parametrize(
    ("errors", "threshold"),
    [
        ([0.3, 0.1, 0.01, 0.0], 4),
        ([0.3, 0.1, 0.02, 0.02], None),
        ([0.0, 0.01, 0.02, 0.2], 2),  # such as training rows: the more, the harder to fit
        ([0.0, 0.0, 0.0, 0.0], 1),
        ([0.3, 0.005, 0.02, 0.0], 2),
    ],
)
def test_interpolation_threshold(errors, threshold):
    assert interpolation_threshold([1, 2, 4, 8], np.array([errors])) == threshold


def test_the_threshold_is_that_of_the_mean_over_seeds():
    errors = np.array([[0.1, 0.0, 0.0], [0.1, 0.03, 0.0]])
    assert interpolation_threshold([1, 2, 4], errors) == 4
    assert interpolation_threshold([1, 2, 4], errors, FITTED_LOSS) == 2
