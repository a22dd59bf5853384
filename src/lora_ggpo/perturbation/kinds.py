"""What a layer does with its weight W0 (m, n), by the type of the base layer.

A kind maps x by any weight in place of W0: by a whole one, and by a product of thin factors without forming it. To add
one, add an entry to ``KINDS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D


class Kind(NamedTuple):
    """A type of base layer.

    Attributes:
        classes: Its classes.
        whole: Function of the base layer, x and w (m, n): what the layer would return for W0 = w, without a bias.
        thin: Function of the base layer, x, v (k, n) and u (m, k): the same for w = u v.
        transposed: Whether W0 is stored as (n, m).
        linear: Whether x is (..., n), and what is returned x w^T.
        called: Whether W0 is known from calls of the base layer alone.
    """

    classes: tuple[type[nn.Module], ...]
    whole: Callable[[Any, Tensor, Tensor], Tensor]
    thin: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    transposed: bool = False
    linear: bool = False
    called: bool = False


def _linear(base: Any, x: Tensor, w: Tensor) -> Tensor:
    return functional.linear(x, w)


def _thin_linear(base: Any, x: Tensor, v: Tensor, u: Tensor) -> Tensor:
    return functional.linear(functional.linear(x, v), u)


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


def _convolution(base: Any, x: Tensor, w: Tensor) -> Tensor:
    """A row of w is the filter of an output channel, flattened."""
    return base._conv_forward(x, w.view(len(w), *base.weight.shape[1:]), None)


def _thin_convolution(base: Any, x: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """k filters, the same for each group of input channels, and then a convolution of size 1."""
    h = _convolution(base, x, v.repeat(base.groups, 1))
    ones = (1,) * (base.weight.dim() - 2)
    return _CONVOLUTIONS[base.weight.dim()](h, u.reshape(*u.shape, *ones), groups=base.groups)


def _embedding(base: Any, x: Tensor, w: Tensor) -> Tensor:
    """As a linear layer on one-hot rows: w is (width, vocabulary)."""
    return functional.embedding(x, w.t()) * getattr(base, "embed_scale", 1)  # some models' embeddings are scaled


def _thin_embedding(base: Any, x: Tensor, v: Tensor, u: Tensor) -> Tensor:
    return _embedding(base, x, v) @ u.t()


KINDS: dict[str, Kind] = {
    "linear": Kind((nn.Linear,), _linear, _thin_linear, linear=True),
    "transposed linear": Kind((Conv1D,), _linear, _thin_linear, transposed=True, linear=True),
    "convolution": Kind((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution, _thin_convolution),
    "embedding": Kind((nn.Embedding,), _embedding, _thin_embedding, transposed=True),
}


FOREIGN = Kind((), _linear, _thin_linear, linear=True, called=True)
"""A linear layer of a library that keeps W0 in a form of its own (GPTQ, AWQ, HQQ, EETQ, AQLM)."""


def kind_of(base: nn.Module) -> Kind | None:
    """The kind of a base layer; None if it is of no known type, and of torch or not called with one tensor alone."""
    known = next((kind for kind in KINDS.values() if isinstance(base, kind.classes)), None)
    return known or (None if type(base).__module__.startswith("torch.nn") else FOREIGN)
