"""LoRA layers of any class, once it has said what its parts are; those of PEFT need not be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from .kinds import Kind
from .layers import PerturbedLayer
from .passes import Passes

Factor: TypeAlias = nn.Module | Tensor | Callable[[], Tensor]


class Parts(NamedTuple):
    """What a LoRA layer with the weight W' = W0 + s B A is made of; a filter of a convolution is a row.

    Attributes:
        base: The layer that holds W0 (m, n): a linear one, a convolution or an embedding.
        A: (r, n), as a module with that weight or as a parameter. Where it is no parameter of its own, a function that
            returns it: then ||W'_i|| is exact as well, and ||G_i|| comes from a sketch.
        B: (m, r), in the same way.
        scale: s.

    Without A and B the layer is perturbed too: ||W0_i|| then stands for ||W'_i||.
    """

    base: nn.Module
    A: Factor | None = None
    B: Factor | None = None
    scale: Any = 1.0


PartsOf: TypeAlias = Callable[[Any], Parts | None]

_PARTS: dict[type[nn.Module], PartsOf] = {}


def register_layer(cls: type[nn.Module], parts: PartsOf) -> None:
    """Have GGPO perturb the layers of a LoRA class, and of those that inherit from it::

        register_layer(MyLoRALinear, lambda m: Parts(base=m.linear, A=m.lora_A, B=m.lora_B, scale=m.scaling))

    An object of the class is either a layer of the model, or stands in for the ``forward`` of one, as those of
    sd-scripts and LyCORIS do. Its own ``forward`` is called as ever, and x eps^T is added to what it returns, in the
    passes in which it is in training mode.

    Args:
        cls: The class.
        parts: Function of such a layer: its parts, or None as long as it adapts nothing (rank 0, or merged). It is
            called in each forward pass of the model, so it should only look things up.

    Raises:
        TypeError: ``cls`` is no class of modules.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_layer takes a class that inherits from torch.nn.Module, not {cls!r}")
    _PARTS[cls] = parts


def own_adapter(module: nn.Module) -> nn.Module | None:
    """What adapts a module and is of a class that has been registered: itself, or what stands in for its forward."""
    owner = getattr(vars(module).get("forward"), "__self__", None)
    owner = owner.adapter if isinstance(owner, OwnLayer) else owner
    return next((one for one in (owner, module) if isinstance(one, nn.Module) and _parts_of(one)), None)


def own_parts(adapter: nn.Module) -> Parts | None:
    """The parts of such an adapter; None if it adapts nothing now."""
    parts_of = _parts_of(adapter)
    return parts_of(adapter) if parts_of else None


def _parts_of(adapter: nn.Module) -> PartsOf | None:
    return next((_PARTS[cls] for cls in type(adapter).__mro__ if cls in _PARTS), None)


class Computed:
    """A or B that is made anew of what is trained."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make

    @property
    def weight(self) -> Tensor:
        return self._make()


class OwnLayer(PerturbedLayer):
    """A module that ``adapter``, an object of a registered class, adapts; it may be the adapter itself."""

    def __init__(self, name: str, index: int, module: Any, kind: Kind, passes: Passes, adapter: nn.Module) -> None:
        self.adapter = adapter
        self.outside = adapter is not module
        super().__init__(name, index, module, kind, passes)

    def _base_layer(self) -> Any:
        parts = own_parts(self.adapter)
        assert parts is not None  # or it would not have been found
        return parts.base

    def trains(self) -> bool:
        return self.adapter.training

    def _is_off(self) -> bool:
        return False

    def _names(self) -> list[str]:
        return [] if own_parts(self.adapter) is None else ["own"]

    def _factor_modules(self, names: list[str]) -> tuple[list[Any], list[Any], list[Any]]:
        given = [one for one in self._factors() if one is not None]
        a, b = ([one if isinstance(one, nn.Module | Tensor) else Computed(one)] for one in given) if given else ([], [])
        return (a, b, []) if self._fit(a, b) else ([], [], [])

    def _factors(self) -> tuple[Factor | None, Factor | None]:
        parts = own_parts(self.adapter)
        return (None, None) if parts is None else (parts.A, parts.B)

    def _is_fusable(self, name: str) -> bool:
        return False

    def has_gradients(self) -> bool:
        return bool(self.a) and not any(isinstance(one, Computed) for one in (*self.a, *self.b))

    def _state(self) -> tuple[list[Any], list[Any]]:
        given = [one for one in self._factors() if isinstance(one, nn.Module | Tensor)]
        return given, [*self.column_scaling()]

    def column_scaling(self) -> list[float]:
        parts = own_parts(self.adapter)
        return [] if parts is None else [float(parts.scale) for rank in self.ranks() for _ in range(rank)]

    def trained(self) -> list[Tensor]:
        frozen = {id(parameter) for parameter in self.base.parameters()}
        return [one for one in self.adapter.parameters() if id(one) not in frozen]
