"""What measuring sharpness costs, by the size of the model: seconds and peak memory of what it is made of.

    python benchmarks/sharpness_cost.py --output docs/results/sharpness_cost.json

MiniLM (22.7 M parameters) and SmolLM2 (135 M), each with the LoRA of its recipe for movie reviews, in the space of
W0 + s B A, on one batch of 32 reviews: the loss (a forward pass), its gradient, and a product with the Hessian.
Peak memory is that of a process of its own for each.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lora_ggpo.sharpness.point import Point, load_point
from lora_ggpo.training.memory import peak, reset_peak
from lora_ggpo.training.recipe import load_recipe
from lora_ggpo.training.run import train
from lora_ggpo.workspace.libraries import versions
from lora_ggpo.workspace.progress import Reporter

RECIPES = {"MiniLM": "movie-reviews-lora.yaml", "SmolLM2-135M": "smollm2-movie-reviews.yaml"}
PARTS = ("loss", "gradient", "Hessian product")
ROWS = 32


def part(point: Point, name: str) -> Callable[[], object]:
    """The computation of that name."""
    if name == "Hessian product":
        vector = point.signs(torch.Generator().manual_seed(0))
        return lambda: point.hessian_product(vector)
    compute = point.loss if name == "loss" else point.gradient
    return lambda: compute(point.parameters)


def measure(run: Path, name: str, rounds: int) -> dict[str, float]:
    """Median seconds, and peak memory in MiB of this process."""
    point = load_point(run, "weights", "train", ROWS)
    compute, seconds = part(point, name), []
    reset_peak(torch.device("cpu"))
    for _ in range(rounds + 1):
        began = time.perf_counter()
        compute()
        seconds.append(time.perf_counter() - began)
    found = {"seconds": statistics.median(seconds[1:]), "peak_mib": (peak(torch.device("cpu")) or 0) / 2**20}
    return {**found, "tokens": sum(batch["input_ids"].numel() for batch in point.batches), "coordinates": point.size}


def measure_elsewhere(run: Path, name: str, rounds: int) -> dict[str, float]:
    """`measure` in a fresh process whose freed blocks go back to the system, so that its peak is what it uses."""
    command = [sys.executable, __file__, "--measure", str(run), name, "--rounds", str(rounds)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def trained(recipe: str, output: Path) -> Path:
    """A run of one step: what is measured does not depend on how good the model is."""
    overrides = [f"output={output}", "training.max_steps=1", "data.train_size=100", "data.out_of_domain=[]"]
    path = Path(__file__).parents[1] / "recipes" / recipe
    return train(load_recipe(path, [*overrides, "seeds=[0]", "score_test=false"]), Reporter(quiet=True))[0].folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1], args.rounds)))
        return
    result: dict[str, object] = {
        "command": shlex.join(["python", "benchmarks/sharpness_cost.py", *sys.argv[1:]]),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    print("| model | entries | tokens | computed | seconds | of a gradient's | peak MiB | of a gradient's |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for model, recipe in RECIPES.items():
            run = trained(recipe, Path(folder) / model)
            rows = {name: measure_elsewhere(run, name, args.rounds) for name in PARTS}
            for name, row in rows.items():
                ratios = [row[key] / rows["gradient"][key] for key in ("seconds", "peak_mib")]
                print(
                    f"| {model} | {row['coordinates'] / 1e6:.1f} M | {row['tokens']} | {name} | {row['seconds']:.2f} "
                    f"| {ratios[0]:.2f} | {row['peak_mib']:.0f} | {ratios[1]:.2f} |",
                    flush=True,
                )
            result[model] = rows
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
