"""What is trained of a model: an adapter of peft's, its head alone, or all of it."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from lora_ggpo.errors import UserError, explain_rejection, first_sentence
from lora_ggpo.methods.initialise import Batches, initialise
from lora_ggpo.methods.optimizers import adalora_config
from lora_ggpo.models.architecture import Architecture
from lora_ggpo.models.load import explain_unreadable
from lora_ggpo.perturbation.zero import is_cut


def add_adapter(
    model: PreTrainedModel,
    adapter: Mapping[str, Any] | None,
    architecture: Architecture,
    *,
    total_steps: int | None = None,
    batches: Batches | None = None,
    general: Batches | None = None,
) -> PeftModel | PreTrainedModel:
    """Put a LoRA adapter on `model`; with `adapter` None make every parameter trainable (full fine-tuning).

    Args:
        model: as `load_model` returns it. It is changed in place.
        adapter: fields of `peft.LoraConfig`, for instance {"r": 8, "target_modules": "all-linear", "use_dora": True};
            with "type": "adalora" also those of `peft.AdaLoraConfig`, where r is the average rank in the end. A recipe
            has checked their names and ranges. A new head is trained in full and saved with the adapter.
        architecture: of the model.
        total_steps: optimizer steps of the run, which AdaLoRA's schedule needs.
        batches: makes batches of training data, for starting values that come from it (EVA, CorDA, LoRA-GA, SC-LoRA).
        general: makes batches of general text, for SC-LoRA's.

    Raises:
        UserError: peft rejects a field, or none of the model's layers is adapted.
    """
    if adapter is None:
        return model.requires_grad_(True)
    fields = dict(adapter)
    if architecture.new_head:
        fields["modules_to_save"] = _modules_to_save(model, fields.get("modules_to_save"))
    fields["task_type"] = architecture.peft_task
    adapted = _build(model, fields, total_steps, batches, general)
    _warn_of_what_matches_nothing(adapted, adapter)
    _warn_of_what_cannot_be_merged(adapted)
    return adapted


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the saved adapter in `folder` on `model`, trainable as in training.

    Raises:
        UserError: it cannot be read, or is not for such a model.
    """
    with explain_unreadable("Adapter", str(folder)):
        return PeftModel.from_pretrained(model, folder, is_trainable=True)


def count_parameters(model: PreTrainedModel | PeftModel) -> tuple[int, int]:
    """How many parameters are trained, and how many there are; of quantised weights those they stand for."""
    if isinstance(model, PeftModel):
        trained, parameters = model.get_nb_trainable_parameters()
        return trained, parameters
    trained, parameters = model.num_parameters(only_trainable=True), model.num_parameters()
    cut: list[Any] = [p for p in model.parameters() if is_cut(p) and not p.numel()]  # which count as 0 there
    return trained + sum(p.ds_numel for p in cut if p.requires_grad), parameters + sum(p.ds_numel for p in cut)


def freeze_body(model: PreTrainedModel) -> PreTrainedModel:
    """Leave only a classification model's head trainable (a linear probe)."""
    model.requires_grad_(True)
    model.base_model.requires_grad_(False)
    return model


def freeze_head(model: PreTrainedModel | PeftModel) -> None:
    """Leave a classification model's head as it is: it was drawn, so it is saved with an adapter all the same."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, part in base.named_children():
        if name != base.base_model_prefix:
            part.requires_grad_(False)


# --- building ------------------------------------------------------------------------------------------------------


def _build(
    model: PreTrainedModel,
    fields: Mapping[str, Any],
    total_steps: int | None,
    batches: Batches | None,
    general: Batches | None,
) -> PeftModel:
    settings = {name: value for name, value in fields.items() if name != "type"}
    with explain_rejection("adapter", settings):
        try:
            if fields.get("type") == "adalora":
                return peft.get_peft_model(model, adalora_config(settings, total_steps))
            return initialise(model, settings, batches, general)
        except ValueError as error:
            if not re.search(r"not found in the base model|modules were (targeted|excluded)", str(error)):
                raise
            layers = {name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
            raise UserError(
                f"adapter matches no layer: {error} The model's linear layers are called {', '.join(sorted(layers))}."
            ) from error


def _modules_to_save(model: PreTrainedModel, chosen: list[str] | None) -> list[str]:
    """The user's choice and the whole head: every part with parameters that lies outside the pretrained body.

    peft by itself knows only "classifier" and "score"; other parts of a head (DistilBERT's "pre_classifier", say)
    would stay frozen at their random values.
    """
    body = {model.base_model_prefix, "classifier", "score"}
    head = [
        name for name, part in model.named_children() if name not in body and next(part.parameters(), None) is not None
    ]
    return list(dict.fromkeys([*(chosen or []), *head]))


# --- what peft does not say ----------------------------------------------------------------------------------------


def _warn_of_what_matches_nothing(model: PeftModel, fields: Mapping[str, Any]) -> None:
    """Name the entries of a list that chose nothing: peft speaks up only if all of them did."""
    everything = [f".{name}." for name, _ in model.named_modules()]
    adapted = [f".{name}." for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)]
    places = {"target_modules": adapted, "layers_to_transform": adapted}
    for field in ("target_modules", "layers_to_transform", "exclude_modules", "modules_to_save"):
        entries = fields.get(field)
        for entry in entries if isinstance(entries, (list, tuple, set)) else ():
            matches = str.__contains__ if field == "layers_to_transform" else str.endswith
            if not any(matches(name, f".{entry}.") for name in places.get(field, everything)):
                warnings.warn(f"adapter.{field} has {entry!r}, which matches no layer.", stacklevel=3)


def _warn_of_what_cannot_be_merged(model: PeftModel) -> None:
    """Say before training that an adapter cannot be merged: peft tells only when it is asked to.

    The smallest layer of each kind is merged, as a copy; quantised weights are merged unquantised in the end.
    """
    layers: dict[tuple[Any, ...], BaseTunerLayer] = {}
    adapted: list[BaseTunerLayer] = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    for layer in sorted(adapted, key=lambda layer: sum(p.numel() for p in layer.get_base_layer().parameters())):
        base = layer.get_base_layer()
        without_bias = getattr(base, "bias", None) is None
        if without_bias and any(getattr(layer, "lora_bias", {}).values()):
            continue  # peft cannot merge it, but `merge` may: it gives the layer a bias where the architecture has one
        weight = getattr(base, "weight", None)
        if type(weight) is nn.Parameter and not is_cut(weight):
            layers.setdefault((type(layer), type(base), without_bias), layer)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for layer in layers.values():
                copy.deepcopy(layer).merge()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        warnings.warn(f"This adapter can be trained and used, but not merged: {first_sentence(error)}", stacklevel=3)
