"""The methods that can be compared: each a row of recipe settings. To add one, add a row.

A method is what it sets in a recipe and nothing else, so whatever `lora-ggpo train` can run can be a row.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lora_ggpo.errors import UserError

V = TypeVar("V")


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: What ``--methods`` takes.
        title: What tables say.
        settings: Recipe settings by dotted key, on top of `PLAIN`.
        factors: What to multiply the recipe's own settings by, the usual factor first, then those to tune; a key
            joins by "+" what takes the same factor. Counts are rounded, and stay at least 1.
        learning_rate: Typical learning rate in units of the recipe's, which is meant for LoRA.
        tuned: Further settings to tune beside the learning rate, the usual value first.
        source: Where the method is described.
        plain: Whether it begins as `PLAIN`; otherwise as the recipe stands.
    """

    name: str
    title: str
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    factors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    learning_rate: float = 1.0
    tuned: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    plain: bool = True


PLAIN: Mapping[str, Any] = {
    "adapter.type": "lora",
    "adapter.use_dora": False,
    "adapter.use_rslora": False,
    "adapter.init_lora_weights": True,
    "adapter.layers_by_gradient": None,
    "adapter.sc_lora_beta": None,
    "adapter.monteclora_config": None,
    "ggpo": None,
    "sam": None,
    "mgpo": None,
    "bi_lora": None,
    "optimizer": None,
    "freeze_body": False,
}
"""What every method starts from: plain LoRA, whatever the recipe says of these settings."""

RECIPE = "recipe"
"""The name under which the recipe itself, with none of its settings changed, joins a comparison."""

_SIGMAS = {"ggpo.sigma": (0.1, 0.03, 0.3, 0.6)}
_RHOS = (0.05, 0.01, 0.2)
_RELATIVE = {"ggpo.rule": "relative", "ggpo.beta": 0.5, "ggpo.gradient": "lstsq", "ggpo.ema": 0.9}

METHODS: tuple[Method, ...] = (
    Method("lora", "LoRA", "2106.09685"),
    Method("full", "full fine-tuning", "", {"adapter": None}, learning_rate=0.05),
    Method("head", "head only", "", {"adapter": None, "freeze_body": True}, learning_rate=4.0),
    # Starting values and parametrisation
    Method("rslora", "rsLoRA", "2312.03732", {"adapter.use_rslora": True}, learning_rate=0.5),
    Method("dora", "DoRA", "2402.09353", {"adapter.use_dora": True}),
    Method("pissa", "PiSSA", "2404.02948", {"adapter.init_lora_weights": "pissa"}, learning_rate=0.5),
    Method("olora", "OLoRA", "2406.01775", {"adapter.init_lora_weights": "olora"}, learning_rate=0.5),
    Method("eva", "EVA", "2410.07170", {"adapter.init_lora_weights": "eva"}),
    Method("corda", "CorDA", "2406.05223", {"adapter.init_lora_weights": "corda"}, learning_rate=0.5),
    Method("lora-ga", "LoRA-GA", "2407.05000", {"adapter.init_lora_weights": "lora_ga"}, learning_rate=0.5),
    Method(
        "sc-lora",
        "SC-LoRA",
        "2505.23724",
        {"adapter.init_lora_weights": "sc_lora"},
        learning_rate=0.5,
        tuned={"adapter.sc_lora_beta": (0.8, 0.5, 0.9)},
    ),
    Method(
        "aletheia",
        "Aletheia",
        "2604.15351",
        {"adapter.layers_by_gradient": 0.5},
        tuned={"adapter.layers_by_gradient": (0.5, 0.25, 0.75)},
    ),
    Method("adalora", "AdaLoRA", "2303.10512", {"adapter.type": "adalora"}, learning_rate=2.0),
    Method(
        "monteclora",
        "MonteCLoRA",
        "2411.04358",
        {"adapter.monteclora_config.num_samples": 8},
        tuned={"adapter.monteclora_config.sample_scaler": (1e-4, 3e-4, 1e-3)},
    ),
    # Optimizers
    Method(
        "lora-plus",
        "LoRA+",
        "2402.12354",
        {"optimizer.kind": "lora-plus"},
        learning_rate=0.5,
        tuned={"optimizer.lr_ratio": (4.0, 16.0, 2.0)},
    ),
    Method("lora-fa", "LoRA-FA", "2308.03303", {"optimizer.kind": "lora-fa"}),
    Method(
        "ivon",
        "IVON",
        "2411.04421",
        {"optimizer.kind": "ivon"},
        learning_rate=600.0,  # 0.03 where LoRA has 5e-5: its steps are clipped at a thousandth of the rate
        tuned={"optimizer.ess": (1e7, 1e6, 1e8)},
    ),
    # Simple cures of over-fitting
    Method("best-checkpoint", "best checkpoint", "", {"keep": "best"}),
    Method(
        "half-epochs",
        "fewer epochs",
        "",
        factors={"training.num_train_epochs+training.max_steps": (0.5, 0.25, 0.75)},
    ),
    Method("low-rank", "a lower rank", "", factors={"adapter.r+adapter.lora_alpha": (0.25, 0.125, 0.5)}),
    Method(
        "dropout",
        "LoRA dropout",
        "2404.09610",
        {"adapter.lora_dropout": 0.1},
        tuned={"adapter.lora_dropout": (0.1, 0.3, 0.5)},
    ),
    Method(
        "weight-decay",
        "weight decay",
        "1711.05101",
        {"training.weight_decay": 0.1},
        tuned={"training.weight_decay": (0.1, 0.01, 1.0)},
    ),
    Method(
        "label-smoothing",
        "label smoothing",
        "1512.00567",
        {"training.label_smoothing_factor": 0.1},
        tuned={"training.label_smoothing_factor": (0.1, 0.05, 0.2)},
    ),
    Method(
        "neftune",
        "NEFTune",
        "2310.05914",
        {"training.neftune_noise_alpha": 5.0},
        tuned={"training.neftune_noise_alpha": (5.0, 1.0, 15.0)},
    ),
    # Flat minima
    Method(
        "flat-lora",
        "Flat-LoRA",
        "2409.14396",
        {"ggpo.rule": "paper", "ggpo.beta": 0.0, "ggpo.schedule": "cosine"},
        tuned=_SIGMAS,
    ),
    Method("ggpo-paper", "GGPO (paper's rule)", "2502.14538v1", {"ggpo.rule": "paper"}, tuned=_SIGMAS),
    Method(
        "ggpo",
        "GGPO (relative rule)",
        "2502.14538v1",
        _RELATIVE,
        tuned=_SIGMAS,
    ),
    Method(
        "ggpo-rise",
        "GGPO (by the rise)",
        "2502.14538v1",
        {**_RELATIVE, "ggpo.rise": 0.05},
        tuned={"ggpo.rise": (0.05, 0.02, 0.1)},
    ),
    Method("mgpo", "LoRA-MGPO", "2502.14538v2", {"mgpo.rho": 0.05}, tuned={"mgpo.rho": _RHOS}),
    Method("bi-lora", "Bi-LoRA", "2508.19564", {"bi_lora.rho": 0.05}, tuned={"bi_lora.rho": _RHOS}),
    Method("lora-sam", "LoRA-SAM", "2010.01412", {"sam.space": "adapter"}, tuned={"sam.rho": _RHOS}),
    Method("sam", "SAM (full weight)", "2010.01412", {"sam.space": "weights"}, tuned={"sam.rho": _RHOS}),
)

