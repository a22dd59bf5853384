"""Ray: training on two workers, and the same comparison on a cluster that the test starts.

In one file, so that they never run side by side: `ray stop` stops every cluster on the machine.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.comparison.test_engine import OVERRIDES

RAY = Path(sys.executable).with_name("ray")
TRAIN = Path(__file__).parents[2] / "recipes" / "launch" / "ray_train.py"

pytest.importorskip("ray")


RECIPE = """\
model: {model}
task: {{kind: causal-classification, template: "{{text}} = ", label_words: [bad, good], max_length: 16}}
data: {{source: {reviews}, train_size: 32}}
adapter: {{r: 2, target_modules: all-linear}}
ggpo: {{sigma: 0.05}}
training: {{max_steps: 3, per_device_train_batch_size: 4, save_steps: 3, use_cpu: true}}
score_test: false
output: runs
"""


def test_ray_train_on_two_local_workers(tiny_llama, reviews, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_llama, reviews=reviews))
    command = [sys.executable, TRAIN, "recipe.yaml", "training.max_steps=2", "--workers=2", "--cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "local"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "runs" / "seed-0" / "metrics.json").read_text())
    assert (metrics["training"]["steps"], metrics["training"]["processes"]) == (2, 2)


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # or a token that another cluster left in the home folder counts
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    # Its daemons keep the streams they are given open.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 90, "env": environment}
    subprocess.run([RAY, "start", *options], check=True, **quiet)
    yield f"127.0.0.1:{port}"
    subprocess.run([RAY, "stop", "--force"], **quiet)


def compare(recipe_file, output, *more):
    base = [sys.executable, "-m", "lora_ggpo.cli", "compare", str(recipe_file), *OVERRIDES, "training.max_steps=2"]
    options = ["--methods", "lora,ggpo", "--seeds", "1", "--trials", "1", "--output", str(output), *more]
    return subprocess.run([*base, *options], capture_output=True, text=True)


def test_a_cluster_gives_the_results_of_this_machine(cluster, recipe_file, tmp_path):
    there = compare(recipe_file, tmp_path / "there", "--ray", cluster)
    assert there.returncode == 0, there.stderr
    here = compare(recipe_file, tmp_path / "here")
    assert here.returncode == 0, here.stderr
    scores = [
        [json.loads(line)["evaluation"] for line in (tmp_path / place / "runs.jsonl").read_text().splitlines()]
        for place in ("there", "here")
    ]
    assert len(scores[0]) == 2
    for one, other in zip(*scores, strict=True):
        assert one["test"]["log_loss"]["value"] == pytest.approx(other["test"]["log_loss"]["value"], rel=1e-3)


def test_a_cluster_that_does_not_answer(recipe_file, tmp_path):
    found = compare(recipe_file, tmp_path / "out", "--ray", "127.0.0.1:1")
    assert found.returncode == 2
    assert "does not answer" in found.stderr
    assert "Traceback" not in found.stderr
