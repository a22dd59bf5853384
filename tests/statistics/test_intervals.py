import math

import numpy as np
import pytest
from scipy import stats

from lora_ggpo.statistics.intervals import (
    detectable_difference,
    holm,
    mean_interval,
    p_value,
    pareto_front,
    pooled_sd,
    seed_curves,
    verdict,
)


def test_interval_is_scipys():
    values = [0.81, 0.84, 0.79, 0.86]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    interval = mean_interval(values)
    assert interval.mean - interval.half == pytest.approx(low)
    assert interval.mean + interval.half == pytest.approx(high)


def test_verdicts():
    def said(differences):
        return verdict(mean_interval(differences), p_value(differences), "more", "less")

    assert said([0.1, 0.11, 0.09]) == "more"
    assert said([-0.1, -0.11, -0.09]) == "less"
    assert said([0.1, -0.11, 0.09]) == said([0.0, 0.0]) == "no difference found"
    assert said([0.1]) == "one seed cannot tell"
    assert said([0.1, 0.1]) == "cannot tell: every seed differs by the same amount"


def test_one_value_has_no_interval():
    assert math.isnan(mean_interval([1.0]).half)


def test_p_value_is_that_of_the_paired_t_test():
    first, second = np.array([0.81, 0.84, 0.79, 0.86]), np.array([0.83, 0.85, 0.82, 0.87])
    assert p_value(second - first) == pytest.approx(stats.ttest_rel(second, first).pvalue)


def test_p_value_where_the_test_says_nothing():
    assert math.isnan(p_value([0.1]))
    assert math.isnan(p_value([]))
    assert math.isnan(p_value([0.82 - 0.81, 0.85 - 0.84]))  # 0.01 both times, but for rounding
    assert p_value([0.0, 0.0]) == 1


def test_holm_against_a_worked_example():
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, then 1 x 0.04 raised to what came before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


def test_holm_does_not_count_what_was_not_tested():
    adjusted = holm([math.nan, 0.01, 0.02])
    assert math.isnan(adjusted[0])
    assert adjusted[1:] == pytest.approx([0.02, 0.02])


@pytest.mark.parametrize(("n", "level", "power"), [(2, 0.05, 0.8), (5, 0.05, 0.8), (5, 0.01, 0.8), (20, 0.05, 0.6)])
def test_detectable_difference_is_found_as_often_as_it_says(n, level, power):
    sd = 1.7
    shift = detectable_difference(sd, n, power, level)
    draws = np.random.default_rng(0).normal(shift, sd, size=(100_000, n))
    found = stats.ttest_1samp(draws, 0, axis=1).pvalue < level
    assert found.mean() == pytest.approx(power, abs=0.005)


def test_detectable_difference_with_a_stern_level_is_finite():
    assert 0 < detectable_difference(1.0, 2, level=0.05 / 20) < math.inf
    assert math.isnan(detectable_difference(1.0, 1))
    assert math.isnan(detectable_difference(math.nan, 3))


def test_pooled_sd_by_hand():
    # Squares about the means: 2 with one degree of freedom, 8 with two.
    assert pooled_sd([[1, 3], [0, 2, 4], [9]]) == pytest.approx(math.sqrt(10 / 3))
    assert math.isnan(pooled_sd([[1.0]]))


def test_pareto_front_by_hand():
    assert pareto_front([1, 2, 3, 1, 2.5], [0.5, 0.7, 0.6, 0.4, 0.7]) == [0, 1]
    assert pareto_front([], []) == []


def test_seed_curves_keep_the_common_steps():
    logs = [[{"step": 1, "loss": 2}, {"step": 2, "loss": 1}, {"step": 2, "x": 1}], [{"step": 2, "loss": 3}]]
    steps, values = seed_curves(logs, "loss")
    assert steps == [2]
    assert values.tolist() == [[1], [3]]
    assert seed_curves([], "loss")[0] == seed_curves([[{"step": 1}]], "loss")[0] == []
