"""Calibration from the predictions that a run kept."""

import json

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import log_loss

from lora_ggpo.statistics.calibration import SHARES, Curves, calibration_curves
from lora_ggpo.training.calibrated import calibration_scores, mean_predictions, read_predictions

N = 2000
SETS = ("validation", "out/of domain", "test")


def scores(folder, *sets):
    return calibration_scores(read_predictions(folder, sets))


def predict(folder, name, temperature=0.5, digits=6, seed=0):
    """Predictions that are too sure by a known temperature; returns them as they were before rounding."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(N, 3)) * 2
    labels = (softmax(logits, axis=1).cumsum(axis=1) > random.random((N, 1))).argmax(axis=1)
    probabilities = softmax(logits / temperature, axis=1)
    rows = [
        {"id": str(i), "label": int(y), "probabilities": [round(float(v), digits) for v in p]}
        for i, (p, y) in enumerate(zip(probabilities, labels, strict=True))
    ]
    (folder / "predictions").mkdir(exist_ok=True)
    (folder / "predictions" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return probabilities, labels


def test_temperature_is_fitted_on_validation_and_used_on_the_others(tmp_path):
    predict(tmp_path, "validation.jsonl", seed=1)
    predict(tmp_path, "out-of-domain.jsonl", seed=2)
    probabilities, labels = predict(tmp_path, "test.jsonl")
    found = scores(tmp_path, *SETS)
    assert tuple(found) == SETS
    test = found["test"]
    assert test["temperature"].value == pytest.approx(2, rel=0.2)
    assert test["log_loss"].value == pytest.approx(log_loss(labels, probabilities), rel=1e-4)
    assert test["scaled_ece"].value < 0.5 * test["ece"].value
    scaled = softmax(np.log(probabilities) / test["temperature"].value, axis=1)
    assert test["scaled_log_loss"].value == pytest.approx(log_loss(labels, scaled), rel=1e-4)
    assert found["out/of domain"]["temperature"] == test["temperature"]
    assert not any(name.startswith("scaled") for name in found["validation"])


def test_what_is_drawn_comes_back_from_its_json(tmp_path):
    probabilities, labels = predict(tmp_path, "test.jsonl")
    (found,) = read_predictions(tmp_path, ["test", "train"]).values()
    drawn = calibration_curves(*found)
    assert len(drawn.accuracies) == len(SHARES)
    assert drawn.accuracies[-1] == pytest.approx((probabilities.argmax(1) == labels).mean(), abs=1e-4)
    again = Curves.read(json.loads(json.dumps(drawn.to_dict())))
    assert again.accuracies == pytest.approx(drawn.accuracies, abs=1e-5)
    for name, values in vars(drawn.bins).items():
        assert getattr(again.bins, name) == pytest.approx(values, abs=1e-5)


@pytest.fixture
def seeds(tmp_path):
    """Folders of two runs that predict the same rows, one surer than the other."""
    for name, temperature in (("one", 0.3), ("other", 4.0)):
        (tmp_path / name).mkdir()
        predict(tmp_path / name, "validation.jsonl", temperature, 9, seed=1)
        predict(tmp_path / name, "test.jsonl", temperature, 9)
    return [tmp_path / "one", tmp_path / "other"]


def together(folders):
    return mean_predictions([read_predictions(folder, ("validation", "test")) for folder in folders])


def test_an_ensemble_is_the_mean_of_the_probabilities(seeds, tmp_path):
    found = calibration_scores(together(seeds))["test"]
    (tmp_path / "again").mkdir()
    parts = [predict(tmp_path / "again", "test.jsonl", temperature) for temperature in (0.3, 4.0)]
    mean, labels = (parts[0][0] + parts[1][0]) / 2, parts[0][1]
    assert found["log_loss"].value == pytest.approx(log_loss(labels, mean), rel=1e-6)
    assert found["brier"].value == pytest.approx(((mean - np.eye(3)[labels]) ** 2).sum(axis=1).mean(), rel=1e-6)
    validation = calibration_scores(together(seeds))["validation"]["log_loss"].value
    assert validation < np.mean([scores(folder, "validation")["validation"]["log_loss"].value for folder in seeds])
    temperatures = [scores(folder, "validation", "test")["test"]["temperature"].value for folder in seeds]
    assert min(temperatures) < found["temperature"].value < max(temperatures)


def test_runs_that_predicted_different_rows_are_no_ensemble(seeds):
    predict(seeds[1], "test.jsonl", seed=7)
    assert list(together(seeds)) == ["validation"]
    (seeds[1] / "predictions" / "validation.jsonl").unlink()
    assert together(seeds) == {}


def test_without_validation_nothing_is_scaled(tmp_path):
    predict(tmp_path, "test.jsonl")
    (found,) = scores(tmp_path, "test", "train").values()
    assert {"log_loss", "brier", "ece", "reliability", "resolution"} == set(found)


def test_a_probability_that_was_rounded_to_zero_costs_no_more_than_it_can_have_been(tmp_path):
    (tmp_path / "predictions").mkdir()
    row = {"id": "0", "label": 1, "probabilities": [1.0, 0.0]}
    (tmp_path / "predictions" / "test.jsonl").write_text(json.dumps(row) + "\n")
    assert scores(tmp_path, "test")["test"]["log_loss"].value == pytest.approx(14.5, abs=0.1)


def test_other_tasks_have_none(tmp_path):
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "test.jsonl").write_text('{"id": "0", "loss": 1.0}\n')
    assert read_predictions(tmp_path, ["test", "validation"]) == {}
