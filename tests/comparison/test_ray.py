"""Ray: training by its Train library, and a comparison on a cluster that the tests start.

In one file, so that they never run side by side: `ray stop` stops every cluster on the machine.
"""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.comparison.local import here
from tests.comparison.test_engine import OVERRIDES
from tests.recipes import recipe_text
from tests.training.runs import invoke, refused

RAY = Path(sys.executable).with_name("ray")
TRAIN = Path(__file__).parents[2] / "recipes" / "launch" / "ray_train.py"

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # or a token that another cluster left in the home folder counts
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        options = ["--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        # Its daemons keep the streams they are given open.
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 90, "env": environment}
        subprocess.run([RAY, "start", *options], check=True, **quiet)
        yield f"127.0.0.1:{port}"
        subprocess.run([RAY, "stop", "--force"], **quiet)


@pytest.fixture
def project(tiny_llama, reviews, tmp_path):
    """A folder with a recipe.yaml of one step."""
    text = recipe_text(
        tiny_llama,
        reviews,
        "runs",
        task={"kind": "causal-classification", "template": "{text} = ", "label_words": ["bad", "good"]},
        data={"train_size": 32},
        ggpo={"sigma": 0.05},
        training={"max_steps": 1},
        score_test=False,
    )
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path


def took(project):
    """Steps and processes of the run in `project`."""
    training = json.loads((project / "runs" / "seed-0" / "metrics.json").read_text())["training"]
    return training["steps"], training["processes"]


@pytest.mark.thorough
def test_ray_train_on_two_workers(cluster, project):
    """Six processes that import the libraries: two minutes where there are two cores."""
    command = [sys.executable, TRAIN, "recipe.yaml", "--workers=2", "--cpu", f"--address={cluster}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert took(project) == (1, 2)


def test_ray_train_without_workers(project):
    """Ray calls what a worker does in this process, then, and needs no cluster."""
    done = processes.Process(_ray_train, "recipe.yaml", "training.max_steps=2", "--workers=0", "--cpu", folder=project)
    assert done.wait() == 0, done.stderr
    assert took(project) == (2, 1)


def _ray_train(*arguments):
    import ray

    ray.init = lambda address: None
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def compare(recipe_file, output, *more):
    options = ["--methods", "lora,ggpo", "--seeds", "1", "--trials", "1", "--output", str(output), *more]
    return ["compare", str(recipe_file), *OVERRIDES, "training.max_steps=2", *options]


def test_a_cluster_gives_the_results_of_this_machine(cluster, recipe_file, tmp_path):
    """Each run takes both cores, so that one worker does them all."""
    there = processes.run(*compare(recipe_file, tmp_path / "there", "--ray", cluster, "--ray-cpus", "2"))
    assert there.returncode == 0, there.stderr
    assert here(*compare(recipe_file, tmp_path / "here")).exit_code == 0
    scores = [
        [json.loads(line)["evaluation"] for line in (tmp_path / place / "runs.jsonl").read_text().splitlines()]
        for place in ("there", "here")
    ]
    assert len(scores[0]) == 2
    for one, other in zip(*scores, strict=True):
        assert one["test"]["log_loss"]["value"] == pytest.approx(other["test"]["log_loss"]["value"], rel=1e-3)


def test_a_cluster_that_does_not_answer(recipe_file, tmp_path):
    found = invoke(*compare(recipe_file, tmp_path / "out", "--ray", "127.0.0.1:1"))
    refused(found, "--ray 127.0.0.1:1: the cluster does not answer")
