"""Time of a compiled training step: LoRA-GGPO as a ratio to plain LoRA, both by torch.compile.

    python benchmarks/compile_time.py --model llama --tokens 64 --rounds 15 --output docs/results/compile_time.json

One process holds copies of a model with LoRA on all linear layers (r = 8, AdamW, 8 sequences a batch, 16 of a model
with a head), compiled by inductor with ``fullgraph=True`` or, as ``... eager``, not compiled. Each round runs some
steps of each in turn and divides their time by that of the first in that round. Beside wall time stands the process's
CPU time, which counts nothing of what else the machine does. Graphs, graph breaks and recompilations are counted over
the whole run; the CPU time of the first steps, less that of as many later ones, is the compiler's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from lora_ggpo import GGPO, GGPOConfig
from lora_ggpo.models.architecture import HEADED, label_head
from lora_ggpo.models.load import load_model
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

EAGER = " eager"
WAYS = tuple(f"{way}{how}" for way in ("plain LoRA", "GGPO", "fused LoRA") for how in ("", EAGER))
FIRST = 2
"""Steps before anything is timed."""


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "minilm":
        base, _ = load_model(name, HEADED, label_head(["negative", "positive"]))
        return get_peft_model(base, LoraConfig("SEQ_CLS", r=8, target_modules="all-linear")).train()
    if name == "smollm2":
        base, _ = load_model(name)
    else:
        config = LLAMA if name == "llama" else AutoConfig.from_pretrained(name)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base.config.use_cache = False
    return get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)).train()


def batch(model: nn.Module, name: str, tokens: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (16 if name == "minilm" else 8, tokens), generator=random)
    labels = torch.arange(len(ids)) % 2 if name == "minilm" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step_of(way: str, name: str, tokens: int) -> Callable[[], None]:
    """A function that takes one optimizer step."""
    model = build(name)
    inputs = batch(model, name, tokens)
    ggpo = GGPO(model, GGPOConfig(sigma=0.03)) if way.startswith("GGPO") else None
    if way.startswith("fused LoRA"):
        fuse_lora(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    called = model if way.endswith(EAGER) else torch.compile(model, fullgraph=True)

    def step() -> None:
        called(**inputs).loss.backward()
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
    steps, first = {}, {}
    for way in arguments.ways:
        steps[way] = step_of(way, arguments.model, arguments.tokens)
        begin = sum(os.times()[:4])  # with the C++ compiler's
        seconds(steps[way], FIRST)
        first[way] = sum(os.times()[:4]) - begin
        print(f"{way}: ready after {first[way]:.0f} s", flush=True)
    graphs = {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in steps}
    for number in range(arguments.rounds):
        order = list(steps) if number % 2 else list(steps)[::-1]
        for way in order:
            times[way].append(seconds(steps[way], arguments.steps))
    graphs["recompilations"] = counters["stats"]["unique_graphs"] - graphs["graphs"]
    rows = {}
    for way, pairs in times.items():
        rows[way] = {"compiling": first[way] - FIRST * statistics.median(cpu for _, cpu in pairs)}
        for index, clock in enumerate(("wall", "cpu")):
            own = [pair[index] for pair in pairs]
            ratios = [mine / plain[index] for mine, plain in zip(own, times[arguments.ways[0]], strict=True)]
            rows[way][clock] = {"seconds": summary(own), "ratio": summary(ratios)}
    return {"graphs": graphs, "ways": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama", help='"llama", or a model whose shapes to take, such as smollm2')
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=["plain LoRA", "GGPO"], help="ratios are to the first"
    )
    parser.add_argument("--tokens", type=int, default=64, help="of a sequence")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="of a way in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch._inductor.config.compile_threads = 1  # processes of its own, whose time nobody would count
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
