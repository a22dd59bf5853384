"""The report of sharpness on made-up measurements."""

import json

import pytest

from lora_ggpo.errors import UserError
from lora_ggpo.report import sharpness
from lora_ggpo.report.sharpness import write_sharpness_report
from tests.report.pages import leave_out_pictures


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    """tests/sharpness/test_measure.py draws the figures, of real measurements."""
    leave_out_pictures(monkeypatch)


def _point(folder, label, seed, rise, loss=0.5, spectrum=None):
    rows = [
        {"space": "weights", "measure": "loss", "noise": None, "size": None, "value": loss, "se": 0.0},
        {"space": "weights", "measure": "expected", "noise": "rows", "size": 0.1, "value": rise, "se": 0.001},
        {"space": "weights", "measure": "worst", "noise": None, "size": 0.001, "value": 0.3 + seed / 100, "se": None},
    ]
    slices = {"weights": {"at": [-1, 0, 1], "loss": [1.0, loss, 1.1]}}
    spectra = {"weights": spectrum} if spectrum else {}
    value = {"measures": rows, "spectra": spectra, "slices": slices, "planes": {}}
    (folder / "points").mkdir(exist_ok=True)
    (folder / "points" / f"{label}-{seed}.json").write_text(json.dumps(value))
    index = folder / "measured.json"
    measured = json.loads(index.read_text()) if index.is_file() else {"runs": [], "lines": []}
    measured["runs"].append({"label": label, "seed": seed, "file": f"{label}-{seed}.json"})
    index.write_text(json.dumps(measured))


def test_means_and_differences_are_over_seeds_in_pairs(tmp_path):
    for seed, (lora, ggpo) in enumerate([(0.10, 0.05), (0.20, 0.14), (0.30, 0.25)]):
        _point(tmp_path, "lora", seed, lora)
        _point(tmp_path, "ggpo", seed, ggpo)
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
    _point(tmp_path, "lora", 0, 0.1)
    assert write_sharpness_report(tmp_path).verdicts == []
    text = (tmp_path / "sharpness.md").read_text()
    assert "| 0.1000 ± 0.0010 |" in text
    assert "| 0.3000 |" in text


def test_one_run_beside_several_shows_no_error_of_another_kind(tmp_path):
    for seed in range(2):
        _point(tmp_path, "lora", seed, 0.1 + seed)
    _point(tmp_path, "ggpo", 0, 0.1)
    report = write_sharpness_report(tmp_path)
    assert [column.header for column in report.table.columns[1:3]] == ["lora (n = 2)", "ggpo (n = 1)"]
    assert "| 0.6000 ± 6.3531 | 0.1000 |" in (tmp_path / "sharpness.md").read_text()


def test_seeds_that_all_differ_by_the_same_amount_prove_nothing(tmp_path):
    for seed in range(3):
        _point(tmp_path, "lora", seed, 0.5)
        _point(tmp_path, "ggpo", seed, 0.25)
    (line,) = write_sharpness_report(tmp_path).verdicts
    assert "cannot tell: every seed differs by the same amount: weights: expected rise" in line


def test_a_spectrum_reaches_as_far_as_the_widest(tmp_path):
    for seed, top in enumerate((1.0, 5.0)):
        _point(tmp_path, "lora", seed, 0.1, spectrum={"eigenvalue": [0.0, top], "density": [1.0, 0.5]})
    points = [json.loads(file.read_text()) for file in sorted((tmp_path / "points").iterdir())]
    curves = sharpness._stack({"lora": dict(enumerate(points))}, "spectra", "weights", "eigenvalue", "density")
    assert curves["lora"].places == [0.0, 1.0, 5.0]
    assert curves["lora"].values.tolist() == [[1.0, 0.5, 0.0], [1.0, 0.9, 0.5]]


def test_large_values_keep_their_digits(tmp_path):
    _point(tmp_path, "lora", 0, 12340.0, loss=1234.0)
    write_sharpness_report(tmp_path)
    text = (tmp_path / "sharpness.md").read_text()
    assert "| 1.234e+04 ± 0.001 |" in text
    assert "| 1234 ± 0 |" in text


def test_seeds_that_are_not_in_both_do_not_count(tmp_path):
    _point(tmp_path, "lora", 0, 0.1)
    _point(tmp_path, "ggpo", 1, 0.1)
    assert write_sharpness_report(tmp_path).verdicts == ["ggpo against lora: no seed in common"]


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no measurements"):
        write_sharpness_report(tmp_path)
