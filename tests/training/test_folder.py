"""Where a run lies, which recipe it is of, and who can read it: the same from any folder and for any user."""

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml

from lora_ggpo.cli import main
from lora_ggpo.data import DataConfig
from lora_ggpo.data.sources import set_names
from lora_ggpo.errors import UserError
from lora_ggpo.models.load import locate
from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.workspace.folder import lock
from lora_ggpo.workspace.paths import expand_home
from tests.recipes import recipe_text, write_pairs
from tests.training.runs import USES, invoke, refused, works

TWO_STEPS = {"max_steps": 2, "save_steps": 1}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, with the working directory elsewhere."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))  # which it makes as it is first imported
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def project(tiny_llama, tmp_path_factory):
    """A folder with a model, data, and a run made there of a recipe with relative paths."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(tiny_llama, folder / "models" / "tiny")
    (folder / "data").mkdir()
    for name in ("train.jsonl", "other.jsonl"):
        write_pairs(folder / "data" / name)
    (folder / "recipe.yaml").write_text(
        recipe_text(
            "./models/tiny",
            "data/train.jsonl",
            "runs",
            data={"out_of_domain": ["data/other.jsonl"]},
            training=TWO_STEPS,
        )
    )
    with contextlib.chdir(folder):
        works(invoke("train", "recipe.yaml"))
    return folder


@pytest.fixture
def moved(project, tmp_path):
    """A copy of that run whose base model has gone elsewhere, and that model's folder."""
    copy = shutil.copytree(project / "runs", tmp_path / "runs") / "seed-0"
    model = shutil.copytree(project / "models" / "tiny", tmp_path / "elsewhere")
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(project / "models" / "tiny"), str(tmp_path / "gone")))
    return copy, model


# --- ~ ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_path_of_a_recipe_and_of_a_command_may_begin_with_the_home_folder(tiny_llama, home):
    shutil.copytree(tiny_llama, home / "tiny")
    write_pairs(home / "data.jsonl")
    (home / "r.yaml").write_text(recipe_text("~/tiny", "~/data.jsonl", "~/runs", training=TWO_STEPS))
    works(invoke("train", "~/r.yaml"))
    seed = home / "runs" / "seed-0"
    assert sorted(path.name for path in (seed / "checkpoints").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    works(invoke("show", "~/runs"))
    assert "data.jsonl" in works(invoke("eval", "~/runs", "--on", "~/data.jsonl")).stdout
    works(invoke("merge", "~/runs", "~/merged"))
    works(invoke("train", "~/r.yaml", "output=~/again", "training.max_steps=1"))
    small = ("--rows", 2, "--draws", 2, "--eigenvalues", 0, "--sigma", 0.1, "--rho", 0.001, "--space", "adapter")
    works(invoke("sharpness", "~/runs", *small, "--output", "~/sharp"))
    assert {path.name for path in home.iterdir()} == {
        *("tiny", "data.jsonl", "r.yaml", "runs", "merged", "again", "sharp"),
    }
    assert list(Path().iterdir()) == []


@pytest.mark.slow
def test_an_evaluation_may_go_to_the_home_folder(tiny_llama, home):
    rows = [{"question": "1 + 1?", "answer": "#### 2"}]
    (home / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(tiny_llama, home / "tiny")
    options = ("--data", "~/q.jsonl", "--max-new-tokens", 2, "--output", "~/e")
    works(invoke("suite", "gsm8k", "~/tiny", *options))
    assert (home / "e" / "gsm8k" / "scores.json").is_file()


def test_a_folder_that_is_called_so_is_had_by_its_path(home):
    assert expand_home("./~/x") == "./~/x"
    assert expand_home("a~b") == "a~b"
    recipe = parse_recipe(recipe_text("minilm", "movie-reviews", "./~/x"), "r.yaml")
    assert recipe.resolved(0)["output"] == os.path.join(os.getcwd(), "~", "x")


@pytest.mark.parametrize("setting", ["output", "model", "data.source", "data.out_of_domain"])
def test_a_home_folder_that_is_not_there_is_one_sentence(setting, home):
    text = recipe_text("minilm", "movie-reviews", "runs")
    value = "[~nosuchuser/x]" if setting.endswith("domain") else "~nosuchuser/x"
    said = r"begins with ~nosuchuser, but there is no such user"
    with pytest.raises(UserError, match=rf"override '{setting}=.*: {setting}.* {said}"):
        parse_recipe(text, "r.yaml", [f"{setting}={value}"])
    refused(invoke("show", "~nosuchuser/x"), "begins with ~nosuchuser")
    with pytest.raises(UserError, match=f"Model '~nosuchuser/x' {said}"):
        locate("~nosuchuser/x")


def test_a_nul_in_a_path_is_one_sentence(home):
    text = recipe_text("minilm", "movie-reviews", "a\0b")
    with pytest.raises(UserError, match=r"r\.yaml, line \d+: output holds a NUL character, which no path can\."):
        parse_recipe(text, "r.yaml")


# --- whose checkpoint ------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_recipe_is_refused(project, tmp_path, monkeypatch):
    """Wherever it has come from: here somebody has copied it."""
    monkeypatch.chdir(project)
    works(invoke("train", "recipe.yaml", f"output={tmp_path}", "training.learning_rate=1e-3", "training.max_steps=1"))
    seed = tmp_path / "seed-0"
    (seed / "metrics.json").unlink()
    shutil.rmtree(seed / "adapter")
    shutil.rmtree(seed / "checkpoints")
    shutil.copytree(project / "runs" / "seed-0" / "checkpoints", seed / "checkpoints")
    again = ("train", "recipe.yaml", f"output={tmp_path}", "training.learning_rate=1e-3", "training.max_steps=1")
    said = "checkpoint-2 is of another recipe: training.learning_rate is 0.005 there and 0.001 here"
    refused(invoke(*again), said)
    shutil.rmtree(seed / "checkpoints")
    works(invoke(*again))


# --- any working directory -------------------------------------------------------------------------------------------


def test_a_run_of_relative_paths_works_from_anywhere(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((project / "runs" / "seed-0" / "recipe.yaml").read_text())
    assert recipe["model"] == str(project / "models" / "tiny")
    assert recipe["data"]["source"] == str(project / "data" / "train.jsonl")
    assert recipe["data"]["out_of_domain"] == [str(project / "data" / "other.jsonl")]
    shown = works(invoke("eval", project / "runs")).stdout
    assert "other.jsonl" in shown
    assert str(project) not in shown
    works(invoke("merge", project / "runs", "merged"))
    works(invoke("chat", project / "runs", "--max-new-tokens", 2))
    assert "is finished already" in works(invoke("train", project / "runs" / "seed-0" / "recipe.yaml")).stderr
    monkeypatch.chdir(project)
    assert "is finished already" in works(invoke("train", "recipe.yaml")).stderr


def test_a_run_of_an_earlier_release_is_read_where_its_paths_lead(project, tmp_path, monkeypatch):
    """It wrote paths down as they were, and called a further set by its path."""
    old = shutil.copytree(project / "runs", tmp_path / "runs") / "seed-0"
    for name in ("recipe.yaml", "data.json"):
        (old / name).write_text((old / name).read_text().replace(f"{project}/", ""))
    data = json.loads((old / "data.json").read_text())
    data["splits"]["data/other.jsonl"] = data["splits"].pop("other.jsonl")
    (old / "data.json").write_text(json.dumps(data))
    monkeypatch.chdir(tmp_path)
    refused(invoke("eval", old), "models/tiny")
    monkeypatch.chdir(project)
    works(invoke("eval", old))
    assert "is finished already" in works(invoke("train", "recipe.yaml", f"output={old.parent}")).stderr


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["/a/x.csv", "hub/set", "amazon-reviews"], ["x.csv", "hub/set", "amazon-reviews"]),
        (["/a/x.csv", "/b/x.csv"], ["a/x.csv", "b/x.csv"]),
        (["/a/test"], ["a/test"]),
    ],
)
def test_sets_go_by_the_shortest_ends_of_their_paths(sources, names):
    assert set_names(sources, {"test"}) == dict(zip(sources, names, strict=True))


