"""Time of a training step of sd-scripts' LoRA layers: with its own GGPO, with this package's, and with neither.

    SD_SCRIPTS=FOLDER python benchmarks/sd_scripts_cost.py --output docs/results/sd_scripts_cost.json

Each way has a stack of layers of its own with sd-scripts' LoRAModule (r = 16) and takes a step in turn; the order turns
from round to round. A step is forward, backward, what the network does once an optimizer step, and SGD. Time is the
process's CPU time, and ratios are of one round. Two ways are the same, plain LoRA: their ratio says what can be told.
sd-scripts' own GGPO fails on convolutions, so it is measured on linear layers alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_ggpo.integrations import kohya

WAYS = ("plain", "plain again", "sd-scripts' own", "factored", "dense")
KINDS = ("linear", "convolution")


def sd_scripts(folder: str) -> Any:
    """sd-scripts' module for FLUX; what it imports and does not use here is made up."""
    from unittest.mock import MagicMock

    sys.path.insert(0, folder)
    assert importlib.import_module("diffusers").AutoencoderKL  # asks for torchvision before one is made up
    for name in ("cv2", "torchvision"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = MagicMock()
    return importlib.import_module("networks.lora_flux")


def stack(kind: str, width: int) -> tuple[nn.Sequential, Tensor]:
    """Four layers with a nonlinearity behind each, and an input."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(width, width) if kind == "linear" else nn.Conv2d(width, width, 3, padding=1), nn.Tanh()]
    x = torch.randn(1, 512, width) if kind == "linear" else torch.randn(1, width, 16, 16)
    return nn.Sequential(*layers).requires_grad_(False), x


class Network(nn.Module):
    """What a network of sd-scripts holds, as far as its training loop is concerned here."""

    def __init__(self, loras: list[Any]) -> None:
        super().__init__()
        self.text_encoder_loras: list[Any] = []
        self.unet_loras = loras
        for lora in loras:
            lora.apply_to()
            self.add_module(lora.lora_name, lora)


def step_of(way: str, kind: str, width: int, module: Any) -> Callable[[], None]:
    """A function that takes one optimizer step."""
    model, x = stack(kind, width)
    own = {"ggpo_sigma": 0.03, "ggpo_beta": 0.01} if way == "sd-scripts' own" else {}
    layers = [(f"layer{name}", one) for name, one in model.named_children() if not isinstance(one, nn.Tanh)]
    network: Any = Network([module.LoRAModule(name, one, 1.0, 16, 16, **own) for name, one in layers])
    noisy = way in ("factored", "dense")
    if noisy:
        settings, _ = kohya._settings({"ggpo_sigma": "0.03", "ggpo_noise": way, "ggpo_rule": "sd-scripts"})
        kohya._with_noise(network, settings)
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    network.train()

    def step() -> None:
        if noisy:
            network.on_step_start([], model)
        model(x.requires_grad_()).square().mean().backward()
        if own:
            for lora in network.unet_loras:
                lora.update_grad_norms()
                lora.update_norms()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(kind: str, width: int, rounds: int, module: Any) -> dict[str, Any]:
    ways = [way for way in WAYS if not (kind == "convolution" and way == "sd-scripts' own")]
    steps = {way: step_of(way, kind, width, module) for way in ways}
    for _ in range(3):
        for step in steps.values():
            step()
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        turned = ways[number % len(ways) :] + ways[: number % len(ways)]
        for way in turned:
            begin = time.process_time()
            steps[way]()
            times[way].append(time.process_time() - begin)
    ratios = {way: [own / plain for own, plain in zip(times[way], times["plain"], strict=True)] for way in ways}
    return {
        way: {
            "milliseconds": 1000 * statistics.median(times[way]),
            "ratio": statistics.median(ratios[way]),
            "quartiles": statistics.quantiles(ratios[way], n=4)[::2],
        }
        for way in ways
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs=2, default=[1024, 128], help="of linear layers and convolutions")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    module = sd_scripts(os.environ["SD_SCRIPTS"])
    results = {kind: measure(kind, width, args.rounds, module) for kind, width in zip(KINDS, args.widths, strict=True)}
    about = {"widths": args.widths, "rounds": args.rounds, "torch": torch.__version__, "machine": platform.machine()}
    args.output.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    for kind, rows in results.items():
        for way, row in rows.items():
            print(f"{kind:12} {way:16} {row['milliseconds']:8.1f} ms  {row['ratio']:.3f}  {row['quartiles']}")


if __name__ == "__main__":
    main()
