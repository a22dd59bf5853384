"""What a run tells of itself: which layers the noise reaches, how large it is, and sizes that cannot be right."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .config import GGPOConfig
from .find import Skipped
from .layers import PerturbedLayer
from .passes import Passes
from .rows import LayerGroup
from .scales import RULES

NEGLIGIBLE_SHARE = 1e-3
"""Share of the gradient term in tau^2 under which the noise is numerically that of beta = 0."""

FIRST_STEPS = 20
"""Optimizer steps after each of which sizes are judged; the share of the gradient for good after the last of them."""

LATER_STEPS = 50
"""Between two looks at the sizes after that: a look waits for the GPU."""

IMPLAUSIBLE_RATIO = 1e4
"""||G||^2 / ||W'||^2 that no mean loss has: measured are 3e-5 to 2e-3, which a loss scale of 65,536 takes 4e9 fold."""

IMPLAUSIBLE_JUMP = 1e6
"""Growth of ||G||^2 from one look to the next that is a loss scale's, not training's: 1,000 fold in ||G||."""

REMEDY = (
    "Switch off fused LoRA kernels, which read the weights themselves (Axolotl: lora_mlp_kernel, lora_qkv_kernel, "
    "lora_o_kernel; Unsloth's fast LoRA), call the model that was given to GGPO rather than a part of it, and put no "
    "part that trains in evaluation mode"
)
"""What to do about layers that train and are not called."""


class Coverage:
    """Counts the layers that a forward pass reached.

    A layer was *bypassed* in an optimizer step if its A and B got a gradient although no pass of the step called it. A
    layer that did not run (an unused expert) or does not train (a frozen branch) got none.
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
        reached = [layer for layer in self._layers if layer.reached]
        return {
            "ggpo/coverage": len(reached) / self._number,
            "ggpo/coverage_parameters": sum(layer.m * layer.n for layer in reached) / self._entries,
        }

    def note_gradients(self, always: bool) -> None:
        """Note layers that no pass of this step has called and that may have a gradient; called where it is read.

        Args:
            always: Whether gradients are elsewhere (ZeRO), so that ``.grad`` says nothing.
        """
        missing = (
            []
            if self._said
            else [layer for layer in self._layers if not (layer.reached_in_step or layer.always_reached)]
        )
        self._suspects = {m.index for m in missing if always or any(p.grad is not None for p in m.trained())}

    def step(self, groups: Sequence[LayerGroup]) -> None:
        """Say once which layers were bypassed in the optimizer step that ends.

        Raises:
            RuntimeError: there are such layers and ``strict`` is set.
        """
        bypassed = self._bypassed(groups) if self._suspects else []
        self._suspects = set()
        for layer in self._layers:
            layer.reached_in_step = False
        if not bypassed:
            return
        self._said = True
        names = ", ".join(layer.name for layer in bypassed[:3])
        names += f" and {len(bypassed) - 3} more" if len(bypassed) > 3 else ""
        message = (
            f"{len(bypassed)} of {len(self._layers)} adapted layers train without GGPO's noise: {names}. Their A and B "
            f"got a gradient in this optimizer step, but their forward was not called in it. {REMEDY}"
        )
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


class Watch:
    """Judges sizes now and then, and says each thing once."""

    def __init__(self, config: GGPOConfig) -> None:
        self._config = config
        self._highest_share = 0.0
        self._gradient = 0.0  # ||G||^2 at the last look
        self._said = False

    def step(self, groups: Sequence[LayerGroup], steps: int) -> None:
        """Look at the sizes after optimizer step number ``steps``, if it is time.

        Raises:
            FloatingPointError: see :meth:`look`.
        """
        if steps <= FIRST_STEPS or steps % LATER_STEPS == 0:
            self.look(groups)
        if steps == FIRST_STEPS:
            self._warn_if_negligible()

    def look(self, groups: Sequence[LayerGroup]) -> None:
        """Look at the sizes; waits for the GPU.

        Raises:
            FloatingPointError: squared norms of the adapted weights are not finite.
        """
        known = [group for group in groups if group.weight is not None]
        if not known:
            return
        rows = torch.cat([_sizes(group).cpu().double() for group in known])
        weight, gradient, tau2, guided = rows.sum(0).tolist()
        if not math.isfinite(weight):
            layers = [layer.name for group in known for layer in group.layers]
            name = next(name for name, row in zip(layers, rows, strict=True) if not row[0].isfinite())
            raise FloatingPointError(
                f"training diverges: the squared norm of the adapted weight of {name} is not finite; lower the "
                "learning rate, or warm it up for longer"
            )
        self._highest_share = max(self._highest_share, guided / tau2 if tau2 else 0.0)
        before, self._gradient = self._gradient, gradient
        if self._config.beta == 0 or self._said:
            return
        if gradient > IMPLAUSIBLE_RATIO * weight and not RULES[self._config.rule].shares:
            self._warn_of_scale(f"||G||^2 is {gradient / weight:.1e} times ||W'||^2")
        elif gradient > IMPLAUSIBLE_JUMP * before > 0:
            self._warn_of_scale(f"||G||^2 has grown {gradient / before:.1e} fold")

    def _warn_of_scale(self, what: str) -> None:
        self._said = True
        warnings.warn(
            f"the gradients that GGPO reads are implausibly large ({what}), and they set the size of the noise: with a "
            "GradScaler call ggpo.step(scaler=scaler) before scaler.update(); otherwise divide the loss by the number "
            "of its terms, or see whether training diverges",
            stacklevel=5,
        )

    def _warn_if_negligible(self) -> None:
        if RULES[self._config.rule].shares or not 0 < self._highest_share < NEGLIGIBLE_SHARE:
            return
        warnings.warn(
            f'rule="{self._config.rule}" with beta={self._config.beta:g}: the gradient term made at most '
            f"{self._highest_share:.1e} of the noise variance in {FIRST_STEPS} steps, so the noise is that of beta=0 "
            '(Flat-LoRA\'s); use rule="relative" for guidance that counts',
            stacklevel=4,
        )


def _sizes(group: LayerGroup) -> Tensor:
    """Sums over the rows of each layer of ||W'_i||^2, ||G_i||^2, tau_i^2 and its gradient part: (L, 4)."""
    parts = (group.weight, group.gradient, group.tau2, group.guided)
    zero = group.w0_norms.new_zeros(len(group.layers))
    return torch.stack([zero if part is None else part.sum(-1) for part in parts], -1)


