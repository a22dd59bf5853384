"""What the sizes of weights, gradients and noise say about a run: guidance that does not count, a forgotten loss scale,
divergence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch

from .config import GGPOConfig
from .groups import LayerGroup

NEGLIGIBLE_SHARE = 1e-3
"""Share of the gradient term in tau^2 under which ``rule="paper"`` is numerically Flat-LoRA's noise."""

FIRST_STEPS = 20
"""Optimizer steps after each of which sizes are judged; the share of the gradient for good after the last of them."""

LATER_STEPS = 50
"""Between two looks at the sizes after that: a look waits for the GPU."""

IMPLAUSIBLE_RATIO = 1e4
"""||G||^2 / ||W'||^2 that no mean loss has: measured are 3e-5 to 2e-3, which a loss scale of 65,536 takes 4e9 fold."""

IMPLAUSIBLE_JUMP = 1e6
"""Growth of ||G||^2 from one look to the next that is a loss scale's, not training's: 1,000 fold in ||G||."""


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
        absolute = self._config.rule != "relative" and self._config.beta > 0
        before, self._gradient = self._gradient, gradient
        if absolute and gradient > IMPLAUSIBLE_RATIO * weight:
            self._warn_of_scale(f"||G||^2 is {gradient / weight:.1e} times ||W'||^2")
        elif self._config.beta > 0 and before > 0 and gradient > IMPLAUSIBLE_JUMP * before:
            self._warn_of_scale(f"||G||^2 has grown {gradient / before:.1e} fold")

    def _warn_of_scale(self, what: str) -> None:
        if self._said:
            return
        self._said = True
        warnings.warn(
            f"the gradients that GGPO reads are implausibly large ({what}), and they set the size of the noise: with a "
            "GradScaler call ggpo.step(scaler=scaler) before scaler.update(); otherwise divide the loss by the number "
            "of its terms, or see whether training diverges",
            stacklevel=5,
        )

    def _warn_if_negligible(self) -> None:
        if self._config.rule != "paper" or not 0 < self._highest_share < NEGLIGIBLE_SHARE:
            return
        warnings.warn(
            f'rule="paper" with beta={self._config.beta:g}: the gradient term made at most '
            f"{self._highest_share:.1e} of the noise variance in {FIRST_STEPS} steps, so the noise is Flat-LoRA's; "
            'use rule="relative" for guidance that counts',
            stacklevel=4,
        )


def _sizes(group: LayerGroup) -> torch.Tensor:
    """Sums over the rows of each layer of ||W'_i||^2, ||G_i||^2, tau_i^2 and its gradient part: (L, 4)."""
    assert group.weight is not None
    parts = (group.weight, group.gradient, group.tau2, group.guided)
    zero = torch.zeros(len(group.layers), dtype=group.weight.dtype, device=group.weight.device)
    return torch.stack([zero if part is None else part.sum(-1) for part in parts], -1)
