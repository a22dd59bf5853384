"""What torch.compile asks for.

The hooks of a model are mostly outside of its graphs: with ``torch.compile(model)``, with ``model.compile()``, and
where its blocks are compiled one by one. They run as ever, and noise is an input of the graph. A compiled function that
calls the model has the hooks in its graph. There one operator that the compiler does not look into draws the factors of
all layers; it breaks no graph, and since the factors are its results, no draw compiles anything anew.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

try:
    from torch._dynamo.eval_frame import skip_code
except ImportError:  # not a public name: without it the hooks are graphs of their own, which is slower and no more
    skip_code = None  # type: ignore[assignment]

Function = TypeVar("Function", bound=Callable[..., Any])

# Since torch 2.9.
_OPTIONS: dict[str, Any] = {"tags": [torch.Tag.cudagraph_unsafe]} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


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


@torch.library.custom_op("lora_ggpo::draw", mutates_args=(), **_OPTIONS)
def draw(counter: Tensor, number: int) -> list[Tensor]:
    """A new draw for the model of this number. The compiler takes two with one counter for one."""
    return _drawers[number].draw_joint()


@draw.register_fake
def _(counter: Tensor, number: int) -> list[Tensor]:
    shapes = _drawers[number].joint_shapes()
    return [torch.empty(shape, device=device, dtype=dtype) for device, dtype, shape in shapes]


def no_graph_of_its_own(function: Function) -> Function:
    """A function that runs as it is where it is not called inside of a graph."""
    if skip_code is not None:
        skip_code(function.__code__)
    return function


@torch.compiler.assume_constant_result
def in_checkpoint() -> bool:
    """Whether the compiler traces what gradient checkpointing runs again, and forbids to change anything outside."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx().output.current_tracer.parent is not None