BY_NAME = {method.name: method for method in METHODS}

GROUPS: Mapping[str, tuple[str, ...]] = {
    "cures": (
        *(
            "lora",
            "best-checkpoint",
            "half-epochs",
            "low-rank",
            "dropout",
            "weight-decay",
            "label-smoothing",
            "neftune",
        ),
        *("aletheia", "sc-lora", "monteclora", "ivon", "bi-lora", "flat-lora", "ggpo", "ggpo-rise"),
    )
}
"""Names for several methods, the baseline first. ``cures``: a run over-fits; what helps?"""


def find_method(name: str) -> Method:
    """A method by name, or several joined by "+" (``dora+ggpo``).

    Raises:
        UserError: an unknown name (the nearest is suggested), or methods that set the same thing.
    """
    parts = [_row(part) for part in name.split("+")]
    for index, second in enumerate(parts):
        for first in parts[:index]:
            clash = _clash(first, second)
            if clash:
                raise UserError(f"Method {name!r}: {first.title} and {second.title} both set {clash}; use one of them.")
    if len(parts) == 1:
        return parts[0]
    rates = [part.learning_rate for part in parts if part.learning_rate != 1.0]
    return Method(
        name,
        " + ".join(part.title for part in parts),
        ", ".join(part.source for part in parts),
        {key: value for part in parts for key, value in part.settings.items()},
        {key: value for part in parts for key, value in part.factors.items()},
        min(rates, default=1.0),
        {key: values for part in parts for key, values in part.tuned.items()},
    )


def apart(keys: Iterable[str]) -> list[str]:
    """The settings that such keys stand for as join several by "+"."""
    return [one for key in keys for one in key.split("+")]


def each(values: Mapping[str, V]) -> dict[str, V]:
    """The value of each setting that such keys stand for."""
    return {one: value for key, value in values.items() for one in apart([key])}


def _row(name: str) -> Method:
    if name in BY_NAME:
        return BY_NAME[name]
    near = difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"the methods are {', '.join(BY_NAME)}."
    raise UserError(f"There is no method {name!r}; {hint}")


def _clash(first: Method, second: Method) -> str | None:
    """A setting of both: the same key, or one inside the other (``adapter`` and ``adapter.use_dora``)."""
    for one in (*first.settings, *apart(first.factors)):
        for other in (*second.settings, *apart(second.factors)):
            if one == other or one.startswith(f"{other}.") or other.startswith(f"{one}."):
                return min(one, other, key=len)
    return None
