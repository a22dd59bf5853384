"""A small study: grown, and not run twice."""

import json

import pytest
from typer.testing import CliRunner

from lora_ggpo.cli import app
from lora_ggpo.comparison.engine import _claim
from lora_ggpo.comparison.grid import plan_study
from lora_ggpo.recipe.source import read_source
from tests.comparison.local import here

OVERRIDES = ["training.max_steps=2", "validate_every=1"]
FILES = ("runs.jsonl", "curves.jsonl", "descent.jsonl", "facts.json", "report.md", "table.tex", "report.html")


def study(recipe_file, output, ranks, *more):
    options = ["--methods", "lora", "--axis", f"adapter.r={ranks}", "--seeds", 1, "--output", output, *more]
    return here("study", recipe_file, *OVERRIDES, *options)


def finished_runs(output):
    return {path: path.stat().st_mtime_ns for path in output.rglob("metrics.json")}


def test_a_study_grows_and_runs_nothing_twice(recipe_file, tmp_path):
    output = tmp_path / "out"
    first = study(recipe_file, output, "2,8")
    assert first.exit_code == 0, first.stderr
    assert "study: 2/2" in first.stderr
    assert "r, LoRA: too few points" in first.stdout
    assert "training steps, LoRA: too few points" in first.stdout
    runs = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    assert [run["setting"] for run in runs] == ["r=2", "r=8"]
    assert runs[0]["training"]["trainable_parameters"] < runs[1]["training"]["trainable_parameters"]
    curves = [json.loads(line) for line in (output / "curves.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curves[0]["rows"] if "validation/accuracy" in row] == [1, 2]
    early = finished_runs(output)
    assert study(recipe_file, output, "2,8,4").exit_code == 0
    late = finished_runs(output)
    assert len(late) == 3
    assert early.items() <= late.items()
    before = {name: (output / name).read_bytes() for name in FILES}
    assert study(recipe_file, output, "2,8,4").exit_code == 0
    assert finished_runs(output) == late
    assert {name: (output / name).read_bytes() for name in FILES} == before
    refused = study(recipe_file, output, "2,8,4", "data.label_noise=0")
    assert refused.exit_code == 2
    assert (
        "holds a study with other settings: recipe.data.label_noise is 0.25 there and 0 here; choose another"
        in refused.stderr
    )


def test_a_study_may_come_to_begin_with_another_method(recipe_file, tmp_path):
    output = tmp_path / "out"
    for methods in (["dora", "lora"], ["lora", "dora"]):
        with _claim(plan_study(read_source(recipe_file), methods, 1, ["adapter.r=2"], output), "the command"):
            facts = json.loads((output / "facts.json").read_text())
        assert (facts["methods"], facts["baseline"]) == (methods, methods[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--axis", "ggpo.sigma=0.1"),
            "error: --axis ggpo.sigma cannot vary with method lora, which sets ggpo to null",
        ),
        (("--axis", "rank"), "error: --axis 'rank' is not of the form key=value,value"),
        (("--seeds", "0"), "--seeds"),
    ],
)
def test_what_cannot_be_studied_is_one_sentence_and_code_2(recipe_file, tmp_path, options, message):
    result = CliRunner().invoke(app, ["study", str(recipe_file), "--output", str(tmp_path / "out"), *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
