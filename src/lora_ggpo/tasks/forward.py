"""Forward passes without gradients."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn


def autocasting(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Run forward passes on `device` in `dtype`; None leaves them as they are."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in, and frozen is what was frozen.

    The latter is not so by itself: peft thaws all of an adapter as its ``disable_adapter()`` ends, and LoRA-FA, for
    one, has frozen a part of it.
    """
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, needs_gradient in trained:
            parameter.requires_grad_(needs_gradient)


def logits_at(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits (batch, k, vocabulary) at the `positions` (k,): the rest would be most of the memory of the pass."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        logits: torch.Tensor = model(**arguments, logits_to_keep=positions).logits
        return logits
    return model(**arguments).logits[:, positions]
