"""Time and memory of a training step: LoRA-GGPO and the public ways to perturb, as ratios to plain LoRA.

    python benchmarks/step_time.py --tokens 64 256 --rounds 9 --output docs/results/step_time.json

One process holds one SmolLM2-135M with LoRA on all linear layers (r = 8, AdamW, 8 sequences a batch). Each round runs
one step of every way in turn and divides its time by that round's plain step, so a machine that slows down slows all.
On one thread of a CPU the time is that of the process, which other work on the machine does not lengthen.
The rivals get their noise sizes for nothing: only the perturbation itself is timed, so their ratios are lower bounds.
Peak memory is taken of a fresh process for each way, since what one way leaves behind would count for the next.
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
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from lora_ggpo import GGPO, GGPOConfig
from lora_ggpo.models import load_model
from lora_ggpo.models.adapters import add_adapter
from lora_ggpo.models.architecture import CAUSAL
from lora_ggpo.models.quantise import Quantisation
from lora_ggpo.perturbation.fuse import fuse_lora
from lora_ggpo.perturbation.noise import NOISES
from lora_ggpo.training.memory import peak, reset_peak

Step = Callable[[], None]
PLAIN = "plain LoRA"
FUSED = "fused LoRA without noise"
SIGMA = 0.03
RHO = 0.05


class Bench:
    """The model, optimizer and batch that all ways share."""

    def __init__(self, model: nn.Module, tokens: int, batch: int, device: torch.device) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=device)
        self.loras = [module for module in model.modules() if isinstance(module, LoraLinear)]

    def backward(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def taus(self) -> list[Tensor]:
        """Noise size of each row, (m, 1) a layer."""
        weights = [module.base_layer.weight for module in self.loras]
        return [SIGMA * w.norm(dim=1, keepdim=True) / w.shape[1] ** 0.5 for w in weights]


@contextmanager
def plain(bench: Bench) -> Iterator[Step]:
    def step() -> None:
        bench.backward()
        bench.update()

    yield step


@contextmanager
def fused(bench: Bench) -> Iterator[Step]:
    detach = fuse_lora(bench.model)
    with plain(bench) as step:
        yield step
    detach()


def ggpo(**settings: object) -> Callable[[Bench], contextmanager]:
    @contextmanager
    def way(bench: Bench) -> Iterator[Step]:
        perturbation = GGPO(bench.model, GGPOConfig(sigma=SIGMA, rule="relative", beta=0.5, **settings))

        def step() -> None:
            bench.backward()
            bench.optimizer.step()
            perturbation.step()
            bench.optimizer.zero_grad()

        yield step
        perturbation.detach()

    return way


@contextmanager
def sd_scripts(bench: Bench) -> Iterator[Step]:
    """x eps^T added to the output under no_grad: one more m x n product, one m x n tensor, no gradient through eps."""

    def hook(tau: Tensor) -> Callable[..., Tensor]:
        def add_noise(module: LoraLinear, args: tuple[Tensor], output: Tensor) -> Tensor:
            with torch.no_grad():
                noise = args[0] @ torch.randn_like(module.base_layer.weight).mul_(tau).t()
            return output + noise

        return add_noise

    handles = [m.register_forward_hook(hook(tau)) for m, tau in zip(bench.loras, bench.taus(), strict=True)]
    with plain(bench) as step:
        yield step
    for handle in handles:
        handle.remove()


@contextmanager
def in_place(bench: Bench) -> Iterator[Step]:
    """Flat-LoRA's reference: noise added to W0 before the forward pass, made again and subtracted after backward."""
    taus = bench.taus()

    @torch.no_grad()
    def shift(sign: float) -> None:
        torch.manual_seed(0)
        for module, tau in zip(bench.loras, taus, strict=True):
            module.base_layer.weight.addcmul_(torch.randn_like(module.base_layer.weight), tau, value=sign)

    def step() -> None:
        shift(1.0)
        bench.backward()
        shift(-1.0)
        bench.update()

    yield step


@contextmanager
def sam(bench: Bench) -> Iterator[Step]:
    """SAM over A and B: a second forward and backward at the worst point of radius rho."""

    def step() -> None:
        bench.backward()
        gradients = [p.grad for p in bench.parameters]
        scale = RHO / torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).clamp_min(1e-12)
        ascent = [scale * g for g in gradients]
        bench.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_add_(bench.parameters, ascent)
        bench.backward()
        with torch.no_grad():
            torch._foreach_sub_(bench.parameters, ascent)
        bench.update()

    yield step


