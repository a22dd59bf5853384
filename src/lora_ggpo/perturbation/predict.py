"""The noise in evaluation mode: what a trained model predicts is then a mean over draws of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .config import GGPOConfig
from .find import check_layers, find_layers, report_skipped
from .linear import autocast_dtype
from .noise import NOISES
from .passes import Passes
from .rows import group_layers

Draw = Callable[[int, float], None]


@contextmanager
def noisy_evaluation(model: nn.Module, config: GGPOConfig) -> Iterator[Draw]:
    """Have a PEFT model in evaluation mode see noise: ``draw(number, factor)`` makes it the draw of that number, with
    ``factor`` on sigma, until the next; with the factor 0 there is none.

    The adapter may have been trained in any way. Sizes are those of the weights alone: there is no gradient, so
    ``beta`` counts as 0, and ``schedule`` and ``rise`` do not count::

        with noisy_evaluation(model, GGPOConfig(sigma=0.03)) as draw:
            for number in range(10):
                draw(number, 1.0)
                mean += model(**batch).logits.softmax(-1) / 10

    Raises:
        ValueError: the model has no adapted layer that can be perturbed, or is perturbed already.
    """
    passes = Passes()
    passes.forward = passes.predicts = True
    layers, skipped = find_layers(model, passes)
    check_layers(model, layers, skipped)
    report_skipped(skipped, config.strict)
    alone = GGPOConfig(sigma=config.sigma, beta=0.0)
    groups = group_layers(layers)

    @torch.no_grad()
    def draw(number: int, factor: float) -> None:
        for group in groups:
            group.refresh(alone, factor)
        drawn = NOISES[config.noise](layers, config.seed, number, config.noise_rank, autocast_dtype())
        for layer, noise in zip(layers, drawn, strict=True):
            layer.noise = noise if factor else None

    for layer in layers:
        layer.attach()
    try:
        yield draw
    finally:
        for layer in layers:
            layer.detach()
