"""SAM: take the gradient at a worse point nearby, and step from where the weights were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from lora_ggpo.perturbation.noise import mean_over_processes

Closure = Callable[[], Tensor]
"""Runs a forward and a backward pass and returns the loss."""


class Ascent(Protocol):
    """Decides at which weights a micro-batch takes its gradient."""

    def backward(self, closure: Closure) -> Tensor:
        """Call `closure` once or more, leave the gradient, added to what has been accumulated; return the loss."""


class SAM:
    r"""Sharpness-aware minimisation (arXiv 2010.01412).

    The optimizer gets dL/dw at w + e instead of at w, with e = rho g / ||g||, g = dL/dw of the same batch and ||g||
    over all tensors that are moved. That takes two forward and backward passes::

        sam = SAM(model, rho=0.05)
        sam.backward(closure)
        optimizer.step()
        optimizer.zero_grad()

    With gradient accumulation each micro-batch, of all processes together, has its own e (m-sharpness). Moved tensors
    are put back from copies, so they are afterwards bit for bit what they were.

    Args:
        model: Any module with trainable parameters.
        rho: Length of e.
        space: ``"adapter"`` moves the LoRA factors A and B (LoRA-SAM), or, without LoRA layers, every trained
            parameter. ``"weights"`` moves the full weights W0 + s B A of the LoRA layers: g is dL/dW', (m, n) a layer,
            kept for one pass, and so is a copy of W0.

    Raises:
        ValueError: there is nothing to move.
    """

    def __init__(self, model: nn.Module, rho: float = 0.05, space: Literal["adapter", "weights"] = "adapter") -> None:
        self.rho = rho
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._moved = base_weights(model) if space == "weights" else adapter_parameters(model)
        if not self._moved:
            raise ValueError("SAM found nothing to move: the model has no LoRA layer or no trained parameter")

    def backward(self, closure: Closure) -> Tensor:
        """Leave the gradient at w + e, added to what has been accumulated; return the loss at w."""
        accumulated = _take_gradients(self._trained)
        with _enable_gradients(self._moved):
            loss = closure()
            gradients = _average(self._moved)
            _take_gradients([*self._trained, *self._moved])
        for parameter, gradient in zip(self._trained, accumulated, strict=True):
            parameter.grad = gradient  # before the second pass, in which DDP averages what has been accumulated
        with _move(self._moved, _scale(gradients, self.rho)):
            closure()
        return loss


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of LoRA layers, or all trained parameters where there is no such layer."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    found = [p for layer in layers for name in layer.adapter_layer_names for p in getattr(layer, name).parameters()]
    return [p for p in (found if layers else model.parameters()) if p.requires_grad]


def base_weights(model: nn.Module) -> list[nn.Parameter]:
    """W0 of each LoRA layer; a tied weight once."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return list(dict.fromkeys(layer.get_base_layer().weight for layer in layers))


def _take_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def _average(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Their gradients, averaged over the processes: DDP does not in each micro-batch, nor for frozen weights.

    FSDP has the averages already; its parameters and gradients are DTensors.
    """
    sharded = any(isinstance(p, DTensor) for p in parameters)
    if sharded or not (distributed.is_available() and distributed.is_initialized()):
        return [p.grad for p in parameters]
    return [mean_over_processes(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]


def _scale(gradients: Sequence[Tensor | None], length: float) -> list[Tensor | None]:
    """All gradients times one factor that gives them this joint norm; none where that norm is 0 or not finite."""
    norms = [torch.linalg.vector_norm(g, dtype=_wide(g)) for g in gradients if g is not None]
    norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
    if not 0 < norm < float("inf"):
        return [None] * len(gradients)
    return [None if g is None else g * (length / norm) for g in gradients]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@contextmanager
def _enable_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _move(parameters: Sequence[nn.Parameter], displacements: Sequence[Tensor | None]) -> Iterator[None]:
    pairs = [(p, d) for p, d in zip(parameters, displacements, strict=True) if d is not None]
    copies = [p.detach().clone() for p, _ in pairs]
    try:
        with torch.no_grad():
            for parameter, displacement in pairs:
                parameter.add_(displacement)
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), copy in zip(pairs, copies, strict=True):
                parameter.copy_(copy)
