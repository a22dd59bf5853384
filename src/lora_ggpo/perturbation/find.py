"""Which layers of a model can be perturbed, and why the others cannot."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .layers import QUANTISED, PerturbedLayer
from .passes import Passes
from .weights import class_of
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
    module: BaseTunerLayer
    reason: str

    def is_active(self) -> bool:
        """Whether an active adapter has it."""
        adapters = {name for kind in self.module.adapter_layer_names for name in getattr(self.module, kind)}
        return not adapters.isdisjoint(self.module.active_adapters)

    def entries(self) -> int:
        """Entries of the weight that is adapted."""
        module: Any = self.module
        base = module.get_base_layer()
        weight = module.get_param() if hasattr(module, "get_param") else getattr(base, "weight", None)
        weight = getattr(base, "in_proj_weight", None) if weight is None else weight
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return int(getattr(weight, "ds_numel", weight.numel()))
        return int(getattr(module, "in_features", 0) * getattr(module, "out_features", 0))


def find_layers(
    model: nn.Module, noise: str, passes: Passes | None = None, known: Sequence[PerturbedLayer] = ()
) -> tuple[list[PerturbedLayer], list[Skipped]]:
    """The LoRA layers of a model that can be perturbed, those ``known`` before first, and the adapted ones that cannot.

    Raises:
        ValueError: the model is, or contains, a ``DataParallel`` over several devices.
    """
    passes = passes or Passes()
    layers, skipped = list(known), []
    done, never_called = {id(layer.module) for layer in known}, set()
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ValueError(DATA_PARALLEL)
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
            never_called.add(id(module.out_proj))
        if not isinstance(module, BaseTunerLayer) or isinstance(module, TrainableTokensLayer) or id(module) in done:
            continue
        reason = _ATTENTION if id(module) in never_called else _unsupported(module)
        if reason:
            skipped.append(Skipped(name, module, reason))
        else:
            layers.append(PerturbedLayer(name, len(layers), cast(LoraLinear, module), noise, passes))
    return layers, skipped


def check_layers(model: nn.Module, layers: Sequence[PerturbedLayer], skipped: Sequence[Skipped]) -> None:
    """Refuse a model that cannot be perturbed.

    Raises:
        ValueError: it has no layer that can be, or it is perturbed already.
    """
    if not layers:
        why = f": GGPO cannot perturb {_names(skipped)}" if skipped else _without_layers(model)
        raise ValueError(f"GGPO found no LoRA layer on a linear base layer in this model{why}")
    if any(isinstance(layer.base.__dict__.get("forward"), PerturbedLayer) for layer in layers):
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


def _unsupported(module: BaseTunerLayer) -> str | None:
    base: Any = module.get_base_layer()
    kind = class_of(cast(nn.Module, module))
    tuner = next(cls.__name__ for cls in kind.__mro__ if cls.__name__.endswith("Layer")).removesuffix("Layer")
    if tuner != "Lora":
        return f"{tuner} on {type(base).__name__}, not LoRA"
    quantised = kind.__name__ in QUANTISED
    if quantised and is_cut(base.weight):
        return "a quantised weight under ZeRO-3"
    if not quantised:
        if kind is not LoraLinear or class_of(base) not in (nn.Linear, NonDynamicallyQuantizableLinear, Conv1D):
            return f"LoRA on {type(base).__name__}"
        if not base.weight.is_floating_point() or base.weight.is_meta:
            return f"a base weight of dtype {base.weight.dtype} on {base.weight.device}"
    layer = cast(LoraLayer, module)
    variants = {type(variant).__name__ for variant in layer.lora_variant.values()} - {"DoraLinearVariant"}
    return f"the {min(variants)} of LoRA" if variants else None


def _without_layers(model: nn.Module) -> str:
    configs = getattr(model, "peft_config", None)
    kinds = sorted({str(getattr(c.peft_type, "value", c.peft_type)) for c in configs.values()}) if configs else []
    return f": its adapter is {', '.join(kinds)}" if kinds else "; add an adapter with PEFT first"
