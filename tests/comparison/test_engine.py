"""A small comparison: killed, stopped and resumed."""

import io
import json
import os
import re
import signal
import threading
from concurrent.futures import Future
from datetime import date

import pytest
from rich.console import Console

from lora_ggpo.comparison import engine, pool
from lora_ggpo.comparison.engine import run_comparison
from lora_ggpo.comparison.grid import plan_comparison
from lora_ggpo.comparison.pool import FAILURE, LocalPool, carry_out
from lora_ggpo.comparison.results import read_results
from lora_ggpo.errors import UserError
from lora_ggpo.recipe.source import parse_source, read_source
from lora_ggpo.workspace import progress
from lora_ggpo.workspace.files import write_json
from lora_ggpo.workspace.progress import Reporter
from tests.comparison.local import Here, finished_runs, forking, here
from tests.recipes import write_guided

FILES = (
    "tuning.jsonl",
    "runs.jsonl",
    "curves.jsonl",
    "ensembles.jsonl",
    "facts.json",
    "table.md",
    "table.tex",
    "report.html",
)
OVERRIDES = ["training.max_steps=4", "validate_every=2", "data.label_noise=0"]
OPTIONS = ["--methods", "lora,ggpo", "--seeds", "2", "--trials", "2"]


def compare(recipe, output, *more):
    """The command and its options, for this process or one of its own."""
    return ["compare", recipe, *OVERRIDES, *OPTIONS, "--output", output, *more]


