"""Aletheia (arXiv 2604.15351): LoRA on the transformer blocks alone whose weights the task's loss asks most of."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_ggpo.errors import UserError

PROBE_BATCHES = 5
"""Batches that gradients are taken of, at most: as many as the authors' package takes, of one row each."""

_BLOCK = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""What peft reads the number of a block from, as ``layers_to_transform`` counts them."""


def select_blocks(model: nn.Module, batches: Iterator[Mapping[str, Tensor]], share: float) -> list[int]:
    """The ``share`` of blocks with the largest gradients, rounded down, and one at least; by number.

    Raises:
        UserError: the model has no numbered blocks.
    """
    sizes = block_gradients(model, batches)
    largest_first = sorted(sizes, key=lambda block: -sizes[block])
    return sorted(largest_first[: max(int(len(sizes) * share), 1)])


def block_gradients(model: nn.Module, batches: Iterator[Mapping[str, Tensor]]) -> dict[int, float]:
    """Of each block the Frobenius norms ||dL/dW|| of its parameters, summed over them and over `PROBE_BATCHES`.

    One gradient is there at a time. Dropout is off.
    """
    blocks = _blocks(model)
    sizes = dict.fromkeys(blocks.values(), 0.0)

    def watch(parameter: nn.Parameter, block: int) -> torch.utils.hooks.RemovableHandle:
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            sizes[block] += float(parameter.grad.float().norm())
            parameter.grad = None

        return parameter.register_post_accumulate_grad_hook(take)

    with _only_trained(model, blocks):
        handles = [watch(parameter, block) for parameter, block in blocks.items()]
        for batch in itertools.islice(batches, PROBE_BATCHES):
            model(**batch).loss.backward()
        for handle in handles:
            handle.remove()
    return sizes


def _blocks(model: nn.Module) -> dict[nn.Parameter, int]:
    """The number of its block, for each parameter that is in one."""
    found = {p: int(match[1]) for name, p in model.named_parameters() if (match := _BLOCK.match(name))}
    if not found:
        raise UserError("adapter.layers_by_gradient chooses among numbered blocks; the model has none: leave it out.")
    return found


@contextmanager
def _only_trained(model: nn.Module, parameters: Mapping[nn.Parameter, int]) -> Iterator[None]:
    """Gradients for these parameters alone, in evaluation mode; in the end everything is as before."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    model.eval()
    try:
        for p, _ in before:
            p.requires_grad_(p in parameters)
        yield
    finally:
        for p, needed in before:
            p.requires_grad_(needed)
        model.train(training)
