"""What the contract tests share: what a trainer's runs must show, the docs' table of it, and the blocks of its page."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from safetensors.torch import load_file

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
NOISY = {"sigma": 0.3, "rule": "relative", "beta": 0.5}
STEPS = 2


def block(part):
    """The one block of code on the page that holds this text."""
    blocks = re.findall(r"^```\w+\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (found,) = [code for code in blocks if part in code]
    return found


def assert_documented(surface, package, *, steps, coverage, resumed, metrics):
    """The docs' table says of a surface what its test has just seen."""
    cells = [surface, f"{package} {version(package)}", steps, f"{coverage:.0%}", "yes" if resumed else "no", metrics]
    row = f"| {' | '.join(map(str, cells))} |"
    assert row in PAGE.read_text(encoding="utf-8").splitlines(), f"docs/{PAGE.name} must say: {row}"


def run(module, *arguments, folder, **environment):
    """`python -m module arguments` in a process of its own, which must succeed; returns what it said.

    `folder` may hold stand-ins, a folder that is searched for modules first.
    """
    path = f"{folder / 'stand-ins'}:{os.environ.get('PYTHONPATH', '')}"
    settings = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    ran = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
    return ran.stdout + ran.stderr


def assert_contract(train, surface, package):
    """Two steps of a trainer with noise, without, and resumed, are what the docs say.

    `train(name, ggpo, resume)` trains with these settings of GGPO (None: without it) from a checkpoint (None: from the
    beginning) and returns the folder of its checkpoints, one after each step.
    """
    plain, still, noisy = (train(*run, None) for run in (("plain", None), ("still", {"sigma": 0}), ("noisy", NOISY)))
    assert len(_losses(plain)) == STEPS
    assert _losses(still) == _losses(plain)
    assert _adapter(still) == _adapter(plain)
    assert all(one != other for one, other in zip(_losses(noisy), _losses(plain), strict=True))

    rows = _rows(noisy)
    assert [row["ggpo/relative_noise"] for row in rows] == pytest.approx([NOISY["sigma"]] * STEPS, rel=1e-2)
    assert all(row["ggpo/gradient_share"] > 0 for row in rows[1:])
    (coverage,) = {row["ggpo/coverage"] for row in rows}

    resumed = train("resumed", NOISY, noisy / "checkpoint-1")
    same = _losses(resumed) == _losses(noisy) and _adapter(resumed) == _adapter(noisy)
    seen = "TensorBoard" if {"train/ggpo/coverage", "train/ggpo/tau"} <= tags(noisy.parent) else "the log"
    assert_documented(surface, package, steps=STEPS, coverage=coverage, resumed=same, metrics=seen)


def _rows(folder):
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


def _losses(folder):
    return [row["loss"] for row in _rows(folder)]


def _adapter(folder):
    tensors = load_file(folder / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def tags(folder):
    """The names of all that TensorBoard's files below a folder hold."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = [EventAccumulator(str(path)).Reload() for path in folder.rglob("events.out.tfevents.*")]
    return {tag for file in files for tag in file.Tags()["scalars"]}
