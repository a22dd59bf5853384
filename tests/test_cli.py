import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from lora_ggpo.cli import app
from lora_ggpo.recipe.recipe import load_recipe
from lora_ggpo.training import checkpoints
from tests import processes
from tests.comparison.local import here


def _run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


HEAVY = {"torch", "transformers", "peft", "datasets", "scipy.stats", "matplotlib", "pandas"}


def _imports(*commands, home):
    """What these commands print, and the heavy libraries that they import, in a process of their own."""
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom lora_ggpo.cli import app\n"
        f"for command in {[[str(word) for word in command] for command in commands]}:\n"
        "    print(CliRunner().invoke(app, command).output)\n"
        f"print(sorted({HEAVY} & set(sys.modules)))"
    )
    settings = {**os.environ, "XDG_CACHE_HOME": str(home)}
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=settings)
    *lines, heavy = found.stdout.splitlines()
    return "\n".join(lines), heavy


def test_what_needs_no_model_imports_no_heavy_library(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    schema = _run("schema").stdout  # kept for the next time
    commands = [["--help"], ["train", "--help"], ["--version"], ["methods"], ["schema"]]
    commands += [["train", "absent.yaml"], ["show", "absent"], ["eval", "absent"]]
    printed, heavy = _imports(*commands, home=tmp_path)
    assert heavy == "[]"
    assert schema in printed
    for words in ("Fine-tune language models", "lora-ggpo 0.1.0", "GGPO (relative rule)", "There is no run in absent"):
        assert words in printed


def test_show_imports_no_heavy_library(finished, tmp_path):
    shutil.copytree(finished[1].folder, tmp_path / "seed-0")
    ended, heavy = _imports(["show", tmp_path], home=tmp_path)
    assert heavy == "[]"
    assert "ggpo      sigma 0.05" in ended
    assert "scaled_ece" in ended  # it has probabilities
    (tmp_path / "seed-0" / "metrics.json").unlink()
    assert "unfinished" in _imports(["show", tmp_path], home=tmp_path)[0]


@pytest.mark.parametrize("damage", ["older release", "another file"])
def test_a_cache_that_does_not_fit_is_passed_over(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    schema, file = _run("schema").stdout, tmp_path / "lora-ggpo" / "schema.json"
    file.write_text({"older release": f"0123\n{schema}", "another file": "{}"}[damage])
    assert _run("schema").stdout == schema
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # where no folder can be
    assert _run("schema").stdout == schema


def test_of_many_processes_the_first_tells_what_is_wrong(monkeypatch):
    first = _run("train", "absent.yaml")
    monkeypatch.setenv("RANK", "1")
    second = _run("train", "absent.yaml")
    assert (first.exit_code, second.exit_code) == (2, 2)
    assert "absent.yaml" in first.output
    assert second.output == ""


def test_schema_is_json():
    schema = json.loads(_run("schema").stdout)
    assert {"model", "task", "data", "adapter", "ggpo", "training"} <= set(schema["properties"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "absent.yaml"), "error: There is no recipe file absent.yaml"),
        (("show", "absent"), "error: There is no run in absent"),
        (("show", "a" * 300), "aaa cannot be read or written: File name too long."),
        (("eval", "absent"), "error: There is no run in absent"),
        (("merge", "absent", "out"), "error: There is no run in absent"),
        (("demo", "--seeds", "0"), "--seeds"),
        (("demo", "seeds=[0,1]", "x=1"), "error: override 'seeds=[0,1]': seeds is decided by the command; use --seeds"),
        (
            ("demo", "output=here", "x=1"),
            "override 'output=here': output is decided by the command; use --output",
        ),
        (
            ("demo", "score_test=false", "x=1"),
            "error: override 'score_test=false': score_test is decided by the",
        ),
        (("trian",), "No such command 'trian'"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(arguments, message):
    result = _run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bad_recipe_names_file_and_line(recipe_file):
    recipe_file.write_text(recipe_file.read_text().replace("save_steps", "save_stps"))
    result = _run("train", recipe_file)
    assert result.exit_code == 2
    line = next(n for n, text in enumerate(recipe_file.read_text().splitlines(), 1) if "save_stps" in text)
    expected = f"error: {recipe_file}, line {line}: training.save_stps is not a setting; did you mean save_steps?\n"
    assert result.stderr == expected


def test_debug_shows_the_traceback():
    result = _run("train", "absent.yaml", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_train_prints_results_on_stdout_and_progress_on_stderr(recipe_file):
    result = _run("train", recipe_file, "training.max_steps=2", "seeds=[0,1]", "validate_every=null")
    assert result.exit_code == 0
    assert "mean of 2 seeds" in result.stdout
    assert "train-noisy" in result.stdout
    assert "seed-1" in result.stdout
    assert "2/2, loss" in result.stderr
    plots = [recipe_file.parent / "runs" / f"seed-{seed}" / "training.png" for seed in (0, 1)]
    assert all(plot.stat().st_size > 10_000 for plot in plots)
    assert str(plots[0]) in _run("show", plots[0].parent).stdout


def test_the_version_and_shell_completion():
    assert _run("--version").stdout == "lora-ggpo 0.1.0\n"
    asked = {"_LORA_GGPO_COMPLETE": "complete_bash", "COMP_WORDS": "lora-ggpo s", "COMP_CWORD": "1"}
    completed = CliRunner().invoke(app, [], prog_name="lora-ggpo", env=asked).stdout
    assert completed.split() == ["suite", "show", "schema", "study", "sharpness"]


def test_show_eval_and_merge(finished, tmp_path):
    _, run = finished
    shown = _run("show", run.folder.parent).stdout
    assert "adapter" in shown
    accuracy = f"{run.metrics['evaluation']['test']['accuracy']['value']:.4f}"
    assert accuracy in shown
    assert accuracy in _run("eval", run.folder).stdout
    merged = _run("merge", run.folder, tmp_path / "merged")
    assert "differ from the adapter's by at most" in merged.stdout
    again = _run("merge", run.folder, tmp_path / "merged")
    assert again.exit_code == 2
    assert "exists already" in again.stderr


def test_ctrl_c_saves_and_the_run_goes_on(recipe_file, finished):
    recipe = yaml.safe_load(recipe_file.read_text())
    recipe["training"] |= {"max_steps": 60, "per_device_train_batch_size": 2, "save_steps": 1000}
    recipe_file.write_text(yaml.safe_dump(recipe))
    folder = recipe_file.parent / "runs" / "seed-0"
    log, process = folder / "log.jsonl", processes.command("train", recipe_file)
    process.send_when(lambda: log.is_file() and log.read_text().count("\n") >= 3, signal.SIGINT)
    assert process.wait() == 130
    assert "give the same command again" in process.stderr
    assert "Traceback" not in process.stderr
    stopped = checkpoints.step_of(checkpoints.last_whole(folder / "checkpoints"))
    assert 3 <= stopped < 60
    assert not (folder / "metrics.json").exists()
    result = _run("train", recipe_file)
    assert result.exit_code == 0
    assert f"going on from step {stopped}" in result.stderr
    steps = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == list(range(1, 61))


@pytest.mark.slow
def test_demo_compares_both_methods(tmp_path, tiny_bert, reviews):
    small = [
        f"model={tiny_bert}",
        f"data.source={reviews}",
        "data.train_size=null",
        "data.out_of_domain=[]",
    ]
    small += ["data.validation_fraction=0.16", "data.test_fraction=0.16", "validate_every=3", "task.max_length=16"]
    small += ["training.max_steps=3", "adapter.r=4", "training.warmup_steps=0", "ggpo.sigma=0.05"]
    small += ["score_rows=7"]
    result = here("demo", "--seeds", 1, "--output", tmp_path / "demo", *small)
    assert result.exit_code == 0, result.stderr
    output = tmp_path / "demo"
    assert re.search(r"LoRA-GGPO +\d", result.stdout)
    assert "\ntest: " in result.stdout
    runs = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    assert [(run["method"], run["seed"]) for run in runs] == [("lora", 0), ("ggpo", 0)]
    assert [run["evaluation"]["test"]["accuracy"]["n"] for run in runs] == [7, 7]
    assert [run["chosen"] for run in runs] == [{"training.learning_rate": 1e-3}] * 2
    assert (output / "figures" / "curves.png").stat().st_size > 10_000
    recipes = {name: load_recipe(output / "runs" / name / "seed-0" / "recipe.yaml") for name in ("lora", "ggpo")}
    assert recipes["lora"].ggpo is None
    assert recipes["ggpo"].ggpo_config(0).sigma == 0.05
    digests = {(output / "runs" / name / "seed-0" / "data.json").read_text() for name in recipes}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "absent", "--limit", "3"), "No such option: --limit"),
        (("suite", "gsm8k", "absent", "--on", "x"), "No such option: --on"),
        (("suite", "maths", "absent"), "error: Suite 'maths' is unknown; the suites are gsm8k, humaneval,"),
        (("suite", "gsm8k", "./absent"), "error: Model './absent': there is no such folder."),
        (("eval", "./absent", "--suite", "gsm8k"), "error: Model './absent': there is no such folder."),
        (("eval", "--suite=gsm8k", "./absent"), "error: Model './absent': there is no such folder."),
        (("suite", "gsm8k", "absent", "--judge", "x"), "error: --judge is not for suite gsm8k;"),
        (("chat", "./absent"), "error: Model './absent': there is no such folder."),
        (("chat", "./absent", "--top-p", "0.5"), "error: --top-p needs a --temperature above 0"),
    ],
)
def test_bad_input_to_what_generates(arguments, message):
    test_bad_input_is_one_sentence_and_code_2(arguments, message)


def test_a_suite(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problems = tmp_path / "maths.jsonl"
    problems.write_text("".join(f'{{"question": "{n} + 1?", "answer": "#### {n + 1}"}}\n' for n in range(4)))
    command = ("suite", "gsm8k", tiny_llama, "--data", problems, "--max-new-tokens", 4)
    result = _run(*command, "--template", r"Q: {text}\nA: ", "--output", "out")
    assert result.exit_code == 0, result.stderr
    assert "accuracy" in result.stdout
    assert "± standard error" in result.stdout
    assert "4/4" in result.stderr
    assert json.loads((tmp_path / "out" / "gsm8k" / "settings.json").read_text())["template"] == "Q: {text}\nA: "
    problems.write_text('{"question": "x", "answer": "#### 1"}\n{"question": "y", "answer": "one"}\n')
    result = _run(*command)
    assert result.exit_code == 2
    assert f"error: {problems}, line 2: answer: it must end in" in result.stderr
