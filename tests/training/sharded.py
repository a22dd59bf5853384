"""Runs whose processes share the model out, as `tests.training.test_sharding` has them."""

import gc
import os
import shutil
import socket
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.training.run import train
from lora_ggpo.training.scorer import Scorer
from lora_ggpo.workspace.progress import Reporter
from lora_ggpo.workspace.ranks import wait_for_all
from tests import processes
from tests.recipes import recipe_text

STEPS, BATCH, MICRO_BATCHES, WORLD = 4, 2, 2, 2


class Job(NamedTuple):
    """A run: its recipe, and if it goes on from a copy of another run, that one and what is left of it.

    Left is its checkpoint of a step (a number), all its checkpoints ("trained") or its adapter too ("saved").
    """

    text: str
    source: Path | None = None
    left: int | str = ""


def write_recipe(model, data, output, micro_batches=MICRO_BATCHES, training=(), **changes):
    """Steps of GGPO, each of WORLD x MICRO_BATCHES micro-batches in all, as YAML."""
    fields = {
        "task": {"max_length": 48},
        "adapter": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": False},
        "ggpo": {"sigma": 0.1, "rule": "relative", "beta": 0.5},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": micro_batches,
            "save_steps": 2,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.3,
            **dict(training),
        },
        "forgetting": {"rows": 3, "max_length": 24},
        "validate_every": 2,
        "stop_loss": 0.01,
        "keep": "best",
    }
    return recipe_text(model, data, output, **{**fields, **changes})


def start(world, jobs):
    """Carry out `jobs` by `world` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(run_process, (world, port, jobs), world)


def run_process(rank, world, port, jobs):
    """One of the processes of `jobs`; it notes what part of the frozen weights it held as it scored the first set."""
    torch.set_num_threads(1)
    gc.freeze()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    held = watch()
    try:
        for job in jobs:
            recipe = parse_recipe(job.text, "r.yaml")
            if job.source and rank == 0:
                cut_off(shutil.copytree(job.source, Path(recipe.output) / "seed-0"), job.left)
            wait_for_all()
            for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
                os.environ.pop(name, None)  # accelerate leaves them set
            unset_hf_deepspeed_config()  # or the next model would be loaded in pieces, too
            held.clear()
            train(recipe, Reporter(quiet=True))
            torch.save(held, f"{recipe.output}/held-{rank}.pt")
            wait_for_all()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the others wait for this process, and it would wait for them
    os._exit(0)  # the libraries' threads do not always end well


def watch():
    """A list that gets, at each scoring of a set, the part of the frozen weights that this process holds."""
    held, quick = [], Scorer.quick

    def watched(scorer, encoded, **how):
        result = quick(scorer, encoded, **how)
        held.append(part(scorer._model))
        return result

    Scorer.quick = watched
    return held


def part(model: nn.Module) -> float:
    blocks = [p for name, p in model.named_parameters() if "layers" in name]
    frozen = [p for p in blocks if not p.requires_grad] or blocks
    return sum(map(pieces, frozen)) / sum(getattr(p, "ds_numel", p.numel()) for p in frozen)


def pieces(parameter):
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return parameter.numel() or parameter.ds_tensor.numel()


def cut_off(run, left):
    """`run` as if it had been killed when there was this of it."""
    (run / "metrics.json").unlink()
    if left != "saved":
        shutil.rmtree(run / "adapter")
    for checkpoint in (run / "checkpoints").iterdir():
        if isinstance(left, int) and int(checkpoint.name.rpartition("-")[2]) > left:
            shutil.rmtree(checkpoint)
    return run
