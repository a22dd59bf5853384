"""Noise inside a graph of torch.compile: one operator that the compiler does not look into draws all layers' factors.

It breaks no graph, and since the factors are its results, no draw compiles anything anew.
"""

from __future__ import annotations

from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Drawer(Protocol):
    """What draws for a model."""

    def draw_joint(self) -> list[Tensor]:
        """The factors of a new draw."""

    def joint_shapes(self) -> list[tuple[torch.device, torch.dtype, tuple[int, ...]]]:
        """Device, dtype and shape of each."""


_numbers = count()
_drawers: WeakValueDictionary[int, Drawer] = WeakValueDictionary()


def register(drawer: Drawer) -> int:
    """The number under which the operator finds what draws for a model."""
    number = next(_numbers)
    _drawers[number] = drawer
    return number


@torch.library.custom_op("lora_ggpo::draw", mutates_args=())
def draw(anchor: Tensor, number: int) -> list[Tensor]:
    """A new draw for the model of this number; ``anchor`` is any tensor of it."""
    return _drawers[number].draw_joint()


@draw.register_fake
def _(anchor: Tensor, number: int) -> list[Tensor]:
    shapes = _drawers[number].joint_shapes()
    return [anchor.new_empty(shape, device=device, dtype=dtype) for device, dtype, shape in shapes]
