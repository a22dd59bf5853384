import json

import numpy as np
import pytest
from scipy import stats

from lora_ggpo.comparison.results import read_results
from lora_ggpo.report.descents import STEP, study_results
from tests.report.grids import HUMP, curve, run, write_results, write_study


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return study_results(read_results(write_study(tmp_path_factory.mktemp("study"))))


def _curve(found, **attributes):
    (one,) = [c for c in found.curves if all(getattr(c, name) == value for name, value in attributes.items())]
    return one


def _small(folder, settings, runs, curves=(), metric="accuracy"):
    """Study results of a hand-made grid of LoRA."""
    write_results(folder, runs, curves=curves, metric=metric)
    facts = json.loads((folder / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps(facts | {"settings": settings}))
    return study_results(read_results(folder))


def test_curves_over_an_axis(found):
    assert found.numeric == ("adapter.r", "data.label_noise")
    error = _curve(found, axis="adapter.r", method="LoRA", others="label_noise=0.3", data="test", quantity="error")
    assert error.places == (1, 4, 16, 64, 256)
    assert error.fixed == {"data.label_noise": 0.3}
    assert error.seeds == (0, 1, 2, 3, 4)
    assert error.values.shape == (5, 5)
    assert error.values.mean(axis=0) == pytest.approx(0.3 + np.array([0.15, *HUMP]), abs=0.01)
    assert error.descent.score == pytest.approx(HUMP[1] - HUMP[0], abs=0.01)
    assert error.rises == (4, 16)
    assert error.found
    loss = _curve(found, axis="adapter.r", method="LoRA", others="label_noise=0.3", data="test", quantity="loss")
    assert loss.values == pytest.approx(2 * error.values)


def test_curves_over_steps(found):
    attributes = {"axis": STEP, "method": "LoRA", "others": "r=4, label_noise=0.3"}
    training = _curve(found, data="train", quantity="loss", **attributes)
    assert training.values.shape == (5, 20)
    assert training.rises == pytest.approx((10, 20), abs=2)
    assert training.found
    validation = _curve(found, data="validation", quantity="error", **attributes)
    assert validation.places == tuple(range(5, 41, 5))
    assert validation.rises == (10, 20)
    assert not _curve(found, axis=STEP, method="LoRA", others="r=4, label_noise=0", data="train").found
    assert found.steps_per_epoch == 8


def test_thresholds_of_the_labels_as_given(found):
    def of(axis, others, data):
        return _curve(found, axis=axis, method="LoRA", others=others, data=data, quantity="error").threshold

    assert of("adapter.r", "label_noise=0", "test") == of("adapter.r", "label_noise=0", "train") == 64
    assert of("adapter.r", "label_noise=0.3", "test") == 256
    assert of("data.label_noise", "r=16", "test") is None
    assert of("data.label_noise", "r=64", "test") == 0  # up to which labels can be fitted
    assert of(STEP, "r=1, label_noise=0", "validation") == pytest.approx(31, abs=1)  # by the training loss


def test_training_scores_are_of_clean_and_noisy_rows_together(found):
    assert found.scores["r=1, label_noise=0", "LoRA"]["train", "accuracy"] == pytest.approx([0.7 + 0.3 * 0.5] * 5)
    train = _curve(found, axis="adapter.r", method="LoRA", others="label_noise=0", data="train", quantity="error")
    assert train.values[0] == pytest.approx([0.15, 0.15, 0.15, 0, 0])
    assert train.descent is None


def test_p_values_are_adjusted_over_the_curves_of_an_axis(found):
    family = [c for c in found.curves if (c.axis, c.data, c.quantity) == (STEP, "train", "loss")]
    raw = np.array([c.descent.p for c in family])
    assert len(family) == 20
    assert [c.p for c in family] == pytest.approx(np.maximum.accumulate(_holm(raw)[np.argsort(raw)])[_ranks(raw)])


def _holm(raw):
    return np.minimum(1, raw * (len(raw) - _ranks(raw)))


def _ranks(raw):
    return stats.rankdata(raw, method="ordinal") - 1


def test_values_are_sorted_and_empty_places_and_incomplete_seeds_left_out(tmp_path):
    settings = {f"r={r}": {"adapter.r": r} for r in (16, 1, 4, 64)}
    runs = [run("lora", seed, {"accuracy": r / 100, "log_loss": seed}, f"r={r}") for r in (16, 1, 4) for seed in (0, 1)]
    runs[-1] = run("lora", 1, {}, "r=4", failed="The loss is nan at step 3")
    runs.append(run("lora", 0, {}, "r=64", failed="The loss is nan at step 1"))
    found = _small(tmp_path, settings, runs)
    error = _curve(found, axis="adapter.r", data="test", quantity="error")
    assert (error.places, error.seeds) == ((1, 4, 16), (0,))
    assert error.values.tolist() == [pytest.approx([0.99, 0.96, 0.84])]
    assert found.failed["r=4", "LoRA"] == {1: "The loss is nan at step 3"}
    assert error.threshold is None  # no training rows were scored


def test_settings_that_are_no_numbers_have_scores_and_no_curves(tmp_path):
    settings = {f"rule={rule}": {"ggpo.rule": rule} for rule in ("paper", "relative")}
    values = {"accuracy": 0.8, "log_loss": 0.5}
    runs = [run("recipe", 0, values, setting, sets=("validation",)) for setting in settings]
    curves = [curve("recipe", 0, [0.5, float("nan"), 0.3], setting) | {"title": "recipe"} for setting in settings]
    found = _small(tmp_path, settings, runs, curves)
    assert (found.numeric, found.sets) == ((), ("validation",))
    assert found.scores["rule=paper", "recipe"]["validation", "accuracy"] == [0.8]
    assert {c.axis for c in found.curves} == {STEP}
    assert _curve(found, others="rule=paper", data="train").places == (1, 3)


def test_completions_have_a_loss_and_no_error(tmp_path):
    settings = {f"train_size={size}": {"data.train_size": size} for size in (1, 2)}
    runs = [run("lora", 0, {"loss": 0.04 * i}, name, sets=("test", "train")) for i, name in enumerate(settings, 1)]
    found = _small(tmp_path, settings, runs, metric="loss")
    assert found.quantities == {"loss": "loss"}
    assert _curve(found, data="test").threshold == 1
