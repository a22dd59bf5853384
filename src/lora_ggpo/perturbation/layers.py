"""One PEFT LoRA layer as the method sees it: thin factors, and a base layer whose forward is perturbed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from .linear import largest_block, perturbed_linear
from .noise import NOISES, mix, noise_kind
from .passes import Passes
from .weights import BaseWeight, class_of

QUANTISED = ("Linear4bit", "Linear8bitLt", "TorchaoLoraLinear")
"""PEFT's LoRA layers on bitsandbytes' and torchao's weights; named, since to import them needs these libraries."""


class PerturbedLayer:
    """A LoRA layer W' = W0 + s B A with W0 (m, n), B (m, r), A (r, n).

    Attached, it stands in for ``base_layer.forward``, so that LoRA's own ``base_layer(x)`` computes x (W0 + eps)^T
    while an active, unmerged adapter trains in one of the model's ``passes``; outside them, in evaluation, under
    ``disable_adapter()`` and once merged it is the forward it replaced.

    Attributes:
        tau: Noise size of each row of W0 (m,); None is no noise.
        scale: tau with the signs of this draw.
        a, b, magnitudes: The modules of the active adapters: A, B, and DoRA's magnitudes.
        w0_norms: ||W0_i||^2 (m,).
    """

    original: Callable[..., Tensor]

    def __init__(self, name: str, index: int, module: LoraLinear, noise: str, passes: Passes) -> None:
        self.name, self.index, self.module, self.passes = name, index, module, passes
        self.base: Any = module.get_base_layer()
        self.w0 = BaseWeight(self.base, class_of(module).__name__ in QUANTISED)
        self.m, self.n = self.w0.m, self.w0.n
        self.noise = noise_kind(noise, self.w0.device)
        self.tau: Tensor | None = None
        self.scale: Tensor | None = None
        self.draw_seed = 0
        self._attached = False
        self._measure()
        self.follow()

    # --- the forward pass ---

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._perturbs():
            return self.original(x, *args, **kwargs)
        return (self._uncompiled if torch.compiler.is_compiling() else self._forward)(x, *args, **kwargs)

    # TorchDynamo cannot trace noise seeded from Python: a compiled model breaks its graph here and goes on behind it.
    @torch.compiler.disable
    def _uncompiled(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(x, *args, **kwargs)

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.passes.noisy(self.index) or self.scale is None:
            return self.original(x, *args, **kwargs)
        return self._perturbed(x, self.scale)

    def _perturbed(self, x: Tensor, scale: Tensor) -> Tensor:
        base, noise = self.base, (scale, self.noise, self.draw_seed)
        if self.w0.quantised:
            y = self.original(x)
            return y + perturbed_linear(x, None, None, *noise).to(y.dtype)
        return perturbed_linear(x, base.weight, base.bias, *noise, self.w0.transposed)

    def _perturbs(self) -> bool:
        module = self.module
        training = module.training and self.base.training  # after unload(), eval() reaches the base layer alone
        return training and not module.disable_adapters and not module.merged and bool(self._names())

    def redraw(self, seed: int, number: int) -> None:
        """Take up draw ``number`` of the noise of ``seed``, at the sizes ``tau`` has now."""
        self.draw_seed = mix(seed, number, self.index)
        signs = NOISES[self.noise].signs
        if self.tau is None or signs is None:
            self.scale = self.tau
        else:
            self.scale = self.tau * signs(self.draw_seed, self.m, self.w0_norms.device)

    def attach(self) -> None:
        if not self._attached:
            self._attached, self.original = True, self.base.forward
            self._own_forward = self.base.__dict__.get("forward")
            self.base.forward = self

    def detach(self) -> None:
        if self.base.__dict__.get("forward") is self:
            del self.base.forward
            if self._own_forward is not None:  # accelerate, for one, sets a forward on the instance too
                self.base.forward = self._own_forward

    # --- the adapters that are active ---

    def _names(self) -> list[str]:
        return [name for name in self.module.active_adapters if name in self.module.lora_A]

    # Found once: to look them up by name in every step would take longer than all that is computed from them.
    def follow(self) -> None:
        """Take up the modules, ranks and scaling of the adapters that are active now."""
        names, module = self._names(), self.module
        self.a: list[Any] = [module.lora_A[name] for name in names]
        self.b: list[Any] = [module.lora_B[name] for name in names]
        dora = module.lora_magnitude_vector
        self.magnitudes: list[Any] = [dora[name] for name in names if name in dora][:1]
        if any(a not in self._measured for a in self.a):  # PiSSA, for one, changes W0 as it makes an adapter
            self._measure()
        self._factors, self._scaling = self._state()

    def _measure(self) -> None:
        self.w0_norms = self.w0.row_norms_squared()
        self._measured = list(self.module.lora_A.values())

    def _state(self) -> tuple[list[Any], list[Any]]:
        """The A of each active adapter and its rank, and the scaling: a tensor written in place, perhaps."""
        adapters, scaling = self.module.lora_A, self.module.scaling
        factors: list[Any] = []
        scales: list[Any] = []
        for name in self._names():
            a, s = adapters[name], scaling[name]
            factors += a, _rank(a)
            scales.append((s, s._version) if isinstance(s, Tensor) else s)
        return factors, scales

    def has_changed(self) -> bool:
        """Whether something is not as it was taken up."""
        return self._state() != (self._factors, self._scaling)

    def has_other_factors(self) -> bool:
        """Whether a gradient of before is one of other adapters than those that are active now."""
        return self._state()[0] != self._factors

    def ranks(self) -> list[int]:
        return [_rank(a) for a in self.a]

    def column_scaling(self) -> list[float]:
        """s of each of the r columns of B, over all active adapters."""
        scales = [float(self.module.scaling[name]) for name in self._names()]
        return [s for s, rank in zip(scales, self.ranks(), strict=True) for _ in range(rank)]

    def trained(self) -> list[Tensor]:
        """A and B of the active adapters, and DoRA's magnitudes."""
        return [module.weight for module in (*self.a, *self.b, *self.magnitudes)]

    def dora_scales_base_noise(self) -> bool:
        """Whether DoRA's row scale acts on the noisy base output too: peft reuses that output unless dropout is on."""
        return all(isinstance(self.module.lora_dropout[name], nn.Identity) for name in self._names())

    def block_bytes(self) -> int:
        """Bytes of the largest block of rows of W0 + eps that is formed at a time."""
        entries, by_kernel = largest_block(self.m, self.n, self.noise, self.w0_norms.device)
        return entries * (self.base.weight if by_kernel and not self.w0.quantised else self.w0_norms).element_size()


# Hot-swapping changes the weights of A and B, and leaves the rank that PEFT remembers.
def _rank(a: Any) -> int:
    weight = a.weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])
