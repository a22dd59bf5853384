"""The launch recipes: the batch script runs against stand-ins; tests/comparison/test_ray.py runs the one for Ray."""

import os
import subprocess
from pathlib import Path

LAUNCH = Path(__file__).parents[1] / "recipes" / "launch"


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
