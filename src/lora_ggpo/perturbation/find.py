"""Which layers of a model can be perturbed, and why the others cannot."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .inside import PerturbedWeight, perturbed_weight, reads_weight
from .kinds import Kind, kind_of
from .layers import PerturbedLayer, perturbed_by
from .own import OwnLayer, own_adapter, own_parts
from .passes import Passes
from .weights import CalledWeight, is_quantised
from .zero import is_cut

DATA_PARALLEL = (
    "GGPO cannot perturb the replicas that torch.nn.DataParallel makes on several GPUs: they would all use the first "
    "GPU's weights. Start one process a GPU with torchrun or accelerate launch, or make one GPU visible "
    "(CUDA_VISIBLE_DEVICES=0)"
)


@dataclass(frozen=True)
class Skipped:
    """An adapted layer that cannot be perturbed."""

    name: str
    module: nn.Module
    reason: str

    def is_active(self) -> bool:
        """Whether an active adapter has it."""
        if not isinstance(self.module, BaseTunerLayer):
            return True
        adapters = {name for kind in self.module.adapter_layer_names for name in getattr(self.module, kind)}
        return not adapters.isdisjoint(self.module.active_adapters)

    @property
    def base(self) -> Any:
        """The layer that is adapted."""
        return self.module.get_base_layer() if isinstance(self.module, BaseTunerLayer) else _own_base(self.module)

    def entries(self) -> int:
        """Entries of the weight that is adapted."""
        module: Any = self.module
        base = self.base
        weight = module.get_param() if hasattr(module, "get_param") else getattr(base, "weight", None)
        weight = getattr(base, "in_proj_weight", None) if weight is None else weight
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return int(getattr(weight, "ds_numel", weight.numel()))
        return int(getattr(module, "in_features", 0) * getattr(module, "out_features", 0))


def find_layers(
    model: nn.Module, passes: Passes | None = None, known: Sequence[PerturbedLayer] = ()
) -> tuple[list[PerturbedLayer], list[Skipped]]:
    """The adapted layers of a model that can be perturbed, those ``known`` before first, and those that cannot.

    Raises:
        ValueError: the model is, or contains, a ``DataParallel`` over several devices.
    """
    passes = passes or Passes()
    layers, skipped = list(known), []
    done, never_called = {id(layer.module) for layer in known}, set()
    attentions: dict[int, PerturbedWeight] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ValueError(DATA_PARALLEL)
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
            never_called.add(id(module.out_proj))
        if id(module) in done or not _is_adapted(module):
            continue
        name = name.replace("_orig_mod.", "")  # torch.compile's wrapper
        outer = attentions.get(id(module))
        if id(module) in never_called and outer is None:
            found: PerturbedLayer | str = _ATTENTION
        elif not isinstance(module, BaseTunerLayer):
            found = _own_layer(name, len(layers), module, passes)
        elif reads_weight(module) or outer is not None:
            found = perturbed_weight(name, len(layers), module, passes, outer)
        else:
            done |= {id(inner) for inner in _inner(module)}
            found = _perturbed_layer(name, len(layers), module, passes)
        if isinstance(found, str):
            skipped.append(Skipped(name, module, found))
            continue
        layers.append(found)
        if isinstance(found, PerturbedWeight) and isinstance(found.owner, nn.MultiheadAttention):
            attentions[id(found.owner.out_proj)] = found
    return layers, skipped


def in_training(model: nn.Module, layers: Sequence[PerturbedLayer]) -> bool:
    """Whether a forward pass of the model is one of training. sd-scripts, for one, keeps the model in evaluation mode
    and trains adapters that are no part of it."""
    return model.training or any(layer.outside and layer.trains() for layer in layers)


def check_layers(model: nn.Module, layers: Sequence[PerturbedLayer], skipped: Sequence[Skipped]) -> None:
    """Refuse a model that cannot be perturbed.

    Raises:
        ValueError: it has no layer that can be, or it is perturbed already.
    """
    if not layers:
        why = f": GGPO cannot perturb {_names(skipped)}" if skipped else _without_layers(model)
        raise ValueError(f"GGPO found no adapted layer that it can perturb in this model{why}")
    if any(perturbed_by(layer.module) for layer in layers):
        raise ValueError("the model is perturbed already; detach() the first GGPO before attaching another")


def report_skipped(skipped: Sequence[Skipped], strict: bool) -> None:
    """Warn of adapted layers that cannot be perturbed.

    Raises:
        ValueError: there are such layers and ``strict`` is set.
    """
    if not skipped:
        return
    message = f"GGPO cannot perturb {_names(skipped)}"
    if strict:
        raise ValueError(f"{message}; leave them out of target_modules, or set strict=False to train them plainly")
    warnings.warn(f"{message}: trained without noise", stacklevel=3)


def _names(skipped: Sequence[Skipped]) -> str:
    names = "; ".join(f"{layer.name} ({layer.reason})" for layer in skipped[:3])
    return names + (f" and {len(skipped) - 3} more" if len(skipped) > 3 else "")


_ATTENTION = "nn.MultiheadAttention reads the weight of its out_proj and never calls it"


def _inner(module: Any) -> list[BaseTunerLayer]:
    """The adapted layers that an adapted layer wraps: those of a mixed model."""
    found = []
    while isinstance(module := module.base_layer, BaseTunerLayer):
        found.append(module)
    return found


def _is_adapted(module: nn.Module) -> bool:
    if isinstance(module, BaseTunerLayer):
        return not isinstance(module, TrainableTokensLayer)
    adapter = own_adapter(module)
    return adapter is not None and own_parts(adapter) is not None


def _own_base(module: nn.Module) -> Any:
    adapter = own_adapter(module)
    parts = adapter and own_parts(adapter)
    return parts and parts.base


def _own_layer(name: str, index: int, module: nn.Module, passes: Passes) -> PerturbedLayer | str:
    """A module with an adapter of a registered class perturbed, or why it cannot be."""
    adapter, base = own_adapter(module), _own_base(module)
    kind = kind_of(base)
    if adapter is None or kind is None or kind.called:
        return f"{type(adapter).__name__} on {type(base).__name__}"
    return _unreadable(base) or OwnLayer(name, index, module, kind, passes, adapter)


def _perturbed_layer(name: str, index: int, module: Any, passes: Passes) -> PerturbedLayer | str:
    """A layer perturbed, or why it cannot be."""
    kind = kind_of(module.get_base_layer())
    reason = _unsupported(module, kind)
    return reason if reason or kind is None else PerturbedLayer(name, index, module, kind, passes)


def _unsupported(module: Any, kind: Kind | None) -> str:
    """Why a layer cannot be perturbed; empty if it can be."""
    base = module.get_base_layer()
    if _inner(module):
        return "adapters of two kinds, one on the other"
    if kind is None:
        return f"an adapter on {type(base).__name__}"
    if kind.called:
        return _not_callable(module, base)
    return _unreadable(base)


def _unreadable(base: Any) -> str:
    """Why the weight of a base layer cannot be read; empty if it can be."""
    quantised = is_quantised(base)
    if quantised and is_cut(base.weight):
        return "a quantised weight under ZeRO-3"
    if not quantised and (not base.weight.is_floating_point() or base.weight.is_meta):
        return f"a base weight of dtype {base.weight.dtype} on {base.weight.device}"
    return ""


def _not_callable(module: Any, base: nn.Module) -> str:
    """Why a layer of no type of torch cannot be taken as a linear one."""
    name = type(base).__name__
    if not isinstance(getattr(module, "in_features", None), int):
        return f"an adapter on {name}"
    try:
        linear = CalledWeight(base, module.in_features).is_linear()
    except Exception as error:  # it may be anything
        return f"an adapter on {name}, which cannot be called with a matrix: {error}"
    return "" if linear else f"an adapter on {name}, which is not linear in its input"


def _without_layers(model: nn.Module) -> str:
    configs = getattr(model, "peft_config", None)
    kinds = sorted({str(getattr(c.peft_type, "value", c.peft_type)) for c in configs.values()}) if configs else []
    if not kinds:
        return "; add an adapter with PEFT first, or tell register_layer of your own class"
    return f": its adapter is {', '.join(kinds)}, which adapts no layer's weight"
