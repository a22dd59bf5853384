"""The report of sharpness on made-up measurements."""

import json

import pytest

from lora_ggpo.errors import UserError
from lora_ggpo.report.sharpness import write_sharpness_report


def _point(folder, order, label, seed, rise, loss=0.5):
    rows = [
        {"space": "weights", "measure": "loss", "noise": None, "size": None, "value": loss, "se": 0.0},
        {"space": "weights", "measure": "expected", "noise": "rows", "size": 0.1, "value": rise, "se": 0.001},
        {"space": "weights", "measure": "worst", "noise": None, "size": 0.001, "value": 0.3 + seed / 100, "se": None},
    ]
    slices = {"weights": {"at": [-1, 0, 1], "loss": [1.0, loss, 1.1]}}
    value = {
        "order": order,
        "label": label,
        "seed": seed,
        "measures": rows,
        "spectra": {},
        "slices": slices,
        "planes": {},
    }
    (folder / "points").mkdir(exist_ok=True)
    (folder / "points" / f"{label}-seed-{seed}.json").write_text(json.dumps(value))


def test_means_and_differences_are_over_seeds_in_pairs(tmp_path):
    for seed, (lora, ggpo) in enumerate([(0.10, 0.05), (0.20, 0.14), (0.30, 0.25)]):
        _point(tmp_path, 0, "lora", seed, lora)
        _point(tmp_path, 1, "ggpo", seed, ggpo)
    report = write_sharpness_report(tmp_path)
    text = (tmp_path / "sharpness.md").read_text()
    # differences -0.05, -0.06, -0.05: mean -0.05333, sd 0.005774, half = 4.303 * 0.005774 / sqrt(3) = 0.01434
    assert "| 0.2000 ± 0.2484 | 0.1467 ± 0.2488 | -0.05333 ± 0.01434 |" in text
    assert report.verdicts == [
        "ggpo against lora: flatter: weights: expected rise, rows noise, sigma 0.1; "
        "no difference found: weights: worst rise found, rho 0.001"
    ]
    assert "95 % t interval" in text
    assert (tmp_path / "figures" / "expected.svg").is_file()
    assert not (tmp_path / "figures" / "spectrum.svg").exists()


def test_one_run_shows_the_errors_of_its_estimates(tmp_path):
    _point(tmp_path, 0, "lora", 0, 0.1)
    assert write_sharpness_report(tmp_path).verdicts == []
    text = (tmp_path / "sharpness.md").read_text()
    assert "| 0.1000 ± 0.0010 |" in text
    assert "| 0.3000 |" in text


def test_seeds_that_are_not_in_both_do_not_count(tmp_path):
    _point(tmp_path, 0, "lora", 0, 0.1)
    _point(tmp_path, 1, "ggpo", 1, 0.1)
    assert write_sharpness_report(tmp_path).verdicts == ["ggpo against lora: no seed in common"]


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no measurements"):
        write_sharpness_report(tmp_path)
