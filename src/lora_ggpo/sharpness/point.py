"""A trained model as a point of a space of parameters, and the loss around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lora_ggpo.data.spool import numbers
from lora_ggpo.errors import UserError
from lora_ggpo.tasks import NO_LOSS
from lora_ggpo.training.reuse import load_trained
from lora_ggpo.training.scorer import fixed_sample

Space = Literal["weights", "adapter"]
Parameters = Mapping[str, Tensor]
Batch = dict[str, Tensor]

LOSS, GRADIENT, PRODUCT = 1, 3, 8
"""What a loss, a gradient and a product with the Hessian cost, about, in forward passes over the sample."""


@dataclass(frozen=True)
class Point:
    """A function L(theta) over some of a model's parameters, the others held still.

    Attributes:
        model: In eval mode, so that L is deterministic. It is never changed.
        parameters: theta*, the trained values: matrices of float32 (float64 in tests) by name.
        row_dims: For each matrix, which of its dimensions counts output neurons ("rows", whatever the storage).
        batches: The sample that L is the mean loss of.
        counts: What each batch's loss is a mean over: examples, or completion tokens.
        computed: Called after each pass over the sample with its cost, about, in forward passes.
    """

    model: nn.Module
    parameters: Parameters
    row_dims: Mapping[str, int]
    batches: Sequence[Batch]
    counts: Sequence[int]
    computed: Callable[[int], None] = lambda passes: None

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return sum(p.numel() for p in self.parameters.values())

    def batch_loss(self, parameters: Parameters, index: int) -> Tensor:
        """The part of L that batch `index` contributes; L is the sum of the parts."""
        loss: Tensor = functional_call(self.model, dict(parameters), kwargs=self.batches[index]).loss
        return loss * (self.counts[index] / sum(self.counts))

    def loss(self, parameters: Parameters) -> float:
        """L at `parameters`, which may be some of the model's parameters only."""
        with torch.no_grad():
            loss = sum(float(self.batch_loss(parameters, index)) for index in range(len(self.batches)))
        self.computed(LOSS)
        return loss

    def gradient(self, parameters: Parameters) -> dict[str, Tensor]:
        """dL/dtheta at `parameters`, a batch at a time."""
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for index in range(len(self.batches)):
            parts = torch.autograd.grad(self.batch_loss(leaves, index), list(leaves.values()))
            for sum_, part in zip(total.values(), parts, strict=True):
                sum_.add_(part)
        self.computed(GRADIENT)
        return total

    def hessian_product(self, vector: Tensor) -> Tensor:
        """The Hessian of L at theta* times a vector of `size` numbers of theta's dtype, by two gradients."""
        split = vector.split([p.numel() for p in self.parameters.values()])
        directions = [part.view_as(p) for part, p in zip(split, self.parameters.values(), strict=True)]
        leaves = {name: p.detach().requires_grad_() for name, p in self.parameters.items()}
        total = torch.zeros_like(vector)
        for index in range(len(self.batches)):
            loss = self.batch_loss(leaves, index)
            gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
            products = torch.autograd.grad(gradients, list(leaves.values()), directions, materialize_grads=True)
            total += torch.cat([product.reshape(-1) for product in products])
        self.computed(PRODUCT)
        return total

    def signs(self, generator: torch.Generator) -> Tensor:
        """A vector of `size` random signs."""
        first = next(iter(self.parameters.values()))
        bits = torch.randint(0, 2, (self.size,), generator=generator, dtype=torch.int8)
        return bits.to(first.device, first.dtype).mul_(2).sub_(1)


