"""What is trained of a model: an adapter of peft's, its head alone, or all of it."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from lora_ggpo.errors import UserError, first_sentence, rejected
from lora_ggpo.methods.initialise import Batches, adalora_config, initialised, with_init_config
from lora_ggpo.models.architecture import Architecture
from lora_ggpo.models.load import one_sentence

_NO_LAYER = re.compile(r"target modules .* not found|modules were targeted|modules were excluded", re.IGNORECASE)


def add_adapter(
    model: PreTrainedModel,
    adapter: Mapping[str, Any] | None,
    architecture: Architecture,
    *,
    total_steps: int | None = None,
    batches: Batches | None = None,
) -> PeftModel | PreTrainedModel:
    """Put a LoRA adapter on `model`; with `adapter` None make every parameter trainable (full fine-tuning).

    Args:
        model: as `load_model` returns it. It is changed in place.
        adapter: fields of `peft.LoraConfig`, for instance {"r": 8, "target_modules": "all-linear", "use_dora": True};
            with "type": "adalora" also those of `peft.AdaLoraConfig`, where r is the average rank in the end. A recipe
            has checked their names and ranges. A new head is trained in full and saved with the adapter.
        architecture: of the model.
        total_steps: optimizer steps of the run, which AdaLoRA's schedule needs.
        batches: makes batches of training data, for starting values that come from it (EVA, CorDA, LoRA-GA).

    Raises:
        UserError: the model has not what a field names, or peft rejects one.
    """
    if adapter is None:
        return model.requires_grad_(True)
    fields = dict(adapter)
    _check_names(model, fields)
    if architecture.new_head:
        fields["modules_to_save"] = _modules_to_save(model, fields.get("modules_to_save"))
    fields["task_type"] = architecture.peft_task
    adapted = _built(model, fields, total_steps, batches)
    _check_matches(adapted, fields)
    _warn_of_what_cannot_be_merged(adapted)
    return adapted


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the saved adapter in `folder` on `model`, trainable as in training.

    Raises:
        UserError: it cannot be read, or is not for such a model.
    """
    with one_sentence("adapter", str(folder)):
        return PeftModel.from_pretrained(model, folder, is_trainable=True)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters are trained, and how many there are; of quantised weights those they stand for."""
    sizes = [(p.requires_grad, _entries(p)) for p in model.parameters()]
    return sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)


def _entries(parameter: nn.Parameter) -> int:
    if type(parameter).__name__ == "Params4bit":
        return 2 * parameter.numel() * parameter.element_size()
    return parameter.numel()


def freeze_body(model: PreTrainedModel) -> PreTrainedModel:
    """Leave only a classification model's head trainable (a linear probe)."""
    model.requires_grad_(True)
    model.base_model.requires_grad_(False)
    return model


# --- building ------------------------------------------------------------------------------------------------------


def _built(
    model: PreTrainedModel, fields: dict[str, Any], total_steps: int | None, batches: Batches | None
) -> PeftModel:
    settings = fields.keys() - {"type"}
    with rejected("adapter", settings):
        try:
            if fields.get("type", "lora") == "adalora":
                return peft.get_peft_model(model, adalora_config(_without(fields, "type"), total_steps))
            return initialised(model, LoraConfig(**with_init_config(_without(fields, "type"))), batches)
        except ValueError as error:
            if _NO_LAYER.search(str(error)):
                raise UserError(_no_layer(model, fields)) from error
            raise


