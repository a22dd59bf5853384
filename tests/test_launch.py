"""The launch recipes: what can run here runs, on CPUs; the batch script's own commands are stood in for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "recipes" / "launch"

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
    pytest.importorskip("ray.train")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_llama, reviews=reviews))
    command = [sys.executable, LAUNCH / "ray_train.py", "recipe.yaml", "training.max_steps=2", "--workers=2", "--cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "runs" / "seed-0" / "metrics.json").read_text())
    assert (metrics["training"]["steps"], metrics["training"]["processes"]) == (2, 2)


def test_the_batch_script_starts_the_run_on_all_nodes(tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node-a\\nnode-b\\n'\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "41", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python3"}
    command = ["bash", LAUNCH / "slurm.sbatch", "my.yaml", "training.max_steps=5"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split("\n")
    assert {"--nnodes=2", "--nproc-per-node=4", "--rdzv-endpoint=node-a:20041"} <= set(told)
    assert told[-6:] == ["-m", "lora_ggpo.cli", "train", "my.yaml", "training.max_steps=5", ""]
