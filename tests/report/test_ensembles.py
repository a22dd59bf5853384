"""Averages of predictions stand beside single runs and temperature scaling, each with what its ± means."""

import json

import pytest

from lora_ggpo.comparison.results import read_results
from lora_ggpo.report.analysis import analyse
from lora_ggpo.report.comparison import write_report
from lora_ggpo.report.ensembles import ensemble_tables
from tests.report.grids import run, write_results
from tests.report.pages import leave_out_pictures

SCORES = {"accuracy": 0.80, "ece": 0.10, "brier": 0.30, "log_loss": 0.60, "scaled_ece": 0.04, "scaled_log_loss": 0.50}


def on_test(change):
    return {"test": {name: {"value": value + change, "se": 0.01, "n": 100} for name, value in SCORES.items()}}


def drawn(count, sigma, tolerance, change):
    return {"draws": {"count": count, "sigma": sigma, "tolerance": tolerance}, "evaluation": on_test(change)}


@pytest.fixture
def folder(tmp_path):
    runs = [run(method, seed, {}) for method in ("lora", "ggpo") for seed in range(2)]
    for one in runs:
        one["evaluation"] = on_test(0.02 * one["seed"])
        if one["method"] == "ggpo":
            one["draws"] = [drawn(10, 0.1, None, 0.04), drawn(5, 0.2 + one["seed"], 0.01, 0.06)]
    write_results(tmp_path, runs)
    rows = [{"setting": "", "method": "ggpo", "title": "GGPO", "seeds": [0, 1], "evaluation": on_test(0.08)}]
    (tmp_path / "ensembles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_rows_of_a_method(folder):
    results = read_results(folder)
    (table,) = ensemble_tables(analyse(results)[0], results)
    assert table.header == (
        "method",
        "predicted by",
        "accuracy, % ↑",
        "calibration error, % ↓",
        "Brier score ↓",
        "log-loss ↓",
    )
    rows = {row[:2]: row[2:] for row in table.rows}
    assert [by for title, by in rows if title == "LoRA"] == ["single runs", "single runs, scaled"]
    ggpo = {by: row for (title, by), row in rows.items() if title != "LoRA"}
    assert ggpo["single runs"] == ("81.00 ± 12.71", "11.00 ± 12.71", "0.3100 ± 0.1271", "0.6100 ± 0.1271")
    assert ggpo["single runs, scaled"] == ("81.00 ± 12.71", "5.00 ± 12.71", "–", "0.5100 ± 0.1271")
    assert ggpo["10 draws at sigma 0.1"][0] == "84.00 ± 0.00"
    assert ggpo["5 draws that make nothing worse by more than 0.01 of it"][0] == "86.00 ± 0.00"
    assert ggpo["ensemble of 2 seeds"] == ("88.00 ± 1.00", "18.00 ± 1.00", "0.3800 ± 0.0100", "0.6800 ± 0.0100")
    assert ggpo["ensemble of 2 seeds, scaled"] == ("88.00 ± 1.00", "12.00 ± 1.00", "–", "0.5800 ± 0.0100")


def test_it_is_part_of_the_report_where_there_is_an_ensemble(folder, monkeypatch):
    leave_out_pictures(monkeypatch)
    title = "test: averages of predictions (± of an ensemble: standard error over the examples)"
    write_report(folder)
    assert title in (folder / "table.md").read_text()
    (folder / "ensembles.jsonl").unlink()
    write_report(folder)
    assert title not in (folder / "table.md").read_text()
