"""Noise of the size that raises the training loss by a given share, whatever sigma means in a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .noise import Factors, Noise, Seeded, mean_over_processes

_EARLY, _EVERY = (4, 16, 64), 200
"""Optimizer steps before which the rise is measured: these, and each so many."""

_JUMP, _SMALLEST, _LARGEST = 2.0, 0.01, 0.2
"""Sigma changes by this factor at most at a time, and stays between this share of where it began and this size, or that
where it began if that is larger. A model that knows nothing yet loses nothing by noise, and would never learn under all
the noise that it bears."""

_NO_LOSS = (
    "rise is measured by the loss that the model itself returns, and this one returns none: give it the labels, or set "
    "sigma and leave rise out"
)


class Rise:
    r"""Steers the factor f on sigma so that noise raises the loss by the share ``target`` of it.

    The mean rise is c f^2 for noise that is not too large. Now and then c is measured on the batch at hand with a draw
    and its mirror image, in whose mean the first order cancels, all at the same dropout masks::

        c f^2 = ((L(W' + eps) + L(W' - eps)) / 2 - L(W')) / L(W')

    and averaged, each measurement counting as much as all before it together; then f = sqrt(target / c).

    Attributes:
        factor: f.
        curvature: c, averaged; nan before the first measurement.
        measured: The last rise, as a share of the loss; nan before.
    """

    def __init__(self, target: float, sigma: float) -> None:
        self.target, self.factor, self.curvature, self.measured = target, 1.0, math.nan, math.nan
        self._largest = max(1.0, _LARGEST / sigma)
        self._rng: list[Tensor] = []
        self._taken_at = -1
        self._applied = 1.0

    def apply(self, ramp: float) -> float:
        """f, for noise that has the factor ``ramp`` too."""
        self._applied = ramp * self.factor
        return self.factor

    def begin(self, step: int) -> None:
        """A training pass of the model begins, before ``step`` more is done than were."""
        due = step in _EARLY or (step > 0 and step % _EVERY == 0)
        self._rng = _rng_states() if due and step != self._taken_at else []
        self._taken_at = step if due else self._taken_at

    def measure(
        self,
        output: Any,
        drawn: Sequence[Noise],
        again: Callable[[], Any],
        under: Callable[[list[Noise] | None], AbstractContextManager[None]],
    ) -> None:
        """Measure and steer, if the pass that ends is one to do it with.

        Args:
            output: What it returned.
            drawn: The noise that it had.
            again: Runs it again.
            under: Puts the noise of what runs inside in its place.

        Raises:
            RuntimeError: the model returns no loss.
        """
        losses, now = [_loss(output)], _rng_states()
        if not self._rng or not self._applied:
            return
        for noise in ([_minus(one) for one in drawn], None):
            _set_rng_states(self._rng)  # for the dropout masks that there were
            with torch.no_grad(), under(noise):
                losses.append(_loss(again()))
        _set_rng_states(now)
        self._rng = []
        self.take(*losses)

    def take(self, noisy: Tensor, mirrored: Tensor, clean: Tensor) -> None:
        """Steer by three losses of one batch."""
        losses = torch.stack([one.detach().double() for one in (noisy, mirrored, clean)])
        self.measured = float(mean_over_processes((losses[:2].mean() - losses[2]) / losses[2]))
        if math.isfinite(self.measured):
            new = self.measured / self._applied**2
            self.curvature = new if math.isnan(self.curvature) else (self.curvature + new) / 2
            wanted = math.sqrt(self.target / self.curvature) if self.curvature > 0 else math.inf
        else:
            wanted = 0.0
        within = min(max(wanted, self.factor / _JUMP), self.factor * _JUMP)
        self.factor = min(max(within, _SMALLEST), self._largest)

    def metrics(self, sigma: float) -> dict[str, float]:
        """Where sigma is, and the last rise; nothing before the first measurement."""
        if math.isnan(self.curvature):
            return {}
        return {"ggpo/sigma": sigma * self.factor, "ggpo/rise": self.measured}

    def state(self) -> Tensor:
        """Everything that steers, (4,) in float64."""
        return torch.tensor([self.factor, self.curvature, self.measured, self._taken_at], dtype=torch.float64)

    def load(self, state: Tensor | None) -> None:
        """Restore :meth:`state`; None, of a run without, begins anew."""
        if state is None:
            return
        self.factor, self.curvature, self.measured, taken_at = state.tolist()
        self._taken_at = int(taken_at)


def _minus(noise: Noise) -> Noise:
    if isinstance(noise, Factors):
        return Factors(noise.v, -noise.u)
    return None if noise is None else Seeded(noise.seed, -noise.tau, noise.n)


def _loss(output: Any) -> Tensor:
    """The loss that a model returned."""
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple | list) and output:
        loss = output[0]
    loss = output if isinstance(output, Tensor) else loss
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise RuntimeError(_NO_LOSS)
    return loss.reshape(())


def _rng_states() -> list[Tensor]:
    """Of the CPU, and of the current GPU if one is in use."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


def _set_rng_states(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
