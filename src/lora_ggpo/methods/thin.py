"""MGPO and Bi-LoRA: the gradient is taken at W' + P Q, a move of low rank that is added to what each layer returns.

x (P Q)^T = (x Q^T) P^T costs as much as an adapter, and W0 is neither read nor written: it may be quantised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from lora_ggpo.errors import UserError
from lora_ggpo.methods.ascent import Closure
from lora_ggpo.perturbation.noise import mean_over_processes

_EPS = 1e-12
_LARGEST_SCALE = 10.0


class Layer(NamedTuple):
    """A linear layer under LoRA: W' = W0 + s B A."""

    lora: Any
    A: nn.Parameter
    B: nn.Parameter
    s: float


class Move(NamedTuple):
    """A move P Q of a layer's W': P is (m, k), Q is (k, n)."""

    P: Tensor
    Q: Tensor

    def norm(self) -> Tensor:
        """Its Frobenius norm: ||P Q||^2 = <P^T P, Q Q^T>."""
        return ((self.P.T @ self.P) * (self.Q @ self.Q.T)).sum().clamp(min=0).sqrt()


class MGPO:
    r"""LoRA-MGPO (arXiv 2502.14538v2) as its authors' code does it: a look-ahead of descent, without a second pass.

    Each micro-batch takes its gradient at W0 + e + s B A, in each linear LoRA layer::

        e = -rho v / ||v||_F min(1 / gbar, 10),    v = s (m_B A + B m_A)

    with the momentum m of the optimizer, and gbar the moving average of ||s (dB A + B dA)||_F, which every micro-batch
    continues with the gradient that has been accumulated by then, not clipped. Layers without momentum, so all of them
    before the first step, stay where they are.

    The loss of a micro-batch is weighted by its share of the step's labels, where the authors' code divides by the
    number of micro-batches. With several processes gbar follows the mean of their norms, so that all move and resume
    alike; there each process has its own. gbar is part of the optimizer's ``state_dict``.

    Args:
        model: A PEFT model with LoRA on linear layers.
        optimizer: An optimizer of A and B that keeps ``exp_avg``; its beta_1 is the paper's mu.
        rho: Norm of e where gbar is 1.
        beta: Weight of the past in gbar.

    Raises:
        UserError: the model has no linear LoRA layer.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, rho: float = 0.05, beta: float = 0.9) -> None:
        self.rho, self.beta = rho, beta
        self._layers, self._optimizer = linear_layers(model), optimizer
        first = self._layers[0].A
        self._averages = torch.full((len(self._layers),), torch.nan, dtype=_wide(first), device=first.device)
        keep_with(optimizer, "mgpo", [self._averages])

    def backward(self, closure: Closure) -> Tensor:
        """Leave the gradient at the moved weights; return the loss there."""
        with add_moves(self._layers, self._moves()):
            loss = closure()
        self._follow()
        return loss

    @torch.no_grad()
    def _moves(self) -> list[Move | None]:
        scales = torch.where(self._averages.isnan(), 1.0, 1 / (self._averages + _EPS)).clamp(max=_LARGEST_SCALE)
        moves: list[Move | None] = []
        for (_, A, B, s), scale in zip(self._layers, scales, strict=True):
            m_A, m_B = (self._optimizer.state.get(p, {}).get("exp_avg") for p in (A, B))
            if m_A is None or m_B is None:
                moves.append(None)
                continue
            v = _tangent(A, B, m_A, m_B, s)
            norm = v.norm()
            factor = torch.where(norm > _EPS, -self.rho * scale.to(norm.device) / norm, 0.0)
            moves.append(Move(factor * v.P, v.Q))
        return moves

    @torch.no_grad()
    def _follow(self) -> None:
        norms = torch.full_like(self._averages, torch.nan)
        for i, (_, A, B, s) in enumerate(self._layers):
            if A.grad is not None and B.grad is not None:
                norms[i] = _tangent(A, B, A.grad, B.grad, s).norm()
        mean_over_processes(norms)
        averages = torch.where(self._averages.isnan(), norms, self.beta * self._averages + (1 - self.beta) * norms)
        self._averages.copy_(torch.where(norms.isnan(), self._averages, averages))


class BiLoRA:
    r"""Bi-LoRA (arXiv 2508.19564): in one backward pass a second adapter s B2 A2 ascends the loss that B and A descend.

    Each optimizer step is one of descent for A and B and of ascent for A2 and B2, all at W0 + s B A + s B2 A2; then the
    second adapter is scaled back into the ball of SAM, over all N layers together::

        c = (sum_l ||s B2 A2||_F^2)^(1/2);    B2, A2 <- (rho / c)^(1/2) B2, (rho / c)^(1/2) A2    if c > rho

    A2 and B2 begin as peft's A and B do, are there during `backward` alone, and are never saved with the adapter; they
    are part of the optimizer's ``state_dict``. The paper leaves open what we chose: ||s B2 A2|| counts s; the optimizer
    of the run takes A2 and B2 as well, with the reversed gradient, the learning rate of its first group and no weight
    decay; the norm by which gradients are clipped counts theirs.

    Args:
        model: A PEFT model with LoRA on linear layers; A2 and B2 become parameters of these layers.
        optimizer: Of A and B, before its schedule and any data-parallel wrapper are made.
        rho: Radius of the ball.
        rank: Of B2 A2.

    Raises:
        UserError: the model has no linear LoRA layer.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, rho: float = 0.05, rank: int = 8) -> None:
        self.rho = rho
        self._layers = linear_layers(model)
        self._factors = [_second_adapter(layer, rank) for layer in self._layers]
        parameters = [p for pair in self._factors for p in pair]
        for parameter in parameters:
            parameter.register_hook(torch.neg)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": 0.0})
        optimizer.register_step_post_hook(lambda *_: self._project())
        keep_with(optimizer, "bi_lora", parameters)

    def backward(self, closure: Closure) -> Tensor:
        """Leave the gradients at the moved weights, reversed for A2 and B2; return the loss there."""
        with add_moves(self._layers, [Move(s * B2, A2) for (*_, s), (A2, B2) in self._pairs()]):
            return closure()

    @torch.no_grad()
    def _project(self) -> None:
        norms = [Move(s * B2, A2).norm() for (*_, s), (A2, B2) in self._pairs()]
        c = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        factor = (self.rho / c).clamp(max=1).sqrt()
        for pair in self._factors:
            for parameter in pair:
                parameter.mul_(factor.to(parameter.device))

    def _pairs(self) -> Iterator[tuple[Layer, tuple[nn.Parameter, nn.Parameter]]]:
        return zip(self._layers, self._factors, strict=True)


