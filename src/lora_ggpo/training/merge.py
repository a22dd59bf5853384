"""Fold a run's adapter into its model, save the plain model, and check that what was saved computes the same."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ggpo.errors import UserError
from lora_ggpo.models.saving import save_model, save_tokenizer
from lora_ggpo.training.folder import find_runs
from lora_ggpo.training.reuse import load_trained
from lora_ggpo.workspace.files import disk_errors, new_folder
from lora_ggpo.workspace.libraries import quiet_libraries

MERGE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Allowed difference of merged and unmerged logits, relative to the largest logit: rounding of the merged weights."""

_BIAS_SETTINGS = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "use_qkv_bias", "bias")
"""Names, in models' configurations, of the choice whether linear layers have a bias."""

_PROBES = ["The film was a delight from start to finish.", "A dull, overlong mess.", "Two plus two is"]


class Merged(NamedTuple):
    """What merging did to the logits of a few probe texts.

    Attributes:
        difference: Largest difference of the merged model, as it was saved, to the adapter on the same weights.
        largest: Largest logit.
        quantised: Of a run with a quantised model, its kind ("nf4", "int8") and the largest difference of the merged
            model to the run itself: the merged model's weights are not quantised. None for other runs.
    """

    difference: float
    largest: float
    quantised: tuple[str, float] | None


def merge_run(path: Path, out: Path, base: str | None = None) -> Merged:
    """Merge the adapter of the run at `path` into its model and save model and tokenizer in `out`.

    The model of a run that quantised it is loaded as it is without, in the recipe's dtype.

    Args:
        base: Where the run's base model lies now, if it has moved.

    Raises:
        UserError: several seeds and none chosen, full fine-tuning, `out` is in use or cannot be written, or a plain
            model of this kind cannot compute what the adapter does; then nothing is written.
    """
    quiet_libraries()
    out = out.resolve()
    runs = find_runs(path)
    if len(runs) > 1:
        raise UserError(f"{path} holds {len(runs)} runs; choose one, such as {runs[0].folder}.")
    run = runs[0].folder
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose a new folder.")
    model, tokenizer, recipe, task = load_trained(run, quantised=False, base=base)
    if not isinstance(model, PeftModel):
        raise UserError(f"{run} is full fine-tuning: its model folder is complete, there is nothing to merge.")
    before = probe_logits(model, tokenizer)
    merged = merged_model(model)
    with disk_errors(out), new_folder(out) as target:
        save_model(merged, target)
        save_tokenizer(tokenizer, target)
        del model, merged  # makes room for the saved one
        after = probe_logits(task.load_model(str(target), recipe.dtype)[0], tokenizer)
        difference, largest = float((after - before).abs().max()), float(before.abs().max())
        _check(difference, largest, recipe.dtype)
    if recipe.quantise is None:
        return Merged(difference, largest, None)
    trained = probe_logits(load_trained(run, base=base)[0], tokenizer)
    return Merged(difference, largest, (recipe.quantise, float((after - trained).abs().max())))


def _check(difference: float, largest: float, dtype: str) -> None:
    if difference <= MERGE_TOLERANCE[getattr(torch, dtype)] * max(largest, 1.0):
        return
    advice = (
        "a plain model of this kind cannot hold what the adapter changes, so use the adapter itself"
        if dtype == "float32"
        else f"merge in float32, which rounds less than {dtype}, by training with dtype: float32"
    )
    far = f"The merged model's logits differ by {difference:.1e} (logits reach {largest:.2g}); nothing is saved"
    raise UserError(f"{far}: {advice}.")


