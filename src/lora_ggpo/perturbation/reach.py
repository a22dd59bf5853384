"""What became of each adapted layer in a training pass: the report behind ``ggpo/coverage``, layer by layer."""

from __future__ import annotations

from typing import NamedTuple

from .ggpo import GGPO
from .layers import PerturbedLayer
from .watch import REMEDY

_INACTIVE = "no active adapter has it"
_BYPASSED = f"it trains, but its forward is not called. {REMEDY}"
_IDLE = "the pass neither calls nor trains it, as an expert without tokens or a frozen branch"
_REFUSED = "{}. Leave it out of target_modules, or take it that it trains without noise"


class Reach(NamedTuple):
    """An adapted layer after a training pass.

    Attributes:
        name: Of the layer in the model.
        kind: Class of the layer that is adapted.
        perturbed: Whether the pass perturbed it.
        bypassed: Whether it trains without noise.
        gradient: What the estimate of ||G_i||^2 is taken from; empty if the layer cannot be perturbed.
        why: Why it was not perturbed, and what to do; empty if it was.
    """

    name: str
    kind: str
    perturbed: bool
    bypassed: bool
    gradient: str
    why: str


def reach(ggpo: GGPO) -> list[Reach]:
    """All adapted layers, after the backward pass of a model and before its gradients are cleared."""
    refused = [
        Reach(
            layer.name,
            type(layer.base).__name__,
            perturbed=False,
            bypassed=layer.is_active(),
            gradient="",
            why=_REFUSED.format(layer.reason) if layer.is_active() else _INACTIVE,
        )
        for layer in ggpo.skipped
    ]
    return [*map(_reach, ggpo.layers), *refused]


def _reach(layer: PerturbedLayer) -> Reach:
    trains = any(p.grad is not None and bool(p.grad.any()) for p in layer.trained())
    bypassed = trains and not layer.reached
    why = "" if layer.reached else _BYPASSED if bypassed else _IDLE if layer.names else _INACTIVE
    return Reach(
        layer.name,
        type(layer.base).__name__,
        perturbed=layer.reached,
        bypassed=bypassed,
        gradient="A and B" if layer.has_gradients() else "sketch",
        why=why,
    )
