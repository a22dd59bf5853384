"""The settings of the method, validated and serialisable."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .noise import NOISES
from .scales import ESTIMATORS, RAMPS, RULES

CHOICES: Mapping[str, Collection[str]] = {
    "rule": RULES,
    "noise": NOISES,
    "schedule": RAMPS,
    "redraw": ("micro-batch", "optimizer-step"),
    "ranks": ("differ", "agree"),
    "gradient": ESTIMATORS,
}
"""What the fields that are a choice may be."""

OLD_NOISES = {"auto": "factored", "table": "dense", "gaussian": "dense", "rademacher": "dense"}
"""Noises of release 0.1.0, and what they are now."""


@dataclass(frozen=True)
class GGPOConfig:
    """How large the perturbation of each row is, what it is drawn from, and when.

    The defaults are the paper's (arXiv 2502.14538v1): sigma = 0.03, beta = 0.01, one draw a forward pass.

    Attributes:
        sigma: Noise size relative to the weight, >= 0; 0 is plain LoRA, bit for bit.
        beta: Weight of the gradient term: >= 0, and at most 1 for ``rule="relative"``. 0 gives Flat-LoRA's noise
            (arXiv 2409.14396; it also ramps sigma with ``schedule="cosine"``).
        rule: How row norms become noise sizes: ``"paper"``, ``"relative"`` or ``"sd-scripts"``, functions of
            :mod:`~lora_ggpo.perturbation.scales`.
        noise: The joint law of the rows: ``"factored"``, or ``"dense"`` as in the paper; see
            :mod:`~lora_ggpo.perturbation.noise`. Each row has the same law with both. Names of release 0.1.0 are
            taken for what comes closest (``OLD_NOISES``).
        noise_rank: k of factored noise, >= 1: its cost is that of a LoRA adapter of this rank.
        schedule: ``"constant"``, or a ramp of sigma from 0 to its full size over the run: ``"cosine"`` is
            (1 - cos(pi t / T)) / 2, ``"linear"`` is t / T, with t the optimizer step and T the number of them.
        redraw: New noise for each forward pass (``"micro-batch"``) or one draw for all micro-batches of an
            optimizer step (``"optimizer-step"``).
        ranks: Whether the processes of a distributed run draw noise of their own (``"differ"``: two processes with a
            micro-batch each are one process with two) or all the same (``"agree"``); processes that share one batch,
            as in tensor parallelism, must agree.
        seed: Seed of the noise; the noise is a function of (seed, draw, layer) alone and never touches torch's
            global generators.
        gradient: Estimator of the gradient's row norms, ``"lstsq"``, ``"sketch"`` or the published ``"lora"``: see
            :mod:`~lora_ggpo.perturbation.scales`. Layers without LoRA's A and B have ``"sketch"`` whatever this says.
        rise: Hold the noise at the size that raises the training loss by this share, such as 0.05, whatever sigma means
            in the model: sigma is where it begins, and is steered from there (:mod:`~lora_ggpo.perturbation.rise`);
            ``schedule`` ramps what has been steered. None leaves sigma as it is.
        ema: Decay of the moving average of squared gradient row norms over optimizer steps, in [0, 1); 0 uses the
            step before alone.
        strict: Raise, instead of warn, if the adapter has layers that cannot be perturbed.

    Raises:
        ValueError: a field is outside its range; the message names the field and its range.
    """

    sigma: float = 0.03
    beta: float = 0.01
    rule: str = "paper"
    noise: str = "factored"
    noise_rank: int = 8
    schedule: str = "constant"
    redraw: str = "micro-batch"
    ranks: str = "differ"
    seed: int = 0
    gradient: str = "lora"
    ema: float = 0.0
    strict: bool = False
    rise: float | None = None

    def __post_init__(self) -> None:
        if self.noise in OLD_NOISES:
            object.__setattr__(self, "noise", OLD_NOISES[self.noise])
        for name, choices in CHOICES.items():
            self._require(name, getattr(self, name) in tuple(choices), f"one of {', '.join(choices)}")
        for name in ("sigma", "beta"):
            self._require(name, _is_number(getattr(self, name)), "a finite number >= 0")
        if RULES[self.rule].shares:
            self._require("beta", self.beta <= 1, f'in [0, 1] with rule="{self.rule}"')
        self._require("noise_rank", type(self.noise_rank) is int and self.noise_rank >= 1, "an integer >= 1")
        if self.rise is not None:
            self._require("rise", _is_number(self.rise) and self.rise > 0, "a finite number > 0, or None")
            self._require("sigma", self.sigma > 0, "> 0 with rise, which begins there")
        self._require("ema", _is_number(self.ema) and self.ema < 1, "in [0, 1)")
        self._require("seed", type(self.seed) is int and self.seed >= 0, "an integer >= 0")
        self._require("strict", type(self.strict) is bool, "true or false")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"GGPOConfig.{name} must be {expected}, not {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GGPOConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a key is no field of the configuration, or a value is outside its range.
        """
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                raise ValueError(f"GGPOConfig has no field {key!r}; its fields are {', '.join(names)}")
        return cls(**values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
