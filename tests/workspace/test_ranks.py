"""`lora-ggpo train` under torchrun, by the launch recipe: two processes on gloo against one with twice the batch."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import distributed

from lora_ggpo.recipe.recipe import load_recipe
from lora_ggpo.training.folder import read_run
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter
from tests import processes
from tests.recipes import recipe_text

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")

LAUNCHER = Path(__file__).parents[2] / "recipes" / "launch" / "gpus.sh"


def write_recipe(folder, model, reviews, batch):
    text = recipe_text(
        model,
        reviews,
        folder / f"runs-{batch}",
        task={"kind": "causal-classification", "template": "{text} = ", "label_words": ["bad", "good"]},
        data={"validation_fraction": 0.167, "test_fraction": 0.167},
        adapter={"r": 4, "target_modules": "all-linear"},
        ggpo={"sigma": 0.1, "rule": "relative", "beta": 0.5, "ranks": "agree"},
        training={"max_steps": 12, "per_device_train_batch_size": batch, "save_steps": 4, "save_total_limit": 5},
        validate_every=2,
        keep="best",
        keep_metric="mcc",
    )
    path = folder / f"recipe-{batch}.yaml"
    path.write_text(text)
    return path


def torchrun(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GPUS": "2", "PYTHON": sys.executable}
    return subprocess.run([LAUNCHER, *arguments], env=environment, capture_output=True, text=True)


def train_twice(recipe):
    """What torchrun does, by processes that have the libraries."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    both = [processes.command("train", recipe, RANK=rank, LOCAL_RANK=rank, **meeting) for rank in "01"]
    for one in both:
        assert one.wait() == 0, one.stderr
    return both


def logged(run, *keys):
    return [[row[key] for key in keys] for row in run.log if keys[-1] in row]


def test_torchrun_starts_the_command_twice():
    """Which is quick for its help; with --thorough it carries a run out as well."""
    started = torchrun("--help")
    assert started.returncode == 0, started.stderr
    assert started.stdout.count("Usage: ") == 2


@pytest.mark.slow
def test_two_processes_train_as_one_on_the_global_batch_and_resume(tiny_llama, reviews, tmp_path, pytestconfig):
    alone = train(load_recipe(write_recipe(tmp_path, tiny_llama, reviews, 8)), Reporter(quiet=True))[0]
    recipe = write_recipe(tmp_path, tiny_llama, reviews, 4)
    train_twice(recipe)
    folder = tmp_path / "runs-4" / "seed-0"

    def check():
        together = read_run(folder)
        assert together.metrics["training"]["processes"] == 2
        kept = [run.metrics["training"]["kept_step"] for run in (alone, together)]
        assert kept[0] == kept[1] < 12
        assert [row["step"] for row in together.log if "loss" in row] == list(range(1, 13))
        for keys in (("step", "loss"), ("step", "grad_norm"), ("step", "validation/log_loss")):
            for one, two in zip(logged(alone, *keys), logged(together, *keys), strict=True):
                assert two == pytest.approx(one, rel=2e-3), keys
        mine, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder, alone.folder))
        assert all((mine[name] - theirs[name]).abs().max() < 2e-4 for name in theirs)
        return mine

    first = check()
    for name in ("metrics.json", "adapter", "checkpoints/checkpoint-8", "checkpoints/checkpoint-12"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = [torchrun(recipe)] if pytestconfig.getoption("thorough") else train_twice(recipe)
    assert "going on from step 4" in again[0].stderr
    assert sum(one.stdout.count("Runs:") for one in again) == 1
    assert all((check()[name] == value).all() for name, value in first.items())
