"""Counts, nesting and uniformity of the seeded choices."""

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from lora_ggpo.data.sampling import carve, flip_labels, stratified_order

LABELS = np.random.default_rng(7).choice(4, size=1000, p=[0.6, 0.3, 0.09, 0.01]).tolist()


def test_order_is_a_permutation_that_depends_on_the_seed_alone():
    order = stratified_order(LABELS, 3)
    assert sorted(order) == list(range(1000))
    assert (order == stratified_order(LABELS, 3)).all()
    assert (order != stratified_order(LABELS, 4)).any()


@pytest.mark.parametrize("size", [4, 10, 50, 333, 999, 1000])
def test_every_prefix_is_stratified(size):
    total = Counter(LABELS)
    found = Counter(LABELS[row] for row in stratified_order(LABELS, 0)[:size])
    assert set(found) == set(total)
    for label, count in found.items():
        assert abs(count - size * total[label] / 1000) <= 2


def test_carved_parts_are_disjoint_complete_and_stratified():
    parts = carve(LABELS, range(1000), {"validation": 0.1, "test": 0.2}, seed=1)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1000))
    assert (len(parts["validation"]), len(parts["test"])) == (100, 200)
    for part in parts.values():
        share = Counter(LABELS[row] for row in part)[0] / len(part)
        assert share == pytest.approx(LABELS.count(0) / 1000, abs=0.02)


def test_equal_texts_stay_together():
    texts = [row % 100 for row in range(1000)]
    parts = carve(LABELS, texts, {"validation": 0.1, "test": 0.1}, seed=1)
    held = [{texts[row] for row in part} for part in parts.values()]
    assert sum(len(texts) for texts in held) == 100


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.001, 1), (0.2, 200), (0.3333, 333), (0.999, 999)])
def test_exactly_the_asked_number_of_labels_is_changed(fraction, count):
    labels, noisy = flip_labels(LABELS, 4, fraction, seed=5)
    assert sum(noisy) == count
    assert [new != old for new, old in zip(labels, LABELS, strict=True)] == noisy


def test_less_noise_is_contained_in_more():
    few, few_noisy = flip_labels(LABELS, 4, 0.2, seed=5)
    more, more_noisy = flip_labels(LABELS, 4, 0.4, seed=5)
    chosen = np.flatnonzero(few_noisy)
    assert set(chosen) < set(np.flatnonzero(more_noisy))
    assert [few[row] for row in chosen] == [more[row] for row in chosen]
    assert flip_labels(LABELS, 4, 0.2, seed=6)[1] != few_noisy


def test_the_wrong_class_is_uniform_over_the_others():
    labels, noisy = flip_labels([2] * 30_000, 4, 0.5, seed=0)
    wrong = Counter(label for label, changed in zip(labels, noisy, strict=True) if changed)
    assert set(wrong) == {0, 1, 3}
    assert stats.chisquare(list(wrong.values())).pvalue > 0.001
    position = np.flatnonzero(noisy) / 30_000
    assert stats.kstest(position, "uniform").pvalue > 0.001
