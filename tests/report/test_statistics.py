import math

import pytest
from scipy import stats

from lora_ggpo.report.statistics import mean_interval, paired_difference, verdict


def test_interval_is_scipys():
    values = [0.81, 0.84, 0.79, 0.86]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    interval = mean_interval(values)
    assert interval.mean - interval.half == pytest.approx(low)
    assert interval.mean + interval.half == pytest.approx(high)


def test_paired_difference_agrees_with_the_paired_t_test():
    first, second = [0.81, 0.84, 0.79, 0.86], [0.83, 0.85, 0.82, 0.87]
    difference = paired_difference(first, second)
    assert difference.mean == pytest.approx(0.0175)
    assert difference.excludes_zero == (stats.ttest_rel(first, second).pvalue < 0.05)


def test_verdicts():
    clear, unclear = mean_interval([0.1, 0.11, 0.09]), mean_interval([0.1, -0.11, 0.09])
    assert verdict(clear, "B", higher_is_better=True) == "B is better"
    assert verdict(clear, "B", higher_is_better=False) == "B is worse"
    assert verdict(unclear, "B", higher_is_better=True) == "no difference found"
    assert verdict(mean_interval([0.1]), "B", higher_is_better=True) == "one seed cannot tell"
    assert verdict(mean_interval([0.0, 0.0]), "B", higher_is_better=True) == "no difference found"


def test_one_value_has_no_interval():
    assert math.isnan(mean_interval([1.0]).half)
