"""A run on a Ray cluster whose nodes share a file system: one worker for each GPU.

    python recipes/launch/ray_train.py my-recipe.yaml --workers 8 [key=value ...]

Needs pip install 'lora-ggpo[ray]' and 'ray[train]'. Give --address for a running cluster; a worker that is lost brings
all back from the last checkpoint.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def work(config: dict[str, Any]) -> None:
    """What each worker does; Ray has set RANK and WORLD_SIZE, and joined the workers."""
    os.chdir(config["folder"])
    from lora_ggpo.recipe.recipe import load_recipe
    from lora_ggpo.training.run import train

    train(load_recipe(Path(config["recipe"]), config["overrides"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--cpu", action="store_true", help="no GPUs: one core a worker")
    parser.add_argument("--address", help="of a running cluster; without it Ray starts here")
    args = parser.parse_args()
    ray.init(address=args.address)
    TorchTrainer(
        work,
        train_loop_config={"folder": os.getcwd(), "recipe": args.recipe, "overrides": args.overrides},
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=not args.cpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    main()