def contents(output):
    return {name: (output / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def compared(tiny_bert, reviews, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    recipe, output = write_guided(folder, tiny_bert, reviews), folder / "out"
    result = here(*compare(recipe, output))
    assert result.exit_code == 0, result.output
    return recipe, output, result


def test_results(compared):
    _, output, result = compared
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
    ensembles = [json.loads(line) for line in (output / "ensembles.jsonl").read_text().splitlines()]
    assert [(one["method"], one["seeds"]) for one in ensembles] == [("lora", [0, 1]), ("ggpo", [0, 1])]
    for one in ensembles:
        single = [run["evaluation"]["test"]["log_loss"]["value"] for run in runs if run["method"] == one["method"]]
        assert one["evaluation"]["test"]["log_loss"]["value"] <= sum(single) / 2 + 1e-6
    assert "difference" in result.stdout
    assert "compare: 8/8" in result.stderr


def test_nothing_runs_twice_and_the_tables_stay(compared):
    recipe, output, _ = compared
    before, runs = contents(output), finished_runs(output)
    (output / "runs" / "ggpo" / "seed-1" / "metrics.json").unlink()  # as if killed before its scores were written
    kept = {path: when for path, when in runs.items() if path.exists()}
    assert here(*compare(recipe, output, "--jobs", "2")).exit_code == 0
    assert {path: when for path, when in finished_runs(output).items() if path in kept} == kept
    assert contents(output) == before


@pytest.mark.slow
def test_killed_and_stopped_comparisons_go_on(compared, tmp_path):
    recipe, whole, _ = compared
    output = tmp_path / "out"
    for kill, jobs in ((signal.SIGKILL, 2), (signal.SIGINT, 1)):
        halt = tmp_path / kill.name
        process = forking(*compare(recipe, output, "--jobs", jobs), output=output, halt=halt)
        process.send_when(halt.exists, kill)
        halt.unlink()
        assert process.wait() == (130 if kill == signal.SIGINT else -kill)
    assert "give the same command again" in process.stderr
    assert "Traceback" not in process.stderr
    kept = finished_runs(output)
    assert 0 < len(kept) < 8
    assert here(*compare(recipe, output)).exit_code == 0
    assert {path: when for path, when in finished_runs(output).items() if path in kept} == kept

    def scores(folder):
        runs = map(json.loads, (folder / "runs.jsonl").read_text().splitlines())
        return {(run["method"], run["seed"]): run["evaluation"]["test"]["log_loss"]["value"] for run in runs}

    assert scores(output) == pytest.approx(scores(whole), rel=1e-4)


@pytest.mark.parametrize("command", [["compare", "--trials", "1", "--vary", "data.label_noise=0,0.3"], ["study"]])
def test_what_is_advised_against_is_said_once_before_the_first_run(command, recipe_file, tmp_path, monkeypatch):
    def stop(*_):
        raise UserError("stopped")

    monkeypatch.setattr(engine, "run_comparison", stop)
    monkeypatch.setattr(pool, "load_libraries", lambda: None)  # which silences a worker, and here they are this process
    name, *options = command
    many = ["training.max_steps=100", "training.learning_rate=1e-3", "data.label_noise=0"]
    command = [name, recipe_file, *many[: 2 if "--vary" in options else 3], *options, "--output", tmp_path / "out"]
    said = here(*command).stderr
    assert said.count("passes over 64 rows at learning rate 0.001 are likely to over-fit") == 1
    assert said.endswith("error: stopped\n")
    (tmp_path / "out" / "runs" / "lora" / "seed-0").mkdir(parents=True)  # begun
    (tmp_path / "out" / "label_noise=0" / "runs" / "lora" / "seed-0").mkdir(parents=True)
    assert here(*command).stderr == "error: stopped\n"


@pytest.mark.parametrize(("allowed", "cores", "threads"), [("", 8, "4"), ("6", 8, "3")])
def test_workers_are_fresh_processes_that_share_the_cores(monkeypatch, allowed, cores, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", allowed)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    pool = LocalPool(2)
    seen = [pool.submit(os.getenv, name).result() for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")]
    assert seen == [threads] * 2
    assert pool.submit(os.getpid).result() != os.getpid()
    assert pool.submit(threading.active_count).result() == 2  # one looks whether the parent is still there
    pool.close()


@pytest.mark.parametrize("before", [False, True])
def test_runs_under_way_say_how_far_they_are(recipe_file, tmp_path, monkeypatch, before):
    log = '{"step": 2, "loss": 0.5}\n{"step": 2, "validation/loss": 1.0}\n{"ste'

    class Slow(Here):
        """Takes half of the steps, and fails once that has been seen."""

        def submit(self, function, name, recipe, folder):
            future = Future()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "log.jsonl").write_text(log)
            threading.Timer(0.3, lambda: future.set_result(write_json(folder / FAILURE, {"message": "none"}))).start()
            return future

    monkeypatch.setattr(engine, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.1)
    grid = plan_comparison(read_source(recipe_file, OVERRIDES), ["lora", "ggpo"], 1, 1, (), None, tmp_path)
    first = grid.final()[0].folder
    if before:  # a session before came as far
        first.mkdir(parents=True)
        (first / "log.jsonl").write_text(log)
    said = io.StringIO()
    run_comparison(grid, Slow, "command", Reporter(Console(file=said, width=200)))
    lines = said.getvalue().splitlines()
    left = "" if before else r", 0:0\d left"
    assert re.search(rf"^compare: 0/2, lora seed 0 step 2, loss 0\.500{left}$", lines[0])
    assert "compare: 1/2, ggpo seed 0 step 2, loss 0.500, 0:00 left" in lines
    assert lines[-1] == "compare: 2/2, ggpo seed 0"


def test_another_comparison_in_the_folder_is_refused(compared):
    recipe, output, _ = compared
    result = here(*compare(recipe, output, "--trials", "3"))
    assert result.exit_code == 2
    assert "holds a comparison with other settings: trials is 2 there and 3 here; choose another" in result.stderr


@pytest.fixture
def undone(recipe_file, tmp_path):
    """A grid with a folder where nothing of it has run, and all of it counts as done."""
    grid = plan_comparison(read_source(recipe_file, OVERRIDES), ["lora", "ggpo"], 1, 1, (), None, tmp_path / "out")
    for job in grid.final():
        job.folder.mkdir(parents=True)
        write_json(job.folder / FAILURE, {"message": "none"})
    return grid


def test_a_grown_comparison_tells_all_machines_and_versions_that_made_it(undone, monkeypatch):
    def made():
        run_comparison(undone, lambda: pytest.fail("nothing is missing"), "command", Reporter(quiet=True))
        return read_results(undone.output).facts["environments"]

    assert made() == []  # no run was made here
    for device, known in (("CPU", ["CPU"]), ("GPU", ["CPU", "GPU"]), ("CPU", ["CPU", "GPU"])):
        monkeypatch.setattr(engine, "device_name", lambda device=device: device)
        engine._note_environment(undone)
        assert [one["device"] for one in made()] == known


def test_facts_hold_any_recipe_as_json_gives_it_back():
    value = {1: float("inf"), "day": date(2026, 1, 2), "of": [True, None, 0.5, ("a",)]}
    plain = engine._as_json(value)
    assert plain == {"1": "inf", "day": "2026-01-02", "of": [True, None, 0.5, ["a"]]}
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_a_run_that_diverges_is_a_result(recipe_file, tmp_path):
    source = read_source(recipe_file, [*OVERRIDES, "training.learning_rate=1e30", "training.max_grad_norm=0"])
    grid = plan_comparison(source, ["lora", "ggpo"], 1, 1, (), None, tmp_path)
    job = grid.final()[0]
    carry_out("r.yaml", job.recipe.resolved(0), job.folder)
    assert "The loss is " in json.loads((job.folder / FAILURE).read_text())["message"]


def test_bad_data_stops_the_comparison(recipe_file, tmp_path):
    grid = plan_comparison(read_source(recipe_file, ["data.text=body"]), ["lora", "ggpo"], 1, 1, (), None, tmp_path)
    with pytest.raises(UserError, match="body"):
        run_comparison(grid, Here, "command", Reporter(quiet=True))


def test_a_comparison_goes_on_with_the_data_that_it_was_begun_with(reviews, tmp_path, monkeypatch):
    """A relative path leads elsewhere from another folder."""
    text = f"model: minilm\ntask: classification\ndata: {reviews.name}\noutput: runs\n"
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / reviews.name).write_bytes(reviews.read_bytes())

    def claim(name):
        monkeypatch.chdir(tmp_path / name)
        grid = plan_comparison(parse_source(text, "r.yaml"), ["lora", "ggpo"], 1, 1, [], None, tmp_path)
        with engine._claim(grid, "compare"):
            pass

    claim("here")
    claim("here")
    with pytest.raises(UserError, match="holds a comparison with other settings: place of its files is "):
        claim("there")
