"""The fused LoRA forward without noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .find import check_layers, find_layers
from .passes import Passes


def fuse_lora(model: nn.Module) -> Callable[[], None]:
    """Train plain LoRA by the forward that GGPO takes: the same function, in fewer passes over each layer's output.

    It serves plain linear layers without dropout in training mode; other layers and evaluation are PEFT's own. Results
    agree with PEFT's to rounding. Do not use it together with :class:`~lora_ggpo.GGPO`, which fuses by itself.

    Returns:
        A function that gives the model its own forward back.

    Raises:
        ValueError: the model has no adapted layer, or is perturbed or fused already.
    """
    passes = Passes()
    passes.fuse = passes.forward = True
    layers, skipped = find_layers(model, passes)
    check_layers(model, layers, skipped)
    for layer in layers:
        layer.attach()

    def follow(model: nn.Module, args: Any) -> None:
        for layer in layers:
            if layer.has_changed():
                layer.follow()

    handle = model.register_forward_pre_hook(follow)

    def detach() -> None:
        handle.remove()
        for layer in layers:
            layer.detach()

    return detach