def merged_model(model: PeftModel) -> PreTrainedModel:
    """The plain model that computes what `model` does with its LoRA adapter, which is used up.

    A weight that several layers share (tied embeddings, replicated layers) can take up no more than one change: layers
    with an adapter get their own first. peft adds a trained bias only to a layer that has one already, so layers get
    biases of 0 where the architecture has a setting for them.

    Raises:
        UserError: an adapter trained biases that the architecture has no place for.
    """
    base: Any = model.get_base_model()
    tied = bool(getattr(base.config, "tie_word_embeddings", False))
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    _untie(base, list(layers.values()))
    _add_biases(base, layers)
    merged: PreTrainedModel = model.merge_and_unload()
    if tied:
        _tie_again(merged)
    _separate(merged)
    return merged


def _untie(base: PreTrainedModel, layers: list[LoraLayer]) -> None:
    """Give each of `layers` a weight of its own."""
    holders: dict[int, int] = defaultdict(int)
    for _, parameter in base.named_parameters(remove_duplicate=False):
        holders[parameter.data_ptr()] += 1
    for layer in layers:
        inner: Any = layer.get_base_layer()
        weight = getattr(inner, "weight", None)
        if isinstance(weight, nn.Parameter) and holders[weight.data_ptr()] > 1:
            holders[weight.data_ptr()] -= 1
            inner.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def _tie_again(merged: PreTrainedModel) -> None:
    """Tie the input and output embeddings again where an adapter changed both alike."""
    source: Any = merged.get_input_embeddings()
    target: Any = merged.get_output_embeddings()
    if target is None or source.weight.shape != target.weight.shape:
        return
    one, other = source.weight.detach(), target.weight.detach()
    if torch.allclose(one, other, rtol=1e-5, atol=1e-7 * float(one.abs().max())):
        target.weight = source.weight
        merged.config.tie_word_embeddings = True


def _separate(merged: PreTrainedModel) -> None:
    """Give replicated layers weights of their own: the model's class does not know that they share them."""
    known: dict[str, str] = getattr(merged, "all_tied_weights_keys", None) or {}
    seen: set[int] = set()
    for prefix, module in merged.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{prefix}.{name}"
            if parameter.data_ptr() in seen and full not in known and full not in known.values():
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(parameter.data_ptr())


def _add_biases(base: PreTrainedModel, layers: dict[str, LoraLayer]) -> None:
    lacking = {
        name
        for name, layer in layers.items()
        if any(layer.lora_bias.values()) and getattr(layer.get_base_layer(), "bias", None) is None
    }
    for setting in _BIAS_SETTINGS if lacking else ():
        if getattr(base.config, setting, None) is not False:
            continue
        with_biases = _biases_with(base, setting)
        if not lacking & with_biases:
            continue
        setattr(base.config, setting, True)
        lacking -= with_biases
        for name in with_biases:
            module: Any = base.get_submodule(name)
            inner = module.get_base_layer() if isinstance(module, LoraLayer) else module
            if inner.bias is None:
                inner.bias = nn.Parameter(inner.weight.new_zeros(inner.weight.shape[0]), requires_grad=False)
    if lacking:
        raise UserError(
            f"adapter.lora_bias trained a bias of {min(lacking)}, which has none in a {type(base).__name__}; nothing "
            "is saved: use the adapter itself, or train without lora_bias."
        )


def _biases_with(base: PreTrainedModel, setting: str) -> set[str]:
    """The linear layers that have a bias in a model like `base` with `setting`."""
    config = copy.deepcopy(base.config)
    setattr(config, setting, True)
    with torch.device("meta"):
        model = type(base)(config)
    return {name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part.bias is not None}


def probe_logits(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Logits of a few texts, on the CPU, 0 where there is padding: (texts, tokens, vocabulary) or (texts, classes)."""
    batch = tokenizer(_PROBES, padding=True, return_tensors="pt").to(next(model.parameters()).device)
    mask = batch["attention_mask"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = batch["input_ids"]  # the decoder reads the probes as well
    with torch.no_grad():
        logits = model.eval()(**inputs).logits.float().cpu()
    mask = mask.cpu()
    return logits * mask[..., None] if logits.dim() == 3 else logits  # padding does not matter
