"""What to paste into an issue: the machine, and which layers of a model the noise reaches."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..perturbation import GGPO, GGPOConfig
from ..perturbation.noise import has_kernel
from ..perturbation.passes import tied_tensors
from ..perturbation.reach import Reach, reach
from ..workspace.environment import aligned, environment


@dataclass(frozen=True)
class Checkup:
    """What was found; as a string it is what to paste into an issue.

    Attributes:
        facts: The machine, the libraries and the settings, in words.
        layers: The adapted layers after a training pass; None where no model was tried.
    """

    facts: Mapping[str, str]
    layers: Sequence[Reach] | None = None

    @property
    def bypassed(self) -> list[Reach]:
        """The layers that train without noise."""
        return [layer for layer in self.layers or () if layer.bypassed]

    def __str__(self) -> str:
        lines = aligned(self.facts.items())
        if self.layers is not None:
            lines += ["", *aligned(_table(self.layers)), "", _verdict(self.layers), *_reasons(self.layers)]
        return "\n".join(lines)


def doctor(
    model: nn.Module,
    batch: Any,
    config: GGPOConfig | None = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> Checkup:
    """Try whether the noise reaches each adapted layer of a model, by one forward and one backward pass::

        print(lora_ggpo.doctor(model, batch))

    The model is left as it was: no step is taken, and gradients, buffers, mode and random numbers are put back.

    Args:
        model: What :class:`GGPO` would be given, not perturbed yet.
        batch: What the model is called with, on its device: a mapping of keyword arguments, or one argument.
        config: The settings; None, or one with sigma 0, is the defaults.
        loss: Function of what the model returns, with a scalar to differentiate; None is its ``loss``, or else the sum
            of the tensors that it returns, each entry times a random number.

    Raises:
        ValueError: the model has no adapted layer that can be perturbed, is perturbed already, or returns nothing that
            has a gradient.
    """
    config = replace(config if config and config.sigma else GGPOConfig(), strict=False)
    with _left_as_it_was(model):
        ggpo = GGPO(model.train(), config, total_steps=1)
        try:
            output = model(**batch) if isinstance(batch, Mapping) else model(batch)
            (loss or _own_loss)(output).backward()
            layers = reach(ggpo)
        finally:
            ggpo.detach()
    return Checkup(environment() | chosen(ggpo), layers)


def chosen(ggpo: GGPO) -> dict[str, str]:
    """The settings that a method has, and what they come to on this model, in words."""
    config, devices = ggpo.config, {layer.w0_norms.device for layer in ggpo.layers}
    kernel = all(has_kernel(device) for device in devices)
    noises = {
        "factored": f"factored, of rank {config.noise_rank}",
        "dense": f"dense, {'by a Triton kernel' if kernel else 'in blocks of rows'}",
    }
    settings = {name: value for name, value in config.to_dict().items() if value != getattr(GGPOConfig(), name)}
    return {
        "ggpo": ", ".join(f"{name} {value}" for name, value in settings.items()) or "defaults",
        "noise": noises[config.noise],
        "gradient": config.gradient,
    }


def _own_loss(output: Any) -> Tensor:
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    # A random direction: along an even one, what a softmax or a normalisation returns has no gradient.
    parts = [(tensor.float() * torch.randn_like(tensor.float())).sum() for tensor in tied_tensors(output)]
    if not parts:
        raise ValueError("the model returns no tensor with a gradient; give doctor() a loss, a function of its output")
    return torch.stack(parts).sum()


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back what a training pass changes in a model, and keep GGPO's warnings, which are reported anyway."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p, _ in gradients if p.device.type == "cuda"}
    for parameter, _ in gradients:
        parameter.grad = None
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="GGPO")
        try:
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


# --- as text -------------------------------------------------------------------------------------------------------


def _table(layers: Sequence[Reach]) -> list[list[str]]:
    """Layers of one name and kind in one row."""

    def kinds(of: Iterable[Reach]) -> Counter[tuple[str, str, str]]:
        return Counter((layer.name.rpartition(".")[2], layer.kind, layer.gradient) for layer in of)

    reached = kinds(layer for layer in layers if layer.perturbed)
    rows = [[*kind[:2], str(number), str(reached[kind]), kind[2]] for kind, number in kinds(layers).items()]
    return [["layers", "kind", "number", "perturbed", "||G|| from"], *rows]


def _verdict(layers: Sequence[Reach]) -> str:
    bypassed = sum(layer.bypassed for layer in layers)
    if bypassed:
        return f"{bypassed} of {len(layers)} adapted layers train without noise."
    perturbed = sum(layer.perturbed for layer in layers)
    if perturbed == len(layers):
        return f"The noise reaches all {perturbed} adapted layers."
    return f"The noise reaches {perturbed} of {len(layers)} adapted layers; the others do not train."


def _reasons(layers: Sequence[Reach]) -> Iterator[str]:
    """Each reason with the layers that it holds for."""
    names = defaultdict(list)
    for layer in layers:
        if layer.why:
            names[layer.why].append(layer.name)
    for why, of in names.items():
        yield f"- {', '.join(of)}: {why}."
