"""Supervised fine-tuning by `lora-ggpo train`, TRL's SFTTrainer and LLaMA-Factory: real tokens a second, peak memory.

    python benchmarks/sft_throughput.py train.jsonl --rounds 4 --output docs/results/sft_throughput.json

Each way trains SmolLM2-135M with LoRA (r = 16, all linear layers) in float32 on the same rows of a JSONL file (prompt
and completion), 8 rows a step, at most 256 tokens a row, with a loss on the completions. The rest is what it comes
with. The ways take turns, each round in a fresh process; its first step warms up, and the others are timed together.
Tokens are counted without padding. Peak memory is that of the process from the first step on, with malloc told to give
freed blocks back to the system. With OMP_NUM_THREADS=1 times are of the process, which other work does not lengthen;
then --at-once lets several ways run beside one another.

LLaMA-Factory needs older releases of its libraries: --llamafactory names a folder that holds them. Its torchaudio may
be an empty module there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

BATCH, TOKENS, RATE = 8, 256, 2e-4
PACKED = 6  # rows of packed examples with about as many tokens as BATCH rows of GSM8K
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "learning_rate": RATE,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "include_num_input_tokens_seen": "non_padding",
}
GGPO = {"sigma": 0.03, "rule": "relative", "beta": 0.5}
Log = list[dict[str, Any]]
"""What is known behind each step: seconds and num_input_tokens_seen so far, and peak_memory_bytes."""


# --- the ways: each trains on a file in a folder of its own, and returns its log --------------------------------------


def ours(data: Path, folder: Path, steps: int, **settings: Any) -> Log:
    """By a recipe. The few rows that it scores in the end are no part of what is measured."""
    from lora_ggpo.recipe.recipe import parse_recipe
    from lora_ggpo.training.run import train
    from lora_ggpo.workspace.progress import Reporter

    owned = ("save_strategy", "report_to", "disable_tqdm", "bf16")
    recipe = {
        "model": "smollm2",
        "task": {"kind": "sft", "max_length": TOKENS},
        "data": {"source": str(data), "validation_fraction": 0.01, "test_fraction": 0.01},
        "adapter": LORA,
        "training": {name: value for name, value in TRAINING.items() if name not in owned} | {"max_steps": steps},
        "precision": "fp32",
        "score_test": False,
        "output": str(folder),
        **settings,
    }
    run = train(parse_recipe(json.dumps(recipe), "recipe.yaml"), Reporter(quiet=True))[0]
    return [row for row in run.log if "loss" in row]


def trl(data: Path, folder: Path, steps: int, **settings: Any) -> Log:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from lora_ggpo.models.load import load_model

    model, tokenizer = load_model("smollm2")
    clock = make_clock()
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=str(folder), max_steps=steps, max_length=TOKENS, **{**TRAINING, **settings}),
        train_dataset=Dataset.from_list([json.loads(line) for line in data.read_text().splitlines()]),
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    trainer.train()
    return clock.log


def llama_factory(data: Path, folder: Path, steps: int) -> Log:
    from llamafactory.train.tuner import run_exp

    from lora_ggpo.models.load import load_model

    model, clock = folder.parent / "model", make_clock()
    for part in load_model("smollm2"):
        part.save_pretrained(model)
    columns = {"prompt": "prompt", "response": "completion"}
    info = {"rows": {"file_name": str(data), "columns": columns}}
    (folder.parent / "dataset_info.json").write_text(json.dumps(info))
    settings = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(model),
        "finetuning_type": "lora",
        "lora_rank": LORA["r"],
        "lora_alpha": LORA["lora_alpha"],
        "lora_target": "all",
        "dataset": "rows",
        "dataset_dir": str(folder.parent),
        "template": "empty",
        "cutoff_len": TOKENS,
        "output_dir": str(folder),
        "max_steps": steps,
    }
    run_exp({**settings, **TRAINING}, callbacks=[clock])
    return clock.log


def make_clock() -> Any:
    """A callback that keeps time as ours does."""
    from transformers import TrainerCallback

    from lora_ggpo.training.memory import peak, reset_peak

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.log: Log = []
            self.seconds = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            reset_peak(args.device)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds += time.perf_counter() - self.began
            tokens = int(state.num_input_tokens_seen)
            memory = peak(args.device)
            self.log.append(
                {"seconds": self.seconds, "num_input_tokens_seen": tokens, "peak_memory_bytes": memory},
            )

    return Clock()


BASE, LLAMA_FACTORY = "TRL", "LLaMA-Factory"
WAYS: dict[str, Callable[[Path, Path, int], Log]] = {
    "TRL": trl,
    "TRL, no gradient checkpointing": lambda *where: trl(*where, gradient_checkpointing=False),
    "TRL, packing": lambda *where: trl(*where, packing=True, per_device_train_batch_size=PACKED),
    LLAMA_FACTORY: llama_factory,
    "lora-ggpo, LoRA": ours,
    "lora-ggpo, GGPO": lambda *where: ours(*where, ggpo=GGPO),
}


# --- rounds -----------------------------------------------------------------------------------------------------------


def in_process(way: str, data: Path, steps: int, llamafactory: Path | None) -> dict[str, float]:
    """One round of a way, in a fresh process."""
    command = [sys.executable, __file__, str(data), "--only", way, "--steps", str(steps)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    if way == LLAMA_FACTORY:
        paths = [str(llamafactory), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "DISABLE_VERSION_CHECK": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {way}: {result}", file=sys.stderr)
    return result


def measured(way: str, data: Path, steps: int) -> dict[str, float]:
    """Tokens a second of all steps but the first, and the peak of memory, of this process."""
    clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder, mock.patch("time.perf_counter", clock):
        first, *_, last = WAYS[way](data, Path(folder) / "run", steps)
    tokens, seconds = (last[name] - first[name] for name in ("num_input_tokens_seen", "seconds"))
    return {
        "tokens_per_second": tokens / seconds,
        "seconds_per_step": seconds / (steps - 1),
        "peak_mib": last["peak_memory_bytes"] / 2**20,
    }


def summary(rounds: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, float]:
    """Medians, and quartiles of the ratio to the base of the same round."""
    rates = [one["tokens_per_second"] for one in rounds]
    low, ratio, high = quartiles([rate / of["tokens_per_second"] for rate, of in zip(rates, base, strict=True)])
    slow, rate, fast = quartiles(rates)
    return {
        "tokens_per_second": rate,
        "tokens_per_second_q1": slow,
        "tokens_per_second_q3": fast,
        "ratio": ratio,
        "ratio_q1": low,
        "ratio_q3": high,
        "seconds_per_step": statistics.median(one["seconds_per_step"] for one in rounds),
        "peak_mib": statistics.median(one["peak_mib"] for one in rounds),
    }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high


def choose_rows(source: Path, target: Path, rows: int) -> None:
    """The first rows of a file, with each prompt on lines of its own."""
    chosen = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:rows]]
    lines = [json.dumps({"prompt": f"{row['prompt']}\n", "completion": row["completion"]}) for row in chosen]
    target.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a JSONL file of prompts and completions, such as GSM8K's train.jsonl")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5, help="of a round, the first of which warms up")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=1, help="ways")
    parser.add_argument("--ways", nargs="+", choices=[name for name in WAYS if name != BASE], help="default: all")
    parser.add_argument("--llamafactory", type=Path, help="a folder that holds LLaMA-Factory and what it needs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measured(args.only, args.data, args.steps)))
        return
    without = {BASE} if args.llamafactory else {BASE, LLAMA_FACTORY}
    ways = [BASE, *(args.ways or [name for name in WAYS if name not in without])]
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        choose_rows(args.data, data, args.rows)
        run = partial(in_process, data=data, steps=args.steps, llamafactory=args.llamafactory)
        for turn in range(args.rounds):
            print(f"round {turn + 1}/{args.rounds}", file=sys.stderr)
            with ThreadPoolExecutor(args.at_once) as pool:
                for way, of in zip(ways, pool.map(run, ways), strict=True):
                    rounds[way].append(of)
    result = {
        "command": shlex.join(["python", "benchmarks/sft_throughput.py", *sys.argv[1:]]),
        "hardware": f"{platform.machine()}, {os.environ.get('OMP_NUM_THREADS', os.cpu_count())} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl", "lora-ggpo")},
        "ways": {way: summary(of, rounds[BASE]) for way, of in rounds.items()},
    }
    print("\n| | tokens/s | quartiles | ratio | quartiles | s/step | peak MiB |\n|---|---|---|---|---|---|---|")
    for way, row in result["ways"].items():
        rates = f"{row['tokens_per_second_q1']:.0f} to {row['tokens_per_second_q3']:.0f}"
        ratios = f"{row['ratio_q1']:.2f} to {row['ratio_q3']:.2f}"
        end = f"{row['seconds_per_step']:.2f} | {row['peak_mib']:.0f}"
        print(f"| {way} | {row['tokens_per_second']:.0f} | {rates} | {row['ratio']:.2f} | {ratios} | {end} |")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