def linear_layers(model: nn.Module) -> list[Layer]:
    """The linear layers with LoRA of the (first) active adapter.

    Raises:
        UserError: there are none.
    """
    layers = []
    for lora in model.modules():
        if isinstance(lora, LoraLayer) and isinstance(lora.get_base_layer(), (nn.Linear, Conv1D)):
            name = lora.active_adapters[0]
            if name in lora.lora_A:
                A, B = (factors[name].weight for factors in (lora.lora_A, lora.lora_B))
                layers.append(Layer(lora, A, B, float(lora.scaling[name])))  # type: ignore[arg-type]
    if not layers:
        raise UserError("adapter.target_modules names no linear layer, whose weight the method could move; add one.")
    return layers


@contextmanager
def add_moves(layers: Sequence[Layer], moves: Sequence[Move | None]) -> Iterator[None]:
    """Add x (P Q)^T to what the layer under each LoRA layer makes of x."""
    handles = [
        layer.lora.get_base_layer().register_forward_hook(_adder(move))
        for layer, move in zip(layers, moves, strict=True)
        if move
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keep_with(optimizer: Optimizer, name: str, tensors: Sequence[Tensor]) -> None:
    """Make `tensors`, which are only ever written in place, part of the optimizer's ``state_dict``."""

    def save(_: Optimizer, state: dict[str, Any]) -> None:
        state[name] = [tensor.detach() for tensor in tensors]

    def load(_: Optimizer, state: dict[str, Any]) -> None:
        for tensor, saved in zip(tensors, state[name], strict=True):
            tensor.data.copy_(saved)

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)


def _tangent(A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, s: float) -> Move:
    """s (dB A + B dA), at least in float32."""
    return Move(s * torch.cat([dB, B], dim=1).to(_wide(B)), torch.cat([A, dA]).to(_wide(A)))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _adder(move: Move) -> Any:
    def add(_: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = arguments[0].to(move.Q.dtype)
        return y + F.linear(F.linear(x, move.Q), move.P).to(y.dtype)

    return add


def _second_adapter(layer: Layer, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """(A2, B2), as parameters of the layer: what is not one of the model's, DDP and clipping do not see."""
    A2 = nn.Parameter(layer.A.new_empty(rank, layer.A.shape[1]))
    B2 = nn.Parameter(layer.B.new_zeros(layer.B.shape[0], rank))
    nn.init.kaiming_uniform_(A2, a=math.sqrt(5))
    layer.lora.ascending = nn.ParameterList([A2, B2])
    return A2, B2
