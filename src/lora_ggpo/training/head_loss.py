"""The loss of a causal language model without the logits of all its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_ggpo.perturbation.linear import product_dtype
from lora_ggpo.tasks import NO_LOSS
from lora_ggpo.tasks.forward import evaluating

ENTRIES = 1 << 24
"""Logits that exist at once, at most (unless one token has more)."""


class HeadLoss:
    """Has a model with a linear head give its mean loss, with logits of a few tokens at a time and of no token that
    predicts no label.

    Where the head is frozen, as it is with LoRA, nothing of the size of the vocabulary is kept for the backward pass.

    Args:
        model: As `takes_head_loss` has found it.
        smoothing: Of the labels; 0 is none.
    """

    def __init__(self, model: nn.Module, smoothing: float) -> None:
        self._base, self._smoothing = _base(model), smoothing
        self._labels: Tensor | None = None
        self._in_place_of_head = torch.compiler.disable(self._mean)  # the same one at each step, or it compiles anew

    @contextmanager
    def over(self, labels: Tensor) -> Iterator[None]:
        """Forward passes in here give the loss of `labels` (batch, length), as loss and in place of the logits."""
        self._labels = labels
        with _replaced(self._base, self._in_place_of_head, _as_it_is):
            yield

    def _mean(self, hidden: Tensor) -> Tensor:
        assert self._labels is not None
        targets = self._labels[:, 1:].to(hidden.device)
        learnt = targets != NO_LOSS
        head = self._base.get_output_embeddings()
        summed = summed_loss(hidden[:, :-1][learnt], head.weight, head.bias, targets[learnt], self._smoothing)
        return summed / learnt.sum().clamp(min=1)


def takes_head_loss(model: nn.Module) -> bool:
    """Whether `model` has a plain linear head whose output is its logits, and their mean cross-entropy its loss.

    It is not so where the head has an adapter, or where logits are scaled or capped behind it.
    """
    base = _base(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if type(head) is not nn.Linear or "forward" in vars(head) or not head.weight.numel():  # ZeRO-3 has cut it up
        return False
    ids = (torch.arange(8, device=head.weight.device) % head.out_features)[None]
    made = torch.linspace(-100, 100, 8 * head.out_features, dtype=head.weight.dtype, device=ids.device).view(1, 8, -1)
    with evaluating(base), _replaced(base, lambda hidden: made.clone(), base.loss_function):
        output = base(input_ids=ids, labels=ids, use_cache=False)
    expected = F.cross_entropy(made[0, :-1].float(), ids[0, 1:])
    return torch.equal(output.logits.float(), made.float()) and torch.allclose(output.loss.float(), expected)


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def _replaced(base: Any, forward: Any, loss_function: Any) -> Iterator[None]:
    """`base` with another forward of its head, and another loss function."""
    head, before = base.get_output_embeddings(), vars(base).get("_loss_function")
    head.forward, base.loss_function = forward, loss_function
    try:
        yield
    finally:
        del head.forward, base._loss_function
        if before is not None:
            base.loss_function = before


def _as_it_is(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return logits


def summed_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The sum over tokens of the cross-entropy of hidden W^T + b with `targets`.

    Args:
        hidden: (n, features).
        weight: W (vocabulary, features); products are taken in the dtype of autocast, where it is on.
        bias: b (vocabulary,) or None.
        targets: (n,).
        smoothing: As torch's label_smoothing.
    """
    return cast(Tensor, _SummedLoss.apply(hidden, weight, bias, targets, smoothing))


class _SummedLoss(torch.autograd.Function):
    """Finds the gradients with the loss, while the logits are there. It is a sum, so they lack a factor alone."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float
    ) -> Tensor:
        dtype = product_dtype(hidden)
        wide = torch.promote_types(dtype, torch.float32)
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        sums = [
            torch.zeros_like(of, dtype=wide) if needed and of is not None else None
            for of, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        size = max(1, ENTRIES // len(weight))
        for begin in range(0, len(hidden), size):
            x = hidden[begin : begin + size].to(dtype)
            part, gradient = _with_gradient(F.linear(x, w, b).to(wide), targets[begin : begin + size], smoothing)
            loss += part
            if sums[2] is not None:
                sums[2] += gradient.sum(dim=0)
            gradient = gradient.to(dtype)
            if sums[0] is not None:
                sums[0][begin : begin + size] = gradient @ w
            if sums[1] is not None:
                sums[1] += gradient.t() @ x
        ctx.save_for_backward(*sums)
        ctx.dtypes = [None if of is None else of.dtype for of in (hidden, weight, bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if of is None else (of * dloss).to(dtype) for of, dtype in pairs), None, None)


def _with_gradient(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The summed loss of `logits` (n, vocabulary), and its gradient, which takes their place."""
    target, log_sum = targets[:, None], logits.logsumexp(dim=1, keepdim=True)
    loss = (log_sum - (1 - smoothing) * logits.gather(1, target)).sum()
    if smoothing:
        loss -= smoothing * logits.mean(dim=1).sum()
    gradient = logits.sub_(log_sum).exp_().scatter_add_(1, target, torch.full_like(log_sum, smoothing - 1))
    return loss, gradient.sub_(smoothing / logits.shape[1]) if smoothing else gradient
