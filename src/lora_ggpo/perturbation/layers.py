"""One PEFT LoRA layer as the method sees it: thin factors, their gradients, and a base layer that can be perturbed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers.pytorch_utils import Conv1D

from .config import NoiseChoice
from .linear import largest_block, perturbed_linear
from .noise import mix, noise_kind, row_blocks, row_signs
from .passes import Passes
from .zero import full_gradient, gathered, held_rows, is_cut, is_zero, sum_rows

QUANTISED = ("Linear4bit", "Linear8bitLt", "TorchaoLoraLinear")
"""PEFT's LoRA layers on bitsandbytes' and torchao's weights; named, since to import them needs these libraries."""


class PerturbedLayer:
    """A LoRA layer W' = W0 + s B A with W0 (m, n), B (m, r), A (r, n).

    Attached, it stands in for ``base_layer.forward``, so that LoRA's own ``base_layer(x)`` computes x (W0 + eps)^T
    while an active, unmerged adapter trains in one of the model's ``passes``; outside them, in evaluation, under
    ``disable_adapter()`` and once merged it is the forward it replaced.
    """

    def __init__(self, name: str, index: int, module: LoraLinear, noise: NoiseChoice, passes: Passes) -> None:
        self.name, self.index, self.module, self.passes = name, index, module, passes
        self.base: Any = module.get_base_layer()
        self.fan_in_fan_out = class_of(self.base) is Conv1D
        self.quantised = class_of(module).__name__ in QUANTISED
        weight = self.w0()
        self.m, self.n = self._shape(weight)
        self.noise = noise_kind(noise, weight.device)
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.w0_norms = self._w0_norms()
        self.tau: Tensor | None = None  # (m,) noise size of each row of the base weight; None is no noise
        self.scale: Tensor | None = None  # (m,) tau with the signs of this draw
        self.draw_seed = 0
        self.a: list[Any] = []
        self._factors: list[Any] | None = None
        self.follow()
        self.original: Callable[..., Tensor] | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.original is not None
        if not self._perturbs():
            return self.original(x, *args, **kwargs)
        return (self._uncompiled if torch.compiler.is_compiling() else self._forward)(x, *args, **kwargs)

    # TorchDynamo cannot trace noise seeded from Python: a compiled model breaks its graph here and goes on behind it.
    @torch.compiler.disable
    def _uncompiled(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(x, *args, **kwargs)

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.original is not None
        if not self.passes.noisy(self.index) or self.scale is None:
            return self.original(x, *args, **kwargs)
        return self._perturbed(x, self.scale)

    def _perturbed(self, x: Tensor, scale: Tensor) -> Tensor:
        base, noise = self.base, (scale, self.noise, self.draw_seed)
        if self.quantised:
            assert self.original is not None
            y = self.original(x)
            return y + perturbed_linear(x, None, None, *noise).to(y.dtype)
        return perturbed_linear(x, base.weight, base.bias, *noise, self.fan_in_fan_out)

    def redraw(self, seed: int, number: int) -> None:
        """Take up draw ``number`` of the noise of ``seed``, at the sizes ``tau`` has now."""
        self.draw_seed = mix(seed, number, self.index)
        signs = row_signs(self.noise, self.draw_seed, self.m, self.w0_norms.device)
        self.scale = self.tau if self.tau is None or signs is None else self.tau * signs

    def attach(self) -> None:
        if self.original is not None:
            return
        self.original = self.base.forward
        self._own_forward = self.base.__dict__.get("forward")
        self.base.forward = self

    def detach(self) -> None:
        if self.base.__dict__.get("forward") is not self:
            return
        del self.base.forward
        if self._own_forward is not None:  # accelerate, for one, sets a forward on the instance too
            self.base.forward = self._own_forward

    def adapters(self) -> list[str]:
        """The active adapters that this layer has."""
        return [name for name in self.module.active_adapters if name in self.module.lora_A]

    # Found once: to look them up by name in every step would take longer than all that is computed from them.
    def follow(self) -> None:
        """Take up the modules, ranks and scaling of the adapters that are active now."""
        names, module = self.adapters(), self.module
        self.a = [module.lora_A[name] for name in names]
        self.b: list[Any] = [module.lora_B[name] for name in names]
        dora = module.lora_magnitude_vector
        self.magnitudes: list[Any] = [dora[name] for name in names if name in dora]
        if self._factors is None:
            self._known = self.a
        elif any(a not in self._known for a in self.a):  # PiSSA, for one, changes W0 as it makes an adapter
            self.w0_norms = self._w0_norms()
            self._known = [a for a in module.lora_A.values() if a in self._known or a in self.a]
        self._factors, self._scaling = self._state()

    def _state(self) -> tuple[list[Any], list[Any]]:
        """The A of each active adapter and its rank, and the scaling: a tensor written in place, perhaps."""
        adapters, scaling = self.module.lora_A, self.module.scaling
        factors: list[Any] = []
        scales: list[Any] = []
        for name in self.module.active_adapters:
            if name in adapters:
                a, s = adapters[name], scaling[name]
                factors += a, _rank(a)
                scales.append((s, s._version) if isinstance(s, Tensor) else s)
        return factors, scales

    def has_changed(self) -> bool:
        """Whether something is not as it was taken up."""
        factors, scales = self._state()
        return factors != self._factors or scales != self._scaling

    def has_other_factors(self) -> bool:
        """Whether a gradient of before is one of other adapters than those that are active now."""
        return self._state()[0] != self._factors

    def ranks(self) -> list[int]:
        return [_rank(a) for a in self.a]

    def column_scaling(self) -> list[float]:
        """s of each of the r columns of B, over all active adapters."""
        scales = [float(self.module.scaling[name]) for name in self.adapters()]
        return [s for s, rank in zip(scales, self.ranks(), strict=True) for _ in range(rank)]

    def trained(self) -> list[Tensor]:
        """A and B of the active adapters, and DoRA's magnitudes."""
        return [module.weight for module in (*self.a, *self.b, *self.magnitudes)]

    def dora_scales_base_noise(self) -> bool:
        """Whether DoRA's row scale acts on the noisy base output too: peft reuses that output unless dropout is on."""
        return all(isinstance(self.module.lora_dropout[name], nn.Identity) for name in self.adapters())

    def w0(self) -> Tensor:
        """W0 (m, n): a view of the weight, or of a quantised one what it stands for, made anew at each call."""
        weight: Tensor = _dequantised(self.base) if self.quantised else self.base.weight
        return weight.detach().t() if self.fan_in_fan_out else weight.detach()

    def has_whole_w0(self) -> bool:
        """Whether this process has W0 as it is: not quantised, and not cut by FSDP or ZeRO."""
        weight = self.base.weight
        return not (self.quantised or isinstance(weight, DTensor) or is_cut(weight))

    def times(self, columns: Tensor) -> Tensor:
        """W0 C (m, k) of ``columns`` C (n, k), in float32 or float64."""
        if self.has_whole_w0() and self.base.weight.dtype == self.dtype:
            return self.w0() @ columns
        return self._over_rows(lambda rows: rows @ columns)

    def block_bytes(self) -> int:
        """Bytes of the largest block of rows of W0 + eps that is formed at a time."""
        entries, by_kernel = largest_block(self.m, self.n, self.noise, self.w0_norms.device)
        return entries * (self.base.weight if by_kernel and not self.quantised else self.w0_norms).element_size()

    def _w0_norms(self) -> Tensor:
        """||W0_i||^2 (m,)."""
        return self._over_rows(lambda rows: torch.linalg.vector_norm(rows, dim=1).square())

    def _over_rows(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function`` of all rows of W0, additive over their entries; of a sharded W0 each process takes what it
        holds."""
        weight = self.base.weight
        if is_cut(weight) and not self.fan_in_fan_out:
            first, held = held_rows(weight)
            return sum_rows(weight, first, self._by_blocks(function, held))
        with gathered([weight]):
            w0 = self.w0()
            if not (isinstance(w0, DTensor) and w0.placements == (Shard(0),)):
                return self._by_blocks(function, whole(w0))
            result = self._by_blocks(function, w0.to_local())
        shape = torch.Size([self.m, *result.shape[1:]])
        # Shards may be of unequal length, so that the whole's shape and strides must be told.
        stride = tuple(torch.empty(shape, device="meta").stride())
        gathered_rows = DTensor.from_local(result, w0.device_mesh, w0.placements, shape=shape, stride=stride)
        return gathered_rows.full_tensor()

    def _by_blocks(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """``function`` of some rows (k, n) of W0 in float32 or float64, a block at a time."""
        blocks = [rows[start:stop] for start, stop in row_blocks(max(len(rows), 1), self.n, rows.device)]
        results = [function(block.to(self.dtype)) for block in blocks]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _shape(self, w0: Tensor) -> tuple[int, int]:
        if is_cut(self.base.weight):
            stored: tuple[int, int] = self.base.weight.ds_shape
            return stored[::-1] if self.fan_in_fan_out else stored
        m, n = w0.shape
        return m, n

    def _perturbs(self) -> bool:
        module = self.module
        training = module.training and self.base.training  # after unload(), eval() reaches the base layer alone
        return training and not module.disable_adapters and not module.merged and bool(self.adapters())


def class_of(module: nn.Module) -> type:
    """The module's class, or the one it had before FSDP put its own in front."""
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


# Hot-swapping changes the weights of A and B, and leaves the rank that PEFT remembers.
def _rank(a: Any) -> int:
    weight = a.weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


# peft's own dequantize_module_weight() leaves an 8-bit layer on a CPU without its scales.
def _dequantised(base: Any) -> Tensor:
    """The weight (m, n) that a layer of bitsandbytes or torchao stands for."""
    kind = type(base.weight).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(base.weight.data, base.weight.quant_state)
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = base.weight.SCB if base.weight.SCB is not None else base.state.SCB  # the first forward pass moves them
        return int8_vectorwise_dequant(base.weight.data, scales)
    return base.weight.dequantize()


def gradient(parameter: Tensor) -> Tensor:
    """dL/dA or dL/dB of the global batch, put together; 0 where none has arrived."""
    if is_zero(parameter):
        return full_gradient(parameter)
    return whole(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP has sharded, put together; for thin factors, mostly."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
