"""SC-LoRA (arXiv 2505.23724): an adapter that begins in directions of the task's outputs that general text has less of.

Of each adapted layer with outputs h = W0 x, the covariance over general text is subtracted from that over the task's
training data: D = (1 - beta) mean(h h^T) - beta mean(h h^T), uncentred means over tokens. With Q the r eigenvectors of
D that have the largest eigenvalues, B begins as Q, A as Q^T W0 / s and W0 as W0 - s B A, so the model is what it was.

Where a layer has fewer inputs x than outputs, W0 = U R and D = U R E R^T U^T, with E the same difference for x: E is
smaller to keep, and R E R^T to decompose. Directions outside of the span of U, which such a layer cannot give and where
D is 0, are then left out even if all other eigenvalues are below 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_ggpo.errors import UserError

BETA = 0.8
"""Weight of general text: by what others report, the paper's for knowledge of the world; 0.5 and 0.9 for safety."""

ROWS = 256
"""Rows of the task and of general text, at most; its authors are reported to take as many."""

GROUP_BYTES = 4 * 2**30
"""Covariances that exist at once; where a model's layers have more, all rows are read once for each group of them."""

Batch = Mapping[str, Tensor]
Layers = Mapping[str, Any]
"""Layers of peft's by name; what is read of them here is in none of its base classes."""


@torch.no_grad()
def begin_in_subspace(model: PeftModel, task: Iterable[Batch], general: Iterable[Batch], beta: float) -> None:
    """Give the adapter on `model` the starting values of SC-LoRA, and take s B A off W0, in place.

    Args:
        model: With a LoRA adapter that gives 0 yet.
        task: Batches of training data, of which `ROWS` rows are read; "labels" are left out.
        general: Batches of general text, likewise.
        beta: Weight of general text, from 0 to 1.

    A layer gets fewer ranks than it was to have if it has fewer inputs or outputs.

    Raises:
        UserError: an adapted layer is not linear, or sees something else than one vector for each token or row.
    """
    layers: Layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in layers.items():
        if not isinstance(layer.get_base_layer(), (nn.Linear, Conv1D)):
            raise _refusal(name, "is not linear")
    sources = [(1 - beta, _first_rows(task)), (-beta, _first_rows(general))]
    training = model.training
    model.eval()
    directions: dict[str, Tensor] = {}
    for group in _groups(layers):
        differences = covariance_differences(model, {name: layers[name] for name in group}, sources)
        directions |= {name: _directions(layers[name], differences.pop(name)) for name in group}
    for name, layer in layers.items():
        _begin(layer, directions[name])
    model.train(training)


def covariance_differences(
    model: nn.Module, layers: Layers, sources: Sequence[tuple[float, Sequence[Batch]]]
) -> dict[str, Tensor]:
    """The mean of h h^T over the tokens of each source, times its weight, summed: (k, k) of each layer, float32.

    h are a layer's outputs W0 x, without a bias, or its inputs x if these have fewer elements. Behind a pooling layer,
    which leaves one vector for each row, it is the mean over rows. Padding does not count.
    """
    sizes = {name: _size(layer) for name, layer in layers.items()}
    sums = {name: torch.zeros(size, size, device=next(model.parameters()).device) for name, size in sizes.items()}
    for weight, batches in sources:
        passes = [read(batch) for batch in batches]
        per_token = weight / sum(int(mask.sum()) for _, mask in passes)
        per_row = weight / sum(len(mask) for _, mask in passes)
        for inputs, mask in passes:
            with _watching(layers, partial(_add, sums, mask, per_token, per_row)):
                model(**inputs)
    return sums


def _add(sums: Mapping[str, Tensor], mask: Tensor, per_token: float, per_row: float, name: str, seen: Tensor) -> None:
    """Add the outer products of what is seen of a layer in one batch."""
    h = seen.flatten(0, -2).float()
    if len(h) == mask.numel():
        h = h[mask.flatten()]
        sums[name].addmm_(h.T, h, alpha=per_token)
    elif len(h) == len(mask):
        sums[name].addmm_(h.T, h, alpha=per_row)
    else:
        raise _refusal(name, "sees neither each token nor each row")


@contextmanager
def _watching(layers: Layers, add: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Have `add` called with a layer's name and its inputs or outputs, whichever are smaller, when it is called."""

    def watch(name: str, narrow: bool, base: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        add(name, inputs[0] if narrow else output if base.bias is None else output - base.bias)

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.get_base_layer().register_forward_hook(partial(watch, name, _narrow(layer)))
            hooks.callback(hook.remove)
        yield


def largest_directions(symmetric: Tensor, count: int) -> Tensor:
    """The eigenvectors (n, count) of the `count` largest eigenvalues, which may be below 0, the largest first."""
    return torch.linalg.eigh(_exact(symmetric)).eigenvectors[:, -count:].flip(1).to(symmetric)


def _directions(layer: Any, difference: Tensor) -> Tensor:
    """Q (out, r) of a layer, of the `difference` of covariances of what is smaller of it."""
    if not _narrow(layer):
        return largest_directions(difference, layer.r["default"])
    U, R = (part.to(difference) for part in torch.linalg.qr(_exact(_weight(layer))))
    return U @ largest_directions(R @ difference @ R.T, layer.r["default"])


def _exact(matrix: Tensor) -> Tensor:
    return (matrix if matrix.is_cuda else matrix.cpu()).double()  # other devices may have no float64


def _begin(layer: Any, B: Tensor) -> None:
    base, scaling, weight = layer.get_base_layer(), layer.scaling["default"], _weight(layer)
    A = B.T @ weight / scaling
    for factor, values in ((layer.lora_A, A), (layer.lora_B, B)):
        parameter = factor["default"].weight
        parameter.data = values.to(parameter.dtype).contiguous()
    rest = transpose(weight - scaling * B @ A, layer.fan_in_fan_out)
    base.weight.data = rest.to(base.weight.dtype).contiguous()


def _narrow(layer: Any) -> bool:
    """Whether a layer has fewer inputs than outputs."""
    return bool(layer.in_features < layer.out_features)


def _size(layer: Any) -> int:
    return min(layer.in_features, layer.out_features)


def _weight(layer: Any) -> Tensor:
    """W0 (out, in)."""
    return transpose(layer.get_base_layer().weight.data.float(), layer.fan_in_fan_out)


def _groups(layers: Layers) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, layer in layers.items():
        needed = 4 * _size(layer) ** 2
        if group and size + needed > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += needed
    yield group


def _first_rows(batches: Iterable[Batch]) -> list[Batch]:
    found: list[Batch] = []
    rows = 0
    for batch in batches:
        found.append({name: tensor[: ROWS - rows] for name, tensor in batch.items()})
        rows += len(batch["input_ids"])
        if rows >= ROWS:
            break
    return found


def read(batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """What a model reads of a batch, and which of its tokens are no padding, (rows, tokens)."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if "attention_mask" in batch:
        return inputs, batch["attention_mask"].bool()
    # Packed rows are padded behind their last example, with position 0.
    later = batch["position_ids"].flip(1).cummax(dim=1).values.flip(1)
    return inputs, later > 0


def _refusal(name: str, what: str) -> UserError:
    name = name.removeprefix("base_model.model.")
    return UserError(
        f"adapter.init_lora_weights 'sc_lora' needs linear layers that see each token, but {name} {what}; "
        "leave it out of target_modules."
    )
