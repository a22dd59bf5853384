"""A small comparison on MiniLM and real reviews: killed, stopped and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import date

import pytest

from lora_ggpo.comparison import engine
from lora_ggpo.comparison.engine import run_comparison
from lora_ggpo.comparison.plan import make_plan
from lora_ggpo.comparison.worker import FAILURE, carry_out
from lora_ggpo.errors import UserError
from lora_ggpo.recipe.source import parse_source, read_source
from lora_ggpo.workspace.files import write_json
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import write_minilm_recipe

FILES = ("tuning.jsonl", "runs.jsonl", "curves.jsonl", "facts.json", "table.md", "table.tex", "report.html")
OVERRIDES = ["training.max_steps=4", "validate_every=2", "data.label_noise=0"]


def command(recipe_file, output, *more):
    base = [sys.executable, "-m", "lora_ggpo.cli", "compare", str(recipe_file), *OVERRIDES]
    return [*base, "--methods", "lora,ggpo", "--seeds", "2", "--trials", "2", "--output", str(output), *more]


def contents(output):
    return {name: (output / name).read_bytes() for name in FILES}


def finished_runs(output):
    return {path: path.stat().st_mtime_ns for path in output.rglob("metrics.json")}


@pytest.fixture(scope="module")
def compared(reviews, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    recipe, output = write_minilm_recipe(folder, reviews), folder / "out"
    process = subprocess.run(command(recipe, output), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return recipe, output, process


def test_results(compared):
    _, output, process = compared
    runs = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    assert [(run["method"], run["seed"]) for run in runs] == [("lora", 0), ("lora", 1), ("ggpo", 0), ("ggpo", 1)]
    for run in runs:
        assert run["evaluation"]["test"]["accuracy"]["n"] == 16
        assert run["training"]["steps"] == 4
        assert run["training"]["peak_memory_bytes"] > 100e6
    tuning = [json.loads(line) for line in (output / "tuning.jsonl").read_text().splitlines()]
    for method in ("lora", "ggpo"):
        trials = [trial for trial in tuning if trial["method"] == method]
        best = max(trials, key=lambda trial: (trial["score"], -trial["trial"]))
        assert all(run["chosen"] == best["values"] for run in runs if run["method"] == method)
    for path in (output / "tuning").rglob("metrics.json"):
        assert set(json.loads(path.read_text())["evaluation"]) == {"validation"}
    assert "difference" in process.stdout
    assert "compare: 8/8" in process.stderr


def test_nothing_runs_twice_and_the_tables_stay(compared):
    recipe, output, _ = compared
    before, runs = contents(output), finished_runs(output)
    (output / "runs" / "ggpo" / "seed-1" / "metrics.json").unlink()  # as if killed before its scores were written
    kept = {path: when for path, when in runs.items() if path.exists()}
    subprocess.run(command(recipe, output, "--jobs", "2"), check=True, capture_output=True)
    assert {path: when for path, when in finished_runs(output).items() if path in kept} == kept
    assert contents(output) == before


def test_killed_and_stopped_comparisons_go_on(compared, tmp_path):
    recipe, whole, _ = compared
    output = tmp_path / "out"
    for kill in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command(recipe, output), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        done = len(finished_runs(output)) if output.exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if output.exists() and len(finished_runs(output)) > done:
                os.kill(process.pid, kill)
                break
            time.sleep(0.05)
        _, errors = process.communicate(timeout=300)
        if kill == signal.SIGINT:
            assert process.returncode == 130
            assert "give the same command again" in errors
            assert "Traceback" not in errors
    time.sleep(1.5)  # workers notice within half a second that their parent is gone
    kept = finished_runs(output)
    assert 0 < len(kept) < 8
    subprocess.run(command(recipe, output), check=True, capture_output=True)
    assert {path: when for path, when in finished_runs(output).items() if path in kept} == kept

    def scores(folder):
        lines = (folder / "runs.jsonl").read_text().splitlines()
        return [(run["method"], run["seed"], run["chosen"], run["evaluation"]) for run in map(json.loads, lines)]

    assert scores(output) == scores(whole)


def test_another_comparison_in_the_folder_is_refused(compared):
    recipe, output, _ = compared
    process = subprocess.run(command(recipe, output, "--trials", "3"), capture_output=True, text=True)
    assert process.returncode == 2
    assert "holds a comparison with another trials; choose another --output" in process.stderr


@pytest.fixture
def undone(recipe_file, tmp_path):
    """A plan with a folder where nothing of it has run, and all of it counts as done."""
    plan = make_plan(read_source(recipe_file, OVERRIDES), ["lora", "ggpo"], 1, 1, (), None, tmp_path / "out")
    for job in plan.final({("", method.name): plan.candidates(method)[0] for method in plan.methods}):
        job.run_folder.mkdir(parents=True)
        write_json(job.run_folder / FAILURE, {"message": "none"})
    return plan


def test_a_grown_comparison_tells_all_machines_and_versions_that_made_it(undone, monkeypatch):
    def made():
        run_comparison(undone, lambda: pytest.fail("nothing is missing"), "command", Reporter(quiet=True))
        return json.loads((undone.output / "facts.json").read_text())["environments"]

    assert made() == []  # no run was made here
    for device, known in (("CPU", ["CPU"]), ("GPU", ["CPU", "GPU"]), ("CPU", ["CPU", "GPU"])):
        monkeypatch.setattr(engine, "device_name", lambda device=device: device)
        engine._note_environment(undone)
        assert [one["device"] for one in made()] == known


def test_facts_hold_any_recipe_as_json_gives_it_back():
    value = {1: float("inf"), "day": date(2026, 1, 2), "all": {3}, "of": [True, None, 0.5, ("a",)]}
    plain = engine._plain(value)
    assert plain == {"1": "inf", "day": "2026-01-02", "all": [3], "of": [True, None, 0.5, ["a"]]}
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_a_run_that_diverges_is_a_result(recipe_file, tmp_path):
    source = read_source(recipe_file, [*OVERRIDES, "training.learning_rate=1e30", "training.max_grad_norm=0"])
    plan = make_plan(source, ["lora", "ggpo"], 1, 1, (), None, tmp_path)
    job = plan.final({("", method.name): plan.candidates(method)[0] for method in plan.methods})[0]
    carry_out("r.yaml", job.recipe.resolved(0), job.run_folder)
    assert "The loss is " in json.loads((job.run_folder / FAILURE).read_text())["message"]


def test_bad_data_stops_the_comparison(recipe_file, tmp_path):
    plan = make_plan(read_source(recipe_file, ["data.text=body"]), ["lora", "ggpo"], 1, 1, (), None, tmp_path)

    class Here:
        width = 1

        def submit(self, function, *arguments):
            from concurrent.futures import Future

            future = Future()
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
            return future

        def stop(self): ...

        def close(self): ...

    with pytest.raises(UserError, match="body"):
        run_comparison(plan, Here, "command", Reporter(quiet=True))


def test_a_comparison_goes_on_with_the_data_that_it_was_begun_with(reviews, tmp_path, monkeypatch):
    """A relative path leads elsewhere from another folder."""
    text = f"model: minilm\ntask: classification\ndata: {reviews.name}\noutput: runs\n"
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / reviews.name).write_bytes(reviews.read_bytes())

    def claim(name):
        monkeypatch.chdir(tmp_path / name)
        plan = make_plan(parse_source(text, "r.yaml"), ["lora", "ggpo"], 1, 1, [], None, tmp_path)
        engine._claim(plan, "compare")

    claim("here")
    claim("here")
    with pytest.raises(UserError, match="holds a comparison with another place of its files"):
        claim("there")
