"""One adapted layer as the method sees it: thin factors where it has them, and a forward that is perturbed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.xlora.layer import XLoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .compiled import in_checkpoint
from .kinds import Kind
from .linear import Thin, largest_block, perturbed_linear, product_dtype, thin_linear
from .noise import Factors, Noise, Seeded
from .passes import Passes
from .weights import BaseWeight, CalledWeight, class_of
from .zero import is_cut

PLAIN_FORWARD = (
    *("Linear", "Linear4bit", "Linear8bitLt", "TorchaoLoraLinear"),
    *("GPTQLoraLinear", "AwqLoraLinear", "HqqLoraLinear", "EetqLoraLinear", "AqlmLoraLinear"),
)
"""PEFT's LoRA layers whose forward is base(x) + s B A x; named, since to import them needs other libraries."""

_WINDOW = ("dilation", "padding_mode")
"""What A must have of a convolution, and PEFT does not give it: else the adapter sees other inputs than W0 does."""

_SCALES_ROWS = tuple(f"Dora{kind}Variant" for kind in ("Linear", "Conv1d", "Conv2d", "Conv3d"))
"""PEFT's variants of LoRA that scale the rows of W0 + s B A; of one of them alone that gives W'."""


class PerturbedLayer:
    """A layer of a PEFT adapter with the weight W' = W0 + delta, W0 (m, n); for LoRA delta = s B A, B (m, r), A (r, n).

    Attached, it stands in for the ``forward`` of PEFT's layer, and adds x eps^T to what that returns while an active,
    unmerged adapter trains in one of the model's ``passes``. Outside them, in evaluation, under ``disable_adapter()``
    and once merged it is the forward it replaced. Whatever the adapter does to W0, eps is on the whole of W'.

    Attributes:
        tau: Noise size of each row of W' (m,); None is no noise.
        noise: eps of the pass that is running; None outside.
        sketch: R (k, n) and S (m, k) = 0 of the optimizer step: x (S R)^T is added too, which is 0, so that
            dL/dS = G R^T; None if it is not asked for.
        names: The active adapters that this layer has.
        a, b, magnitudes: The modules of the active LoRA adapters: A, B, and DoRA's magnitudes.
        w0_norms: ||W0_i||^2 (m,).
        reached, reached_in_step: Whether the last pass, or one of this optimizer step, has called it.
        always_reached: Whether a graph has it where a call cannot be noted.
    """

    original: Callable[..., Tensor]
    outside = False
    """Whether the adapter is no part of the model, and so has a training mode of its own."""

    def __init__(self, name: str, index: int, module: Any, kind: Kind, passes: Passes) -> None:
        self.name, self.index, self.module, self.kind, self.passes = name, index, module, kind, passes
        self.base: Any = self._base_layer()
        self.w0 = self._read()
        self.m, self.n = self.w0.m, self.w0.n
        self.tau: Tensor | None = None
        self.noise: Noise = None
        self.sketch: Factors | None = None
        self.reached = self.reached_in_step = self.always_reached = False
        self._attached, self._own_forward = False, module.__dict__.get("forward")
        self.a: list[Any] = []
        self._measure()
        self.follow()

    def _base_layer(self) -> Any:
        return self.module.get_base_layer()

    def _read(self) -> BaseWeight:
        if self.kind.called:
            return CalledWeight(self.base, self.module.in_features)
        return BaseWeight(self.base, self.kind.transposed)

    # --- the forward pass ---

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._perturbs():
            return self.original(x, *args, **kwargs)
        self._note()
        if torch.compiler.is_compiling() and isinstance(self.noise, Seeded):
            return self._eagerly(x, *args, **kwargs)
        return self._forward(x, *args, **kwargs)

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.noise is None and self.sketch is None and not self.passes.fuse:
            return self.original(x, *args, **kwargs)
        if self._fusable and not args and not kwargs and not isinstance(self.a[0].weight, DTensor):
            return self._fused(x)
        return self._with_noise(self.original(x, *args, **kwargs), x, self.noise)

    # A seed that a graph had in it would compile each draw anew.
    _eagerly = torch.compiler.disable(_forward)

    def _note(self) -> None:
        """Note that a pass has called the layer. Inside a compiled checkpoint that is known of the graph alone."""
        if torch.compiler.is_compiling() and in_checkpoint():
            self._note_for_good()
        else:
            self.reached = self.reached_in_step = True

    @torch.compiler.assume_constant_result
    def _note_for_good(self) -> None:
        self.reached = self.always_reached = True

    def _fused(self, x: Tensor) -> Tensor:
        """PEFT's LoRA forward, with the noise in it."""
        noise, base, given = self.noise, self.base, x
        scaling, named = self.module.scaling, zip(self.a, self.b, self._active_names(), strict=True)
        adapters = [Thin(a.weight, b.weight, scaling[name]) for a, b, name in named]
        x, extra = self._input(given), None
        if isinstance(noise, Seeded):
            if self._has_plain_w0():
                weights = base.weight, base.bias, noise.tau, noise.seed, self.kind.transposed
                y = self._own(perturbed_linear(given, *weights))
            else:
                y, extra = self._own(base(given)), noise
            y = thin_linear(x, y, adapters, None)
        elif self._is_frozen() and x.dtype == product_dtype(given):
            w0 = base.weight.t() if self.kind.transposed else base.weight
            y = thin_linear(x, (w0, base.bias), adapters, noise)
        else:
            y = thin_linear(x, self._own(base(given)), adapters, noise)
        for thin, b in zip(adapters, self.b, strict=True):
            y = y if b.bias is None else y + thin.s * b.bias.to(y.dtype)
        return self._with_noise(y, given, extra)

    def _with_noise(self, y: Tensor, x: Tensor, noise: Noise) -> Tensor:
        """y + x (eps + S R)^T."""
        dtype = product_dtype(x) if x.is_floating_point() else y.dtype
        if isinstance(noise, Factors):
            y = y + self.kind.thin(self.base, x, noise.v.to(dtype), noise.u.to(dtype)).to(y.dtype)
        elif isinstance(noise, Seeded) and self.kind.linear:
            y = y + perturbed_linear(x, None, None, noise.tau, noise.seed).to(y.dtype)
        elif noise is not None:
            y = y + self.kind.whole(self.base, x, noise.matrix().to(dtype)).to(y.dtype)
        if self.sketch is not None:
            v, u = self.sketch
            y = y + self.kind.thin(self.base, x.detach(), v.to(dtype), u.to(dtype)).to(y.dtype)
        return y

    def _input(self, x: Tensor) -> Tensor:
        """x in the dtype in which PEFT takes the adapter's products."""
        if torch.is_autocast_enabled(x.device.type):
            return x.to(product_dtype(x))
        return self.module._cast_input_dtype(x, self.a[0].weight.dtype)

    def _own(self, y: Tensor) -> Tensor:
        """What the base layer returned, to be written in place: a copy if somebody else may need it."""
        if torch.compiler.is_compiling():
            return y
        shared = self.w0.quantised or y._is_view() or self.base._forward_hooks
        return y.clone() if shared else y

    def _has_plain_w0(self) -> bool:
        """Whether calling the base layer is a product with its weight and nothing else."""
        return self.w0.is_plain() and not is_tampered(self.base)

    def _is_frozen(self) -> bool:
        """Whether that is so, and neither weight nor bias is trained."""
        if not self._has_plain_w0():
            return False
        return not any(one is not None and one.requires_grad for one in (self.base.weight, self.base.bias))

    def _perturbs(self) -> bool:
        if not (self.trains() or self.passes.predicts) or self._is_off() or not self._active_names():
            return False
        if torch.compiler.is_compiling():
            return self.noise is not None
        return self.passes.active()

    def trains(self) -> bool:
        """Whether it is in training mode."""
        return self.module.training and self.base.training  # after unload(), eval() reaches the base layer alone

    def _is_off(self) -> bool:
        return self.module.disable_adapters or self.module.merged

    def attach(self) -> None:
        if not self._attached:
            self._attached, self.original = True, self.module.forward
            # The compiler takes layers with one bound method alike, and each object that can be called for another.
            self.module.forward = self.forward

    def detach(self) -> None:
        if perturbed_by(self.module) is self:
            del self.module.forward
            if self._own_forward is not None:  # accelerate, for one, sets a forward on the instance too
                self.module.forward = self._own_forward

    # --- the adapters that are active ---

    def _names(self) -> list[str]:
        """The active adapters that this layer has."""
        module = self.module
        kinds = [getattr(module, kind) for kind in module.adapter_layer_names]
        return [name for name in module.active_adapters if any(name in kind for kind in kinds)]

    def _active_names(self) -> list[str]:
        """The same in a forward pass: as the pass found them; a graph looks for itself, and so guards them."""
        return self._names() if torch.compiler.is_compiling() else self.names

    # Found once: to look them up by name in every step would take longer than all that is computed from them.
    def follow(self) -> None:
        """Take up the modules, ranks and scaling of the adapters that are active now."""
        self.names = names = self._names()
        self.a, self.b, self.magnitudes = self._factor_modules(names)
        self._fusable = bool(self.a) and all(self._is_fusable(name) for name in names)
        if any(all(one is not known for known in self._measured) for one in self._state()[0]):
            self._measure()  # PiSSA, for one, changes W0 as it makes an adapter
        self._followed = self._state()

    def _measure(self) -> None:
        self.w0_norms = self.w0.row_norms_squared()
        self._measured = self._state()[0]

    def _factor_modules(self, names: list[str]) -> tuple[list[Any], list[Any], list[Any]]:
        """A and B of each of LoRA's adapters, modules or parameters, and DoRA's magnitudes; none where the weight that
        an adapter trains is not W0 + s B A, or that scaled by rows."""
        module = self.module
        mixed = isinstance(getattr(self._own_forward, "__self__", None), XLoraLayer)
        if not isinstance(module, LoraLayer) or isinstance(module, AdaLoraLayer) or mixed:
            return [], [], []
        variants = [type(module.lora_variant[name]).__name__ for name in names if name in module.lora_variant]
        kind, dora = ("lora" if module.lora_A else "lora_embedding"), module.lora_magnitude_vector
        a, b = ([getattr(module, f"{kind}_{factor}")[name] for name in names] for factor in "AB")
        magnitudes = [dora[name] for name in names if name in dora][:1]
        by_rows = not variants or (len(names) == 1 and variants[0] in _SCALES_ROWS)
        return (a, b, magnitudes) if by_rows and self._fit(a, b) else ([], [], [])

    def _fit(self, a: list[Any], b: list[Any]) -> bool:
        """Whether W0 + s B A is a weight for the input that W0 sees."""
        shapes = all(_shape(x)[1] == self.n and _shape(y) == (self.m, _shape(x)[0]) for x, y in zip(a, b, strict=True))
        return shapes and all(getattr(x, key, 0) == getattr(self.base, key, 0) for x in a for key in _WINDOW)

    def has_gradients(self) -> bool:
        """Whether A and B are known, and have gradients of their own."""
        return bool(self.a)

    def _is_fusable(self, name: str) -> bool:
        """Whether PEFT's forward is base(x) + s B A x of modules that nothing else hangs on."""
        module = self.module
        if not self.kind.linear or class_of(module).__name__ not in PLAIN_FORWARD or name in module.lora_variant:
            return False
        if self._own_forward is not None:
            return False
        factors = module.lora_A[name], module.lora_B[name]
        bare = all(type(one) is nn.Linear and not is_tampered(one) for one in factors)
        return bare and isinstance(module.lora_dropout[name], nn.Identity)

    def _state(self) -> tuple[list[Any], list[Any]]:
        """All that hangs on a change of adapters: the modules of each active one, and ranks and scaling."""
        module, modules, rest = self.module, [], []
        for name in self._names():
            parts = (getattr(module, kind) for kind in module.adapter_layer_names)
            modules += [part[name] for part in parts if name in part]
            scaling = getattr(module, "scaling", {})
            s = scaling.get(name) if isinstance(scaling, dict) else None
            rest.append((s, s._version) if isinstance(s, Tensor) else s)  # a tensor may be written in place
        return modules, [*rest, *(_shape(one)[0] for one in self.a)]

    def has_changed(self) -> bool:
        """Whether something is not as it was taken up."""
        modules, rest = self._state()
        return rest != self._followed[1] or self._are_others(modules)

    def has_other_names(self) -> bool:
        """Whether other adapters are active than those that were taken up; quicker than :meth:`has_changed`."""
        return self.names != self._names()

    def has_other_factors(self) -> bool:
        """Whether a gradient of before is one of other adapters than those that are active now."""
        return self._are_others(self._state()[0])

    def _are_others(self, now: list[Any]) -> bool:
        before = self._followed[0]
        return len(now) != len(before) or any(one is not other for one, other in zip(now, before, strict=True))

    def ranks(self) -> list[int]:
        return [_shape(a)[0] for a in self.a]

    def column_scaling(self) -> list[float]:
        """s of each of the r columns of B, over all active adapters."""
        scales = [float(self.module.scaling[name]) for name in self._names()] if self.a else []
        return [s for s, rank in zip(scales, self.ranks(), strict=True) for _ in range(rank)]

    def trained(self) -> list[Tensor]:
        """What the active adapters train here."""
        found = []
        for one in self._followed[0]:
            found += [one] if isinstance(one, Tensor) else list(one.parameters())
        return found

    def block_bytes(self) -> int:
        """Bytes of the largest block of rows of W0 + eps that is formed at a time for dense noise."""
        entries, by_kernel = largest_block(self.m, self.n, self.w0_norms.device)
        return entries * (self.w0.parameter if by_kernel and not self.w0.quantised else self.w0_norms).element_size()


def perturbed_by(module: nn.Module) -> PerturbedLayer | None:
    """What stands in for the module's forward."""
    owner = getattr(vars(module).get("forward"), "__self__", None)
    return owner if isinstance(owner, PerturbedLayer) else None


def weight_of(one: Any) -> Any:
    """A or B: a module's weight, or a parameter itself."""
    return one if isinstance(one, Tensor) else one.weight


# Hot-swapping changes the weights of A and B, and leaves the rank that PEFT remembers.
def _shape(one: Any) -> tuple[int, int]:
    """Rows and columns of A or B; a filter of a convolution is a row."""
    weight = weight_of(one)
    shape = getattr(weight, "ds_shape", weight.shape)
    return int(shape[0]), math.prod(shape[1:])


def is_tampered(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says, or its weight is not at hand without a call."""
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_hooks
    return bool(hooks) or "forward" in vars(module) or is_cut(module.weight)