def noise_metrics(groups: Sequence[LayerGroup]) -> dict[str, float]:
    """Size of the noise and share of the gradient in it, over all layers and over each group of equally named ones.

    A layer that the last pass did not reach had none: its weight counts, with noise of size 0.
    """
    sums: dict[str, Tensor] = {}
    for group in groups:
        if group.tau2 is None or group.guided is None or group.weight is None:
            continue
        there = group.tau2.new_tensor([[layer.reached] for layer in group.layers])
        tau2, guided = group.tau2 * there, group.guided * there
        parts = (guided, tau2, group.n * tau2, group.weight, torch.ones_like(tau2))
        table = torch.stack([part.sum(-1) for part in parts], -1).double().cpu()
        for layer, row in zip(group.layers, table, strict=True):
            for key in ("", layer.name.rpartition(".")[2] + "/"):
                sums[key] = sums.get(key, 0) + row
    metrics = {}
    for key, total in sums.items():
        guided_sum, tau2_sum, energy, weight, rows = total.tolist()
        metrics[f"ggpo/{key}gradient_share"] = guided_sum / tau2_sum if tau2_sum else 0.0
        metrics[f"ggpo/{key}relative_noise"] = (energy / weight) ** 0.5 if weight else 0.0
        metrics[f"ggpo/{key}tau"] = (tau2_sum / rows) ** 0.5
    return metrics


def report_blind(strict: bool) -> None:
    """Say, to whoever steps, that no gradient has been seen."""
    message = (
        "GGPO saw no gradient before step(): call the forward of the very model that was given to GGPO, in "
        "training mode and with gradients, let it return tensors (in tuples, lists, dictionaries or objects), and "
        "step() after backward()"
    )
    if strict:
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=4)
