"""Which of the adapted layers the noise really reached, and a word about those that it should have reached."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from .find import Skipped
from .groups import LayerGroup
from .layers import PerturbedLayer
from .passes import Passes


class Coverage:
    """Counts the layers that a forward pass reached.

    A layer was *bypassed* in an optimizer step if its A and B got a gradient although no pass of the step called its
    base layer. A layer that did not run (an unused expert) or does not train (a frozen branch) got none.
    """

    def __init__(self, passes: Passes, strict: bool) -> None:
        self._passes, self._strict, self._said = passes, strict, False
        self._layers: list[PerturbedLayer] = []
        self._entries = self._number = 0
        self._suspects: set[int] = set()

    def set_layers(self, groups: Sequence[LayerGroup], skipped: Sequence[Skipped]) -> None:
        """Take up the layers that have an active adapter now."""
        self._layers = [layer for group in groups for layer in group.layers]
        rest = [layer for layer in skipped if layer.is_active()]
        self._number = len(self._layers) + len(rest)
        self._entries = sum(layer.m * layer.n for layer in self._layers) + sum(layer.entries() for layer in rest)

    def metrics(self) -> dict[str, float]:
        """Shares of the last training pass; empty before the first one."""
        if not self._passes.any or not self._number:
            return {}
        there = [layer for layer in self._layers if layer.index in self._passes.reached]
        return {
            "ggpo/coverage": len(there) / self._number,
            "ggpo/coverage_parameters": sum(layer.m * layer.n for layer in there) / self._entries,
        }

    def note_gradients(self, always: bool) -> None:
        """Note layers that no pass of this step has called and that may have a gradient; called where it is read.

        Args:
            always: Whether gradients are elsewhere (ZeRO), so that ``.grad`` says nothing.
        """
        reached = self._passes.reached_in_step
        if self._said or len(reached) >= len(self._layers):
            self._suspects = set()
            return
        missing = [layer for layer in self._layers if layer.index not in reached]
        self._suspects = {m.index for m in missing if always or any(p.grad is not None for p in m.trained())}

    def step(self, groups: Sequence[LayerGroup]) -> None:
        """Say once which layers were bypassed in the optimizer step that ends.

        Raises:
            RuntimeError: there are such layers and ``strict`` is set.
        """
        bypassed = self._bypassed(groups) if self._suspects else []
        self._suspects, self._passes.reached_in_step = set(), set()
        if not bypassed:
            return
        self._said = True
        message = _message(bypassed, len(self._layers))
        if self._strict:
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=4)

    def _bypassed(self, groups: Sequence[LayerGroup]) -> list[PerturbedLayer]:
        found = []
        for group in groups:
            rows = [row for row, layer in enumerate(group.layers) if layer.index in self._suspects]
            if rows and group.pending is not None:
                arrived = (group.pending[rows] != 0).any(-1).tolist()
                found += [group.layers[row] for row, got_one in zip(rows, arrived, strict=True) if got_one]
        return found


def _message(bypassed: Sequence[PerturbedLayer], number: int) -> str:
    names = ", ".join(layer.name for layer in bypassed[:3])
    names += f" and {len(bypassed) - 3} more" if len(bypassed) > 3 else ""
    return (
        f"{len(bypassed)} of {number} adapted layers train without GGPO's noise: {names}. Their A and B got a gradient "
        "in this optimizer step, but the forward of their base layer was not called in it. Switch off fused LoRA "
        "kernels, which read the weights themselves (Axolotl: lora_mlp_kernel, lora_qkv_kernel, lora_o_kernel; "
        "Unsloth's fast LoRA), call the model that was given to GGPO rather than a part of it, and put no part that "
        "trains in evaluation mode"
    )
