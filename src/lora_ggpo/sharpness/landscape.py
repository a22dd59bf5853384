"""Slices of the loss: along filter-normalised random directions (arXiv 1712.09913), and between two models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lora_ggpo.errors import UserError
from lora_ggpo.sharpness.point import Parameters, Point, move, row_norms_squared, rows_view


def filter_direction(point: Point, seed: int) -> dict[str, torch.Tensor]:
    """A random direction in which each row is as long as the row of the model: a step of 1 is a change by 100 %.

    Points of equal shapes get the same random numbers for the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    lengths = row_norms_squared(point.parameters, point.row_dims)
    for name, p in point.parameters.items():
        dim = point.row_dims[name]
        d = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        direction[name] = d * rows_view((lengths[name] / d.square().sum(1 - dim)).sqrt(), dim)
    return direction


def line(point: Point, direction: Parameters, at: Sequence[float]) -> NDArray[np.float64]:
    """L(theta* + t direction) for each t of `at`."""
    return plane(point, direction, direction, at, [0.0])[0]


def plane(
    point: Point,
    first: Parameters,
    second: Parameters,
    along_first: Sequence[float],
    along_second: Sequence[float],
) -> NDArray[np.float64]:
    """L(theta* + s first + t second): one row for each t, one column for each s."""
    rows = [move(point.parameters, second, t) for t in along_second]
    return np.array([[point.loss(move(row, first, s)) for s in along_first] for row in rows])


def between(first: Point, second: Point, at: Sequence[float]) -> NDArray[np.float64]:
    """L of the first point's sample on the straight line from the first model (0) to the second (1).

    The line is drawn between all parameters, heads included.

    Raises:
        UserError: the models do not have the same parameters.
    """
    start, end = (dict(point.model.named_parameters()) for point in (first, second))
    if {name: p.shape for name, p in start.items()} != {name: p.shape for name, p in end.items()}:
        raise UserError("Two runs can be joined by a line only where both train the same model.")
    way = {name: (end[name] - p).detach() for name, p in start.items()}
    return np.array([first.loss(move(start, way, t)) for t in at])
