"""When layers are noisy: in the model's own forward passes with gradients, and in the backward passes of these."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Passes:
    """The pass that is running, as all layers of one model see it.

    Whether a forward pass is noisy is decided where it enters the model, not layer by layer: reentrant gradient
    checkpointing switches gradients off inside a pass that has them. Between the end of that pass and the arrival of
    its gradient nothing is noisy, nor behind a pass that raised.

    Attributes:
        forward: Whether a forward pass with gradients is running.
        any: Whether there was one.
        fuse: Whether layers without noise take the fused forward too.
        predicts: Whether layers are noisy in evaluation mode too.
    """

    def __init__(self) -> None:
        self.forward = self.any = self.fuse = self.predicts = False
        self._backward: weakref.ref[Any] | None = None  # to what lives as long as the backward pass of one

    def active(self) -> bool:
        """Whether a layer that is called now is to be noisy."""
        return self.forward or self.in_backward()

    def in_backward(self) -> bool:
        """Whether a backward pass that was announced is running."""
        return self._backward is not None and self._backward() is not None

    def begin(self, training: bool) -> bool:
        """A forward pass enters the model; returns whether it is one of training. What runs inside a backward pass is
        not: gradient checkpointing runs something again, under the draw that is in force."""
        self.forward = training and torch.is_grad_enabled() and not _inside_any_backward()
        if self.forward:
            self.any = True
        return self.forward

    def end(self) -> bool:
        """A forward pass leaves the model; returns whether it was one of training."""
        was, self.forward = self.forward, False
        return was

    def enter_backward(self, at_end: Callable[[], None], hide: Callable[[], None]) -> None:
        """Be noisy until the backward pass that is running ends: then ``hide`` is called, and before it ``at_end`` if
        the pass did not raise."""
        if self.in_backward():
            return

        def end() -> None:
            at_end()

        # Autograd lets go of `end` as its pass is over, also where that raised and called nothing back.
        self._backward = weakref.ref(end, lambda _: hide())
        _queue(lambda: _queue(end))  # behind DDP's own callback, which writes the averaged gradients


def tied_tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a model returned that hang on its parameters: in tuples, lists, dictionaries, or objects."""
    for leaf in tree_leaves(output):
        parts = [leaf] if isinstance(leaf, Tensor) else tree_leaves(getattr(leaf, "__dict__", None))
        for part in parts:
            if isinstance(part, Tensor) and part.grad_fn is not None:  # a parameter would keep the hook
                yield part


def _inside_any_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _queue(callback: Callable[[], None]) -> None:
    """Call back as the running backward pass ends, after everything queued so far."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)
