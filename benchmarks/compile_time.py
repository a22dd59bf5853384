"""Time of a compiled training step: LoRA-GGPO as a ratio to plain LoRA, both by torch.compile.

    python benchmarks/compile_time.py --model llama --tokens 64 --rounds 15 --output docs/results/compile_time.json

One process holds two copies of a model with LoRA on all linear layers (r = 8, AdamW, 8 sequences a batch), both
compiled by inductor with ``fullgraph=True``, and one of them perturbed. Each round runs some steps of each in turn and
divides GGPO's time by plain LoRA's of that round. Beside wall time stands the process's CPU time, which counts nothing
of what else the machine does. Graphs, graph breaks and recompilations are counted over the whole run.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from lora_ggpo import GGPO, GGPOConfig
from lora_ggpo.perturbation.fuse import fuse_lora

LLAMA = LlamaConfig(
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=2,
    num_attention_heads=12,
    num_key_value_heads=12,
    vocab_size=4000,
)
"""About 20 million parameters."""

WAYS = ("plain LoRA", "GGPO", "fused LoRA")


def build(name: str) -> nn.Module:
    config = LLAMA if name == "llama" else AutoConfig.from_pretrained(name)
    config.use_cache = False
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)).train()


def step_of(way: str, name: str, tokens: int, compiles: bool) -> Callable[[], None]:
    """A function that takes one optimizer step."""
    model = build(name)
    ids = torch.randint(0, model.config.vocab_size, (8, tokens), generator=torch.Generator().manual_seed(1))
    ggpo = GGPO(model, GGPOConfig(sigma=0.03)) if way == "GGPO" else None
    if way == "fused LoRA":
        fuse_lora(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    called = torch.compile(model, fullgraph=True) if compiles else model

    def step() -> None:
        called(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if ggpo is not None:
            ggpo.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None], steps: int) -> tuple[float, float]:
    """Wall and CPU seconds a step."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    steps = {}
    for way in arguments.ways:
        begin = time.process_time()
        steps[way] = step_of(way, arguments.model, arguments.tokens, not arguments.eager)
        seconds(steps[way], 3)
        print(f"{way}: ready after {time.process_time() - begin:.0f} s", flush=True)
    graphs = {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in steps}
    for number in range(arguments.rounds):
        order = list(steps) if number % 2 else list(steps)[::-1]
        for way in order:
            times[way].append(seconds(steps[way], arguments.steps))
    graphs["recompilations"] = counters["stats"]["unique_graphs"] - graphs["graphs"]
    rows = {}
    for way, pairs in times.items():
        rows[way] = {}
        for index, clock in enumerate(("wall", "cpu")):
            own = [pair[index] for pair in pairs]
            ratios = [mine / plain[index] for mine, plain in zip(own, times[arguments.ways[0]], strict=True)]
            rows[way][clock] = {"seconds": summary(own), "ratio": summary(ratios)}
    return {"graphs": graphs, "ways": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama", help='"llama", or the name of a model whose shapes to take')
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS[:2], help="the first is what the others are to")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--tokens", type=int, default=64, help="of a sequence")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="of a way in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {
        "command": shlex.join(["python", "benchmarks/compile_time.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "machine": platform.machine(),
        **measure(arguments),
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        known = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
        arguments.output.write_text(json.dumps([*known, result], indent=2) + "\n")


if __name__ == "__main__":
    main()
