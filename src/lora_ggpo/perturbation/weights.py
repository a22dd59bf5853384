"""W0 of an adapted layer, however it is kept: plain, transposed, quantised, or cut by FSDP or ZeRO-3."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from .noise import row_blocks
from .zero import gather, is_cut, local_rows, sum_rows

_LARGE = 256.0
"""Factor on the input of a layer that is called for its weight: in 16 bits a bias would swallow the product."""


class BaseWeight:
    """The frozen weight W0 (m, n) of a ``base`` layer, to be read; a filter of a convolution is a row of it.

    Attributes:
        transposed: Whether it is stored as (n, m).
        dtype: What its rows are computed in: float32, or float64.
    """

    def __init__(self, base: Any, transposed: bool) -> None:
        self.base, self.quantised, self.transposed = base, is_quantised(base), transposed
        self._take_up(self.matrix())

    def _take_up(self, w0: Tensor) -> None:
        cut = is_cut(self.parameter)
        shape: Any = self.parameter.ds_shape if cut else (w0.t() if self.transposed else w0).shape
        m, n = shape[0], math.prod(shape[1:])
        self.m, self.n = (n, m) if self.transposed else (m, n)
        self.dtype = torch.float64 if w0.dtype == torch.float64 else torch.float32  # 8 bits promote to nothing
        self.device = w0.device

    @property
    def parameter(self) -> Any:
        return self.base.weight

    def matrix(self) -> Tensor:
        """W0 (m, n): a view of the weight, or of a quantised one what it stands for, made anew at each call."""
        weight: Tensor = _dequantise(self.base) if self.quantised else self.parameter
        if weight.dim() > 2:
            return weight.detach().flatten(1)
        return weight.detach().t() if self.transposed else weight.detach()

    def is_plain(self) -> bool:
        """Whether this process has W0 as it is: not quantised, and not cut by FSDP or ZeRO."""
        weight = self.parameter
        return not (self.quantised or isinstance(weight, DTensor) or is_cut(weight))

    def row_norms_squared(self) -> Tensor:
        """||W0_i||^2 (m,)."""
        return self._over_rows(lambda rows: torch.linalg.vector_norm(rows, dim=1).square())

    def times(self, columns: Tensor) -> Tensor:
        """W0 C (m, k) of ``columns`` C (n, k) in ``dtype``."""
        if self.is_plain() and self.parameter.dtype == self.dtype:
            return self.matrix() @ columns
        return self._over_rows(lambda rows: rows @ columns)

    def _over_rows(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function``, additive over entries, of all rows; of a sharded W0 each process takes what it holds."""
        weight = self.parameter
        if is_cut(weight) and not self.transposed:
            first, rows = local_rows(weight)
            return sum_rows(weight, first, self._by_blocks(function, rows))
        with gather([weight]):
            w0 = self.matrix()
            if not (isinstance(w0, DTensor) and w0.placements == (Shard(0),)):
                return self._by_blocks(function, whole(w0))
            result = self._by_blocks(function, w0.to_local())
        shape = torch.Size([self.m, *result.shape[1:]])
        # Shards may be of unequal length, so that the whole's shape and strides must be told.
        stride = tuple(torch.empty(shape, device="meta").stride())
        return DTensor.from_local(result, w0.device_mesh, w0.placements, shape=shape, stride=stride).full_tensor()

    def _by_blocks(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """``function`` of some rows (k, n) in ``dtype``, a block at a time."""
        blocks = [rows[start:stop] for start, stop in row_blocks(max(len(rows), 1), self.n)]
        results = [function(block.to(self.dtype)) for block in blocks]
        return results[0] if len(results) == 1 else torch.cat(results)


class CalledWeight(BaseWeight):
    """W0 of a layer that cannot tell it, from calls: layer(x) - layer(0) = x W0^T."""

    def __init__(self, base: Any, n: int) -> None:
        self.base, self.quantised, self.transposed, self.n = base, True, False, n
        held = [t for t in (*base.parameters(), *base.buffers()) if t.is_floating_point()] or [torch.empty(0)]
        self.input_dtype, self.device = getattr(base, "compute_dtype", held[0].dtype), held[0].device
        self.dtype = torch.promote_types(self.input_dtype, torch.float32)
        self.m = self._products(torch.zeros(1, n)).shape[-1]

    def is_plain(self) -> bool:
        return False

    def row_norms_squared(self) -> Tensor:
        total = torch.zeros(self.m, dtype=self.dtype, device=self.device)
        for start, stop in row_blocks(self.n, max(self.m, self.n)):
            total += self._products(torch.eye(stop - start, self.n).roll(start, 1)).square().sum(0)
        return total

    def times(self, columns: Tensor) -> Tensor:
        return self._products(columns.t()).t()

    def is_linear(self) -> bool:
        """Whether it is linear, to the accuracy of 8 bits: a normalisation inside, for one, is not."""
        x = torch.randn(2, self.n, generator=torch.Generator().manual_seed(0))
        first, second, both = self._products(torch.cat([x, x.sum(0, keepdim=True)]))
        return bool((first + second - both).norm() <= 0.05 * both.norm())

    @torch.no_grad()
    def _products(self, rows: Tensor) -> Tensor:
        """Rows x W0^T (k, m) in ``dtype``."""
        x = torch.cat([rows.new_zeros(1, self.n), rows * _LARGE]).to(self.device, self.input_dtype)
        y = self.base(x).to(self.dtype)
        return (y[1:] - y[:1]) / _LARGE


def is_quantised(base: Any) -> bool:
    """Whether a layer's weight stands for another one: those of bitsandbytes and torchao do."""
    kind = type(base.weight)
    named = kind.__name__ in ("Params4bit", "Int8Params") or class_of(base).__name__ == "Linear4bit"
    return named or kind.__module__.startswith("torchao")


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP has sharded, put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def class_of(module: nn.Module) -> type:
    """The module's class, or the one it had before FSDP put its own in front."""
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


# peft's own dequantize_module_weight() leaves an 8-bit layer on a CPU without its scales.
def _dequantise(base: Any) -> Tensor:
    """The weight (m, n) that a layer of bitsandbytes or torchao stands for."""
    kind = type(base.weight).__name__
    if class_of(base).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        # FSDP makes a plain tensor of the packed numbers; the layer keeps what they mean.
        state = getattr(base.weight, "quant_state", None) or base.quant_state
        return dequantize_4bit(whole(base.weight.detach()), state)
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = base.weight.SCB if base.weight.SCB is not None else base.state.SCB  # the first forward pass moves them
        return int8_vectorwise_dequant(base.weight.data, scales)
    return base.weight.dequantize()