WAYS: dict[str, Callable[[Bench], contextmanager]] = {
    PLAIN: plain,
    FUSED: fused,
    **{f"GGPO, {kind} noise": ggpo(noise=kind) for kind in NOISES},
    "GGPO, factored noise, sketched gradient": ggpo(gradient="sketch"),
    "sd-scripts (output noise)": sd_scripts,
    "Flat-LoRA (in place)": in_place,
    "SAM over A and B": sam,
}


def measure(bench: Bench, rounds: int, ways: list[str]) -> dict[str, dict[str, float]]:
    """Seconds of a step of each way, and its ratio to the plain step of the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if alone else time.perf_counter
    for turn in range(rounds + 1):
        for name in ways:
            with WAYS[name](bench) as step:
                step()  # settles caches and, for GGPO, supplies the gradient norms
                began = clock()
                step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if turn:  # round 0 warms up
                    seconds[name].append(clock() - began)
        print(f"  round {turn}/{rounds}", file=sys.stderr)
    return {name: summary(times, seconds[PLAIN]) for name, times in seconds.items()}


def summary(times: list[float], plain: list[float]) -> dict[str, float]:
    """Median seconds of a way, and the median and quartiles of its ratio to the plain steps of the same rounds."""
    low, ratio, high = statistics.quantiles([t / base for t, base in zip(times, plain, strict=True)], n=4)
    return {"seconds": statistics.median(times), "ratio": ratio, "ratio_q1": low, "ratio_q3": high}


def own_peak(bench: Bench, way: str) -> float:
    """Peak memory of a step of `way` in MiB, in this process."""
    peaks = []
    with WAYS[way](bench) as step:
        for _ in range(4):
            reset_peak(bench.ids.device)
            step()
            peaks.append((peak(bench.ids.device) or 0) / 2**20)
    return statistics.median(peaks[1:])  # the first step has no gradient norms and no optimizer state


def peak_elsewhere(way: str, tokens: int, batch: int, base: str) -> float:
    """`own_peak` in a fresh process whose freed blocks go back to the system, so that its peak is what it uses."""
    shape = ["--tokens", str(tokens), "--batch", str(batch), "--base", base]
    command = [sys.executable, __file__, "--peak-of", way, *shape]
    done = subprocess.run(command, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}, stdout=subprocess.PIPE)
    done.check_returncode()
    return float(done.stdout)


def make_bench(tokens: int, batch: int, device: torch.device, base: str) -> Bench:
    torch.manual_seed(0)
    kept = None if base == "float32" else Quantisation(base, torch.float32, device)
    model, _ = load_model("smollm2", quantisation=kept)
    model = add_adapter(model, {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}, CAUSAL)
    return Bench(model.to(device).train(), tokens, batch, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--base", choices=["float32", "nf4", "int8"], default="float32", help="how W0 is kept")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ways", nargs="+", choices=[name for name in WAYS if name != PLAIN], help="default: all")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak-of", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.peak_of:
        print(own_peak(make_bench(args.tokens[0], args.batch, device, args.base), args.peak_of))
        return
    result: dict[str, object] = {
        "command": shlex.join(["python", "benchmarks/step_time.py", *sys.argv[1:]]),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {device.type}",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "lora-ggpo")},
    }
    ways = [PLAIN, *(args.ways or [name for name in WAYS if name != PLAIN])]
    for tokens in args.tokens:
        shape = f"{args.batch} x {tokens} tokens" + ("" if args.base == "float32" else f", {args.base}")
        print(shape, file=sys.stderr)
        peaks = {name: peak_elsewhere(name, tokens, args.batch, args.base) for name in ways}
        rows = measure(make_bench(tokens, args.batch, device, args.base), args.rounds, ways)
        for name, mib in peaks.items():
            rows[name] |= {"peak_mib": mib, "peak_ratio": mib / peaks[PLAIN]}
        result[shape] = rows
        print(f"\n| {shape} | s/step | ratio | quartiles | peak MiB | peak ratio |\n|---|---|---|---|---|---|")
        for name, row in rows.items():
            quartiles = f"{row['ratio_q1']:.3f} to {row['ratio_q3']:.3f}"
            memory = f"{row['peak_mib']:.0f} | {row['peak_ratio']:.3f}"
            print(f"| {name} | {row['seconds']:.2f} | {row['ratio']:.3f} | {quartiles} | {memory} |")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
