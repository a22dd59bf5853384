"""Points of real runs, and the files of `lora-ggpo sharpness`."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lora_ggpo.cli import app
from lora_ggpo.errors import UserError
from lora_ggpo.recipe.recipe import load_recipe
from lora_ggpo.report.sharpness import write_sharpness_report
from lora_ggpo.sharpness import measure as module
from lora_ggpo.sharpness.measure import Settings, identity, label_runs, measure_runs
from lora_ggpo.sharpness.point import load_point
from lora_ggpo.training.folder import read_run
from lora_ggpo.training.reuse import load_trained
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter

QUIET = Reporter(quiet=True)
FEW = Settings(
    rows=6, spaces=("weights",), sigmas=(0.1,), draws=2, rhos=(0.001,), eigenvalues=1, products=24, points=3, plane=2
)


@pytest.fixture(scope="module")
def plain(finished, tmp_path_factory):
    """A folder of runs: the finished recipe as plain LoRA."""
    output = tmp_path_factory.mktemp("plain") / "lora"
    overrides = ["ggpo=null", "training.max_steps=4", "training.save_steps=4", f"output={output}"]
    train(load_recipe(finished[0], overrides), QUIET)
    return output


@pytest.mark.parametrize("space", ["weights", "adapter"])
def test_the_loss_of_a_point_is_the_run_s_own_score(finished, space):
    _, run = finished
    point = load_point(run.folder, space, "train", rows=1000, batch_size=7)
    sets = [run.metrics["evaluation"][name]["log_loss"] for name in ("train-clean", "train-noisy")]
    expected = sum(one["value"] * one["n"] for one in sets) / sum(one["n"] for one in sets)
    assert point.loss(point.parameters) == pytest.approx(expected, rel=1e-4)


def test_weights_are_those_of_the_adapted_layers_with_the_adapter_in_them(finished):
    _, run = finished
    point = load_point(run.folder, "weights", "train", rows=8)
    assert len(point.parameters) == 4  # query and value of two layers
    model, *_ = load_trained(run.folder)
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    expected = layer.base_layer.weight + layer.scaling["default"] * b @ a
    torch.testing.assert_close(point.parameters["bert.encoder.layer.0.attention.self.query.weight"], expected.detach())


def test_adapter_space_is_a_and_b(finished):
    _, run = finished
    point = load_point(run.folder, "adapter", "train", rows=8)
    assert sorted({tuple(p.shape) for p in point.parameters.values()}) == [(4, 32), (32, 4)]
    assert len(point.parameters) == 8


def test_full_fine_tuning_has_every_linear_layer_but_the_head_and_no_adapter(finished, tmp_path):
    overrides = ["adapter=null", "ggpo=null", "training.max_steps=1", "training.learning_rate=1e-4"]
    (run,) = train(load_recipe(finished[0], [*overrides, f"output={tmp_path / 'full'}"]), QUIET)
    point = load_point(run.folder, "weights", "train", rows=8)
    assert len(point.parameters) == 13  # six in each of two layers, and the pooler
    assert not any("classifier" in name for name in point.parameters)
    with pytest.raises(UserError, match="has no adapter"):
        load_point(run.folder, "adapter", "train", rows=8)


def test_a_language_model_s_loss_is_a_mean_over_completion_tokens(tiny_llama, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Say {word}", "completion": f" {word} " * n} for n, word in enumerate(("yes", "no", "why"), 1)]
    data.write_text("\n".join(map(json.dumps, rows * 4)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_llama}\ntask: sft\ndata: {{source: {data}, validation_fraction: 0.2, test_fraction: 0.2}}\n"
        "adapter: {r: 2, target_modules: all-linear}\n"
        f"training: {{max_steps: 2, per_device_train_batch_size: 2, use_cpu: true}}\noutput: {tmp_path / 'runs'}\n"
    )
    (run,) = train(load_recipe(recipe), QUIET)
    point = load_point(run.folder, "weights", "train", rows=100, batch_size=3)
    expected = run.metrics["evaluation"]["train"]["loss"]["value"]
    assert point.loss(point.parameters) == pytest.approx(expected, rel=1e-4)


def test_runs_are_named_by_the_shortest_ends_that_differ(finished, tmp_path):
    source = finished[1].folder
    for name in ("a/lora", "b/lora", "b/ggpo"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "seed-0").symlink_to(source)
    (tmp_path / "best").symlink_to(source)
    assert list(label_runs([tmp_path / "a/lora", tmp_path / "b/ggpo"])) == ["lora", "ggpo"]
    assert list(label_runs([tmp_path / "a/lora", tmp_path / "b/lora"])) == ["a/lora", "b/lora"]
    with pytest.raises(UserError, match="given twice"):
        label_runs([tmp_path / "a/lora", tmp_path / "a/lora"])


def test_runs_of_different_models_are_refused_before_one_is_measured(finished, tmp_path):
    other = shutil.copytree(finished[1].folder, tmp_path / "other")
    (other / "model.json").write_text(json.dumps({"model.safetensors": "0"}))
    with pytest.raises(UserError, match=r"seed-0 and .*other train different models; give runs of one\."):
        measure_runs([finished[1].folder, other], FEW, tmp_path / "out", QUIET)
    assert not list((tmp_path / "out" / "points").iterdir())


def test_a_run_folder_of_any_name_goes_by_it(finished, tmp_path, monkeypatch):
    best = shutil.copytree(finished[1].folder, tmp_path / "best")
    runs = label_runs([best, finished[1].folder])
    assert {label: list(seeds) for label, seeds in runs.items()} == {"best": [0], finished[1].folder.parent.name: [0]}
    monkeypatch.chdir(best)
    assert list(label_runs([Path()])) == ["best"]


def test_a_run_that_was_trained_anew_is_measured_anew(finished, tmp_path):
    run = read_run(shutil.copytree(finished[1].folder, tmp_path / "run"))
    assert identity(run) == identity(finished[1])  # a copy is the same run
    metrics = json.loads((run.folder / "metrics.json").read_text())
    metrics["weights"] = dict.fromkeys(metrics["weights"], "0" * 64)
    (run.folder / "metrics.json").write_text(json.dumps(metrics))
    assert identity(read_run(run.folder)) != identity(run)


def test_a_report_is_of_the_command_s_runs_in_its_order(finished, plain, tmp_path, monkeypatch):
    paths = [plain, finished[1].folder.parent]
    measure_runs(paths, FEW, tmp_path, QUIET)
    measure_runs([paths[1]], FEW, tmp_path, QUIET)
    assert "lora" not in write_sharpness_report(tmp_path).table.columns[1].header
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured twice"))
    measure_runs(paths[::-1], FEW, tmp_path, QUIET)
    headers = [column.header for column in write_sharpness_report(tmp_path).table.columns]
    assert headers == ["measure", "runs", "lora", "lora - runs"]


@pytest.mark.parametrize("sizes", [{"sigmas": (1e30,)}, {"rhos": (1e30,)}])
def test_noise_that_breaks_the_model_is_one_sentence(finished, tmp_path, sizes):
    with pytest.raises(UserError, match="is not finite; give smaller sizes"):
        measure_runs([finished[1].folder], replace(FEW, **sizes), tmp_path, QUIET)


def test_measuring_and_reporting_two_runs(finished, plain, tmp_path, monkeypatch):
    paths = [plain, finished[1].folder.parent]
    measure_runs(paths, FEW, tmp_path, QUIET)
    report = write_sharpness_report(tmp_path)
    # Few products with the Hessian may find no eigenvalue.
    assert re.fullmatch(r"runs against lora: one seed cannot tell: [67] measures", *report.verdicts)
    text = (tmp_path / "sharpness.md").read_text()
    assert "| weights: expected rise, guided noise, sigma 0.1 |" in text
    assert {file.name for file in (tmp_path / "figures").glob("*.png")} == {
        f"{name}.png" for name in ("expected", "slices", "spectrum", "lines", "planes")
    }
    measured = json.loads((tmp_path / "measured.json").read_text())
    line, *ends = (
        json.loads((tmp_path / "points" / one["file"]).read_text()) for one in measured["lines"] + measured["runs"]
    )
    losses = [one["measures"][0]["value"] for one in ends]
    assert [line["loss"][0], line["loss"][-1]] == pytest.approx(losses, rel=1e-4)
    assert ends[0]["slices"]["weights"]["loss"][1] == pytest.approx(losses[0])

    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured twice"))
    measure_runs(paths, FEW, tmp_path, QUIET)
    assert (tmp_path / "sharpness.md").read_text() == text
    with pytest.raises(UserError, match=r"with other settings: settings\.rows is 6 there and 8 here"):
        measure_runs(paths, Settings(rows=8), tmp_path, QUIET)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent",), "There is no run in absent"),
        (("absent", "--sigma", "0,1"), "--sigma '0,1' is not a list of numbers above 0"),
        (("absent", "--plane", "1"), "--plane 1 is a single point"),
        (("absent", "--rho", "big"), "--rho 'big' is not a list"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    result = CliRunner().invoke(app, ["sharpness", *arguments, "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def with_and_without(tiny_llama, tmp_path_factory):
    """Folders of a LoRA run and of one without an adapter."""
    folder = tmp_path_factory.mktemp("two")
    rows = [{"prompt": f"Say {word}", "completion": f" {word} "} for word in ("yes", "no", "why")]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows * 4)))
    (folder / "r.yaml").write_text(
        f"model: {tiny_llama}\ntask: sft\nadapter: {{r: 2, target_modules: [q_proj]}}\n"
        f"data: {{source: {folder / 'data.jsonl'}, validation_fraction: 0.2, test_fraction: 0.2}}\n"
        f"training: {{max_steps: 1, per_device_train_batch_size: 2, use_cpu: true}}\noutput: {folder / 'lora'}\n"
    )
    for overrides in ([], ["adapter=null", f"output={folder / 'full'}"]):
        train(load_recipe(folder / "r.yaml", overrides), QUIET)
    return folder / "lora", folder / "full"


def test_of_a_run_without_an_adapter_the_weights_are_measured(with_and_without, tmp_path):
    settings = replace(FEW, spaces=("weights", "adapter"), eigenvalues=0, plane=0)
    measure_runs(with_and_without, settings, tmp_path, QUIET)
    found = [json.loads(path.read_text()) for path in (tmp_path / "points").glob("[!l]*.json")]
    spaces = {Path(one["folder"]).parent.name: {row["space"] for row in one["measures"]} for one in found}
    assert spaces == {"lora": {"weights", "adapter"}, "full": {"weights"}}
    rows = [line for line in write_sharpness_report(tmp_path).verdicts if "full" in line]
    assert rows
    text = (tmp_path / "sharpness.md").read_text()
    assert all(line.count("–") == 2 for line in text.splitlines() if line.startswith("| adapter: "))


def test_a_space_that_a_run_does_not_have_is_refused_before_one_is_measured(with_and_without, tmp_path):
    with pytest.raises(UserError, match=r"full/seed-0 has no adapter, .* measure it with --space weights\."):
        measure_runs(with_and_without, replace(FEW, spaces=("adapter",)), tmp_path, QUIET)
    assert not list((tmp_path / "points").iterdir())