def test_a_source_given_twice_in_other_words_is_seen(project, monkeypatch):
    monkeypatch.chdir(project / "models")
    with pytest.raises(ValueError, match="none of them the training source"):
        DataConfig(source="../data/train.jsonl", out_of_domain=[str(project / "data" / "train.jsonl")])


@pytest.mark.parametrize("use", USES)
def test_a_base_model_that_has_moved_is_named(moved, use, tmp_path):
    seed, model = moved
    command = USES[use](seed, tmp_path / "out")
    refused(invoke(*command), "there is no such folder. If it has moved, give its place as --model.")
    works(invoke(*command, "--model", model))
    settings = model / "config.json"
    settings.write_text(settings.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    changed = invoke(*USES[use](seed, tmp_path / "again"), "--model", model)
    refused(changed, f"is not what {seed} was trained on: its files have changed")


def test_a_model_itself_has_no_other_one(tiny_llama, tmp_path):
    refused(invoke("chat", tiny_llama, "--model", tiny_llama), "--model is for runs")


# --- permissions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "folders", "files"), [(0o002, 0o775, 0o664), (0o027, 0o750, 0o640)])
def test_the_umask_decides_who_may_read_and_write_a_run(project, umask, folders, files, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    before = os.umask(umask)
    try:
        works(invoke("train", "recipe.yaml", f"output={tmp_path / 'runs'}", "adapter.init_lora_weights=pissa"))
        works(invoke("merge", tmp_path / "runs", tmp_path / "merged"))
    finally:
        os.umask(before)
    found = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {path: oct(m) for path, m in found.items() if m != (folders if path.is_dir() else files)} == {}
    assert sum(path.suffix == ".safetensors" for path in found) >= 5  # start, two checkpoints, adapter, merged model


@pytest.mark.parametrize("use", ["eval", "merge", "chat"])
def test_a_file_that_may_not_be_read_is_one_sentence(project, use, tmp_path, monkeypatch):
    weights, opened = project / "runs" / "seed-0" / "adapter" / "adapter_model.safetensors", Path.open

    def denied(self, *arguments, **options):
        if self == weights:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", denied)  # root, whom the tests may run as, is denied nothing
    refused(
        invoke(*USES[use](project / "runs", tmp_path / "out")), f"{weights} cannot be read or written: Permission den"
    )


# --- locks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_a_file_stands_for_one(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr("warnings.warn", lambda *_, **__: None)
    with lock(tmp_path), pytest.raises(UserError, match="is in use by another process"), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass


# --- what a terminal cannot show -------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["iso-8859-1", "ascii"])
def test_output_never_fails_by_the_encoding_of_a_terminal(project, encoding, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["lora-ggpo", "show", str(project / "runs")])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # what it does for a process of its own
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    terminal.flush()
    shown = terminal.buffer.getvalue().decode(encoding)
    assert "?" in shown
    assert "loss" in shown
