"""Adapted weights that a layer reads and never calls a layer for: those of nn.MultiheadAttention and of experts.

PEFT forms W' = W0 + delta anew for each call. eps is added to it for the time of a noisy one, between two hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor
from torch.distributed.tensor import DTensor

from .kinds import KINDS
from .layers import PerturbedLayer
from .passes import Passes
from .weights import BaseWeight
from .zero import is_cut


class ReadWeight(BaseWeight):
    """W0 of a parameter by its name; of a stack of experts (E, m, n), or (E, n, m), one below the other."""

    def __init__(self, base: Any, name: str, transposed: bool) -> None:
        self.base, self.quantised, self.transposed = base, False, False
        self.name, self.stored_transposed = name, transposed
        self._take_up(self.matrix())

    @property
    def parameter(self) -> Any:
        return getattr(self.base, self.name)

    def matrix(self) -> Tensor:
        weight = self.parameter.detach()
        rows = weight.transpose(1, 2) if self.stored_transposed else weight
        return rows.reshape(-1, rows.shape[-1])

    def shaped(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """A matrix (m, n) in the form of the parameter."""
        if not self.stored_transposed:
            return matrix.view(shape)
        return matrix.view(shape[0], shape[2], shape[1]).transpose(1, 2)


class PerturbedWeight(PerturbedLayer):
    """The parameter ``parameter`` of ``owner``, which ``outer`` (None: the module itself) adapts in its forward."""

    def __init__(
        self,
        name: str,
        index: int,
        module: Any,
        passes: Passes,
        owner: Any,
        parameter: str,
        outer: PerturbedWeight | None = None,
    ) -> None:
        self.owner, self.parameter, self.outer = owner, parameter, outer or self
        self.on = False
        self._hooks: list[Any] = []
        self._plain: Tensor | None = None
        super().__init__(name, index, module, KINDS["linear"], passes)

    def _read(self) -> BaseWeight:
        transposed = isinstance(self.module, ParamWrapper) and bool(getattr(self.owner, "is_transposed", False))
        return ReadWeight(self.owner, self.parameter, transposed and getattr(self.owner, self.parameter).dim() == 3)

    # peft 0.21 adds s B A twice to the output projection (its pull request 3774).
    def _factor_modules(self, names: list[str]) -> tuple[list[Any], list[Any], list[Any]]:
        return super()._factor_modules(names) if self.outer is self else ([], [], [])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.on = self._perturbs()
        try:
            return self.original(*args, **kwargs)
        finally:
            self.on = False

    def attach(self) -> None:
        if self._hooks:
            return
        if self.outer is self:
            super().attach()
        reader = self.outer.module.get_base_layer()
        self._hooks = [  # of bound methods, which a copy of the model has of its own
            reader.register_forward_pre_hook(self._before),
            reader.register_forward_hook(self._after, always_call=True),
        ]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super().detach()

    def _before(self, *_: Any) -> None:
        if not self.outer.on:
            return
        self._note()
        if self.noise is None and self.sketch is None:
            return
        if isinstance(self.module, ParamWrapper):  # whose parametrisation lives as long as the call
            proxy: Any = self.owner.parametrizations[self.parameter][-1]
            plain = proxy.forward
            proxy.forward = lambda weight: self._noisy(plain(weight))
        else:
            self._plain = vars(self.owner)[self.parameter]
            vars(self.owner)[self.parameter] = self._noisy(self._plain)

    def _after(self, *_: Any) -> None:
        if self._plain is not None:
            vars(self.owner)[self.parameter], self._plain = self._plain, None

    def _noisy(self, weight: Tensor) -> Tensor:
        """W' + eps + S R."""
        assert isinstance(self.w0, ReadWeight)
        for added in (self.noise, self.sketch):
            if added is not None:
                weight = weight + self.w0.shaped(added.matrix(), weight.shape).to(weight.dtype)
        return weight


def reads_weight(module: Any) -> bool:
    """Whether it is a layer of PEFT for a weight that no layer is called for."""
    return isinstance(module, MultiheadAttention | ParamWrapper)


def perturbed_weight(
    name: str, index: int, module: Any, passes: Passes, outer: PerturbedWeight | None
) -> PerturbedWeight | str:
    """Such a layer perturbed, or the output projection of an attention, ``outer``, that is; or why it cannot be."""
    base = module.get_base_layer()
    parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight" if outer else "in_proj_weight"
    weight = getattr(base, parameter)
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16) or weight.is_meta:
        return f"an adapter on {parameter}, of dtype {weight.dtype} on {weight.device}, which no layer is called for"
    if isinstance(weight, DTensor) or is_cut(weight):
        return f"an adapter on {parameter}, which no layer is called for, and which is cut into pieces"
    return PerturbedWeight(name, index, module, passes, base, parameter, outer)