def _without(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def _no_layer(model: nn.Module, fields: Mapping[str, Any]) -> str:
    layers = {name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    narrowed = [n for n in ("exclude_modules", "layers_to_transform", "layers_pattern") if fields.get(n) is not None]
    beside = f" with adapter.{' and adapter.'.join(narrowed)}" if narrowed else ""
    return (
        f"adapter.target_modules {fields.get('target_modules')!r}{beside} matches no layer that can be adapted; "
        f"the model's linear layers are called {', '.join(sorted(layers))}."
    )


def _modules_to_save(model: PreTrainedModel, chosen: list[str] | None) -> list[str]:
    """The user's choice and the whole head: every part with parameters that lies outside the pretrained body.

    peft by itself knows only "classifier" and "score"; other parts of a head (DistilBERT's "pre_classifier", say)
    would stay frozen at their random values.
    """
    known_to_peft = ("classifier", "score")
    head = [
        name
        for name, part in model.named_children()
        if name != model.base_model_prefix and name not in known_to_peft and any(True for _ in part.parameters())
    ]
    return [*(chosen or []), *(name for name in head if name not in (chosen or []))]


# --- what is known only with the model -----------------------------------------------------------------------------


def _check_names(model: PreTrainedModel, fields: Mapping[str, Any]) -> None:
    """Refuse what the model has not, where peft takes it without a word or with a traceback.

    Raises:
        UserError: a module to save, a layer to replicate or a token that is not there.
    """
    names = [name for name, _ in model.named_modules()]
    for name in fields.get("modules_to_save") or ():
        if not _named(name, names):
            raise UserError(f"adapter.modules_to_save names {name!r}, which the model has not; leave it out.")
    layers = getattr(model.config, "num_hidden_layers", None)
    for start, end in fields.get("layer_replication") or ():
        if not 0 <= start < end or (layers is not None and end > layers):
            raise UserError(
                f"adapter.layer_replication has the range [{start}, {end}], which must begin at 0 or above, not be "
                f"empty, and end at {layers} at most: the model has that many layers."
            )
    for part, indices in _token_indices(model, fields.get("trainable_token_indices")):
        rows = len(part.weight)  # type: ignore[arg-type]
        if not indices or max(indices) >= rows or len(set(indices)) < len(indices):
            raise UserError(
                f"adapter.trainable_token_indices must be different token ids below {rows}, which is how many the "
                f"embedding has, not {indices}."
            )


def _token_indices(model: PreTrainedModel, given: Any) -> Iterator[tuple[nn.Module, list[int]]]:
    """The embeddings that tokens are to be trained of, and the tokens."""
    if isinstance(given, dict):
        modules = dict(model.named_modules())
        for name, indices in given.items():
            found = [modules[full] for full in modules if _named(name, [full])]
            if not found:
                raise UserError(f"adapter.trainable_token_indices names {name!r}, which the model has not.")
            yield from ((part, indices) for part in found)
    elif given is not None:
        yield model.get_input_embeddings(), given


def _check_matches(model: PeftModel, fields: Mapping[str, Any]) -> None:
    """Say which entries of a list chose nothing: peft does so only if all of them did.

    Raises:
        UserError: a module is to be trained in full and adapted as well.
    """
    layers = [name for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)]
    everything = [name for name, _ in model.named_modules()]
    saved: Iterable[str] = getattr(model.peft_config["default"], "modules_to_save", None) or ()
    for name in _listed(fields.get("target_modules")):
        if not _named(name, layers):
            if any(_named(part, [name]) for part in saved):
                raise UserError(
                    f"adapter.target_modules names {name!r}, which is trained in full (adapter.modules_to_save, or the "
                    "head of the task); leave it out."
                )
            warnings.warn(f"adapter.target_modules names {name!r}, which matches no layer.", stacklevel=3)
    for name in _listed(fields.get("exclude_modules")):
        if not _named(name, everything):
            warnings.warn(f"adapter.exclude_modules names {name!r}, which matches no layer.", stacklevel=3)
    for index in _listed(fields.get("layers_to_transform")):
        if not any(f".{index}." in name for name in layers):
            warnings.warn(f"adapter.layers_to_transform has {index}, which matches no layer.", stacklevel=3)


def _listed(entries: Any) -> Iterable[Any]:
    return entries if isinstance(entries, (list, tuple, set)) else ()


def _named(name: str, modules: Iterable[str]) -> bool:
    """Whether one of `modules` is called `name`, which may lack the beginning."""
    return any(module == name or module.endswith(f".{name}") for module in modules)


def _warn_of_what_cannot_be_merged(model: PeftModel) -> None:
    """Say before training that an adapter cannot be merged: peft tells only when it is asked to.

    The smallest layer of each kind is merged, as a copy; quantised weights are merged unquantised in the end.
    """
    layers: dict[tuple[Any, ...], BaseTunerLayer] = {}
    adapted: list[BaseTunerLayer] = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    for layer in sorted(adapted, key=_size):
        base = layer.get_base_layer()
        without_bias = getattr(base, "bias", None) is None
        if without_bias and any(getattr(layer, "lora_bias", {}).values()):
            continue  # peft cannot merge it, but `merge` may: it gives the layer a bias where the architecture has one
        if type(getattr(base, "weight", None)) is nn.Parameter:
            layers.setdefault((type(layer), type(base), without_bias), layer)
    for layer in layers.values():
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                copy.deepcopy(layer).merge()
        except (NotImplementedError, RuntimeError, ValueError) as error:
            warnings.warn(
                f"This adapter can be trained and used, but not merged: {first_sentence(error)}", stacklevel=3
            )
            return


def _size(layer: BaseTunerLayer) -> int:
    return sum(parameter.numel() for parameter in layer.get_base_layer().parameters())
