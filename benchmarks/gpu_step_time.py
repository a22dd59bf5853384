"""Time and memory of a training step on a GPU, on a Llama of 1.1 billion parameters with random weights.

    python benchmarks/gpu_step_time.py --shapes 8x1024 8x2048 --output docs/results/gpu_step_time.json

bf16 weights and autocast, LoRA (r = 16) on all linear layers, AdamW. As in step_time.py each round runs some steps of
every way in turn and is divided by its own plain steps, and the rivals get their noise sizes for nothing. Peak memory
is that of the allocator over these steps.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import step_time
import torch
from peft import LoraConfig, get_peft_model
from step_time import PLAIN, Bench, summary
from transformers import LlamaConfig, LlamaForCausalLM

WAYS = {
    PLAIN: step_time.plain,
    step_time.FUSED: step_time.fused,
    "GGPO, factored noise": step_time.ggpo(noise="factored"),
    "GGPO, dense noise": step_time.ggpo(noise="dense"),
    "sd-scripts (output noise)": step_time.sd_scripts,
    "Flat-LoRA (in place)": step_time.in_place,
    "SAM over A and B": step_time.sam,
}
STEPS = 3
"""Steps timed together: one alone would show the launches that a queue hides."""


class AutocastBench(Bench):
    """As the Trainer does with ``bf16=True``."""

    def backward(self) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()


def make_bench(batch: int, tokens: int) -> AutocastBench:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        use_cache=False,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return AutocastBench(get_peft_model(model, adapter).cuda().train(), tokens, batch, torch.device("cuda"))


def measure(bench: Bench, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a step, its ratio to plain steps of the same round, and peak memory, of each way."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    peaks: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, way in WAYS.items():
            with way(bench) as step:
                step()  # settles caches and, for GGPO, supplies the gradient norms
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                took = timed(step, STEPS)
                peaks[name] = torch.cuda.max_memory_allocated() / 2**20
                if turn:  # round 0 warms up
                    seconds[name].append(took)
    return {
        name: summary(times, seconds[PLAIN]) | {"peak_mib": peaks[name], "peak_ratio": peaks[name] / peaks[PLAIN]}
        for name, times in seconds.items()
    }


def timed(function: Callable[[], object], times: int) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(times):
        function()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1000 / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8x1024", "8x2048"], help="batch x tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result: dict[str, object] = {
        "command": shlex.join(["python", "benchmarks/gpu_step_time.py", *sys.argv[1:]]),
        "hardware": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton", "transformers", "peft", "lora-ggpo")},
    }
    for shape in args.shapes:
        bench = make_bench(*map(int, shape.split("x")))
        result[shape] = rows = measure(bench, args.rounds)
        del bench
        torch.cuda.empty_cache()
        print(f"\n| {shape} tokens | ms/step | ratio | quartiles | peak MiB | peak ratio |\n|---|---|---|---|---|---|")
        for name, row in rows.items():
            quartiles = f"{row['ratio_q1']:.3f} to {row['ratio_q3']:.3f}"
            memory = f"{row['peak_mib']:.0f} | {row['peak_ratio']:.4f}"
            print(f"| {name} | {1000 * row['seconds']:.1f} | {row['ratio']:.3f} | {quartiles} | {memory} |", flush=True)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