def load_point(
    folder: Path, space: Space, split: str, rows: int, batch_size: int = 32, base: str | None = None
) -> Point:
    """The trained model of a finished run as a point.

    Args:
        space: ``"weights"``: W' = W0 + sBA of every layer that carries the adapter (of every linear layer but the
            head for a run without one). ``"adapter"``: its A and B.
        split: Set of the run that L is measured on: train (its labels as trained on), validation or test.
        rows: At most as many rows, the same ones for every run on the data.
        base: Where the run's base model lies now, if it has moved.

    Raises:
        UserError: the run is unfinished, the split is empty, or there is no such space (see `check_space`).
    """
    model, tokenizer, recipe, task = load_trained(folder, base=base)
    check_space(folder, space, adapter=recipe.adapter is not None, quantise=recipe.quantise)
    sample = fixed_sample(getattr(task.load(recipe.data), split), rows)
    if not len(sample):
        raise UserError(f"{folder}: its {split} set has no rows.")
    if task.has_reference:
        raise UserError(
            f"{folder} is a run of task {recipe.task.kind}, whose loss is not the model's own; none is measured."
        )
    encoded = task.learnt(task.encode(sample, tokenizer))
    collate = task.collator(tokenizer)
    order = np.argsort(-numbers(encoded, "length"), kind="stable")  # batches of like length
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    parts = (encoded.select(order[start : start + batch_size]) for start in range(0, len(order), batch_size))
    batches = [{name: t.to(device) for name, t in collate(part.to_list()).items()} for part in parts]
    model = model.float().to(device)
    if space == "weights":
        return make_point(*_merged(model), batches)
    factors = [name for name, p in model.named_parameters() if "lora_" in name and p.dim() == 2]
    return make_point(model, factors, batches)


def check_space(folder: Path, space: Space, *, adapter: bool, quantise: str | None) -> None:
    """Check that the run in `folder` has the parameters of `space`, and that they can be moved.

    Raises:
        UserError: it has no adapter and the space is the adapter's, or its weights are quantised.
    """
    if quantise:
        raise UserError(
            f"{folder} was trained on weights in {quantise}, around which no sharpness is measured; "
            "give runs without quantise."
        )
    if space == "adapter" and not adapter:
        raise UserError(f"{folder} has no adapter, so it has no adapter space; measure it with --space weights.")


def make_point(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> Point:
    """`model` as it is now, as a point of the space of its parameters `names`."""
    model.eval().requires_grad_(False)
    # The fused attention kernels of a CPU cannot be differentiated twice.
    if hasattr(model, "set_attn_implementation"):
        cast(Any, model).set_attn_implementation("eager")
    parameters = {name: model.get_parameter(name).detach() for name in names}
    transposed = {f"{name}.weight" for name, part in model.named_modules() if type(part) is Conv1D}
    row_dims = {name: int(name in transposed) for name in names}
    behind = 0 if getattr(model.config, "is_encoder_decoder", False) else 1
    return Point(model, parameters, row_dims, batches, [_count(batch["labels"], behind) for batch in batches])


def _merged(model: Any) -> tuple[nn.Module, list[str]]:
    if isinstance(model, PeftModel):
        prefix = "base_model.model."
        names = [name.removeprefix(prefix) for name, part in model.named_modules() if isinstance(part, LoraLayer)]
        return cast(nn.Module, model.merge_and_unload()), [f"{name}.weight" for name in names]
    inside = f"{model.base_model_prefix}."
    linear = [name for name, part in model.named_modules() if type(part) in (nn.Linear, Conv1D)]
    head = model.get_output_embeddings()
    return model, [
        f"{name}.weight" for name in linear if name.startswith(inside) and model.get_submodule(name) is not head
    ]


def _count(labels: Tensor, behind: int) -> int:
    """Terms of the mean that a model's own loss is: examples, or targets `behind` the token that they are read at."""
    return labels.shape[0] if labels.dim() == 1 else int((labels[:, behind:] != NO_LOSS).sum())


def rows_view(vector: Tensor, dim: int) -> Tensor:
    """One number a row, (m,), shaped to multiply a matrix whose rows are dimension `dim`."""
    return vector.unsqueeze(1 - dim)


def row_norms_squared(parameters: Parameters, row_dims: Mapping[str, int]) -> dict[str, Tensor]:
    """||row||^2 of each matrix, (m,)."""
    return {name: p.square().sum(1 - row_dims[name]) for name, p in parameters.items()}


def move(parameters: Parameters, direction: Parameters, size: float = 1.0) -> dict[str, Tensor]:
    """parameters + size * direction."""
    return {name: torch.add(p, direction[name], alpha=size) for name, p in parameters.items()}
