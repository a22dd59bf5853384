"""Adapters whose starting values come from the data or change the base weights; all of it is peft's own code."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import AdaLoraConfig, EvaConfig, LoraConfig, LoraGAConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import prepare_layer_inputs_fn_language_modeling
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as _USUAL_TARGETS
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_ggpo.errors import UserError

Batch = Mapping[str, Tensor]
Batches = Callable[[], Iterable[Batch]]
"""Makes an iterator over batches of training data, from the beginning at each call."""

DATA_BATCHES = 8
"""Batches that EVA and LoRA-GA look at, at most."""

EVA_PASSES = 20
"""Passes over these batches after which EVA gives up."""

CORDA_ROWS = 256
"""Rows that CorDA's covariance is taken over, at most (the number of samples of its paper)."""

_CONFIGS = {
    "eva": ("eva_config", EvaConfig),
    "corda": ("corda_config", CordaConfig),
    "lora_ga": ("lora_ga_config", LoraGAConfig),
}
_DIRECTIONS = {"pissa": 1, "olora": 1, "corda": 1, "eva": 1, "mica": 1, "lora_ga": 2}
"""Singular directions of a layer that starting values take for each rank."""

_MOVES_BASE = ("pissa", "olora", "corda", "lora_ga")


def needs_data(config: Any) -> bool:
    """Whether the adapter's starting values come from training data."""
    return config.init_lora_weights in _CONFIGS


def with_init_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """LoraConfig's fields, with the sub-configuration that their initialisation needs as an object.

    Raises:
        UserError: the initialisation cannot be combined with DoRA, or with what peft cannot save as a difference.
    """
    init = str(fields.get("init_lora_weights"))
    if fields.get("use_dora") and (init in ("corda", "lora_ga") or init.startswith("pissa_niter")):
        raise UserError(
            f"adapter.init_lora_weights {init!r} moves the base weights, which DoRA's magnitudes tie the adapter to; "
            "use one of the two."
        )
    clash = _clash_with_difference(fields)
    if clash and _moves_base(init, fields.get("use_dora")):
        raise UserError(
            f"adapter.init_lora_weights {init!r} is saved as a difference of two adapters, which peft cannot do with "
            f"{clash}; use one of the two."
        )
    if init not in _CONFIGS:
        return dict(fields)
    name, cls = _CONFIGS[init]
    given = fields.get(name) or {}
    return {**fields, name: given if dataclasses.is_dataclass(given) else cls(**given)}


def _clash_with_difference(fields: Mapping[str, Any]) -> str | None:
    """The setting with which peft cannot save an adapter as a difference."""
    if fields.get("bias", "none") != "none":
        return "bias"
    if fields.get("layer_replication") is not None:
        return "layer_replication"
    if fields.get("use_rslora") and (fields.get("rank_pattern") or fields.get("alpha_pattern")):
        return "use_rslora with a rank_pattern or alpha_pattern"
    return None


def initialised(model: PreTrainedModel, config: LoraConfig, batches: Batches | None) -> PeftModel:
    """Put the LoRA adapter of `config` on `model` (in place) with its starting values.

    Raises:
        UserError: the values need data, and `batches` is None; there are fewer of them than the rank asks for; or they
            move weights that peft would save as they are.
    """
    _check_ranks(model, config)
    if not needs_data(config):
        adapted: PeftModel = peft.get_peft_model(model, config)
    elif batches is None:
        raise UserError(f"adapter.init_lora_weights {config.init_lora_weights!r} needs training data.")
    else:
        adapted = _FROM_DATA[str(config.init_lora_weights)](model, config, batches)
    if moves_base(adapted):
        _refuse_embeddings(adapted)
    return adapted


def _check_ranks(model: PreTrainedModel, config: LoraConfig) -> None:
    """Refuse a rank above the number of singular directions of a layer: peft makes factors of fewer, or fails."""
    init = str(config.init_lora_weights)
    directions = next((count for name, count in _DIRECTIONS.items() if init.startswith(name)), 0)
    if not directions:
        return
    _resolve_targets(model, config)
    for name, module in model.named_modules() if config.target_modules else ():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and check_target_module_exists(config, name):
            pattern: dict[str, int] = config.rank_pattern or {}
            r, side = pattern.get(get_pattern_key(list(pattern), name), config.r), min(weight.shape)
            if directions * r > side:
                raise UserError(
                    f"adapter.r is {r}, but init_lora_weights {init!r} takes {directions} singular direction(s) of a "
                    f"weight for each rank, and {name} {tuple(weight.shape)} has {side}; lower it to "
                    f"{side // directions}, or leave that layer out."
                )


def _refuse_embeddings(model: PeftModel) -> None:
    """peft's difference leaves out the factors of an embedding, and keeps an output layer's moved W0 beside it."""
    config: Any = model.peft_config["default"]
    output = model.get_base_model().get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (module is output or isinstance(module.get_base_layer(), nn.Embedding)):
            raise UserError(
                f"adapter.init_lora_weights {config.init_lora_weights!r} is saved as a difference of two adapters, "
                f"which peft cannot do for {name.removeprefix('base_model.model.')}; leave it out of target_modules."
            )


def save_start(model: PeftModel, folder: Path) -> bool:
    """Keep an adapter's starting values in `folder` if training must be saved as the difference to them.

    PiSSA, OLoRA, CorDA and LoRA-GA begin with s B A != 0 and subtract it from W0. What is saved in the end is the
    difference of two products, a plain LoRA adapter of twice the rank that fits the untouched W0.
    """
    if not moves_base(model):
        return False
    config: Any = model.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True  # or loading it would change W0 once more
    model.save_pretrained(str(folder))
    config.init_lora_weights = init
    return True


def moves_base(model: PeftModel) -> bool:
    """Whether an adapter is saved as the difference to its starting values, with factors of twice the rank."""
    config: Any = model.peft_config["default"]
    return _moves_base(config.init_lora_weights, config.use_dora)


def _moves_base(init: Any, use_dora: Any) -> bool:
    return not use_dora and str(init).startswith(_MOVES_BASE)


def save_difference(model: PeftModel, folder: Path, start: Path) -> None:
    """Save a trained adapter as its difference to the starting values in `start` (see `save_start`)."""
    model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(start))
    # peft writes the factors alone: put back what else was trained, such as a classification head.
    file = folder / "adapter_model.safetensors"
    factors = load_file(file)
    others = {name: value for name, value in peft.get_peft_model_state_dict(model).items() if name not in factors}
    save_file({**{name: value.contiguous() for name, value in others.items()}, **factors}, file, {"format": "pt"})


def adalora_config(fields: Mapping[str, Any], total_steps: int | None) -> AdaLoraConfig:
    """AdaLoRA's configuration; where nothing is said it starts at 1.5 r, prunes from a tenth to seven tenths of the
    run, in about a hundred allocations.

    Raises:
        UserError: `total_steps` is None or too few.
    """
    if total_steps is None:
        raise UserError("adapter.type adalora needs the number of steps of the run for its schedule.")
    r = fields.get("r", 8)
    defaults = {
        "init_r": -(-3 * r // 2),
        "tinit": total_steps // 10,
        "tfinal": 3 * total_steps // 10,
        "deltaT": max(1, total_steps // 100),
    }
    others = {name: value for name, value in fields.items() if name != "r"}
    return AdaLoraConfig(**(defaults | others), target_r=r, total_step=total_steps)


def _eva(model: PreTrainedModel, config: LoraConfig, batches: Batches) -> PeftModel:
    adapted = peft.get_peft_model(model, config)
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    # peft compares layers' inputs through views, which a slice such as a pooling layer's first token does not allow.
    handles = [layer.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),)) for layer in layers]
    try:
        peft.initialize_lora_eva_weights(
            adapted,
            _Passes(_inputs_only(batch) for batch in itertools.islice(batches(), DATA_BATCHES)),
            prepare_layer_inputs_fn=_tokens,
            show_progress_bar=False,
        )
    finally:
        for handle in handles:
            handle.remove()
    return adapted


class _Passes(list[dict[str, Tensor]]):
    """Batches that end: peft goes round them until each layer's directions have settled, which may be never."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(EVA_PASSES):
            yield from super().__iter__()
        raise UserError(
            f"adapter.init_lora_weights 'eva': its directions have not settled after {EVA_PASSES} passes over "
            f"{len(self)} batches; lower adapter.r or adapter.eva_config.tau, or give more data."
        )


def _lora_ga(model: PreTrainedModel, config: LoraConfig, batches: Batches) -> PeftModel:
    def gradients() -> None:
        for batch in itertools.islice(batches(), DATA_BATCHES):
            model(**batch).loss.backward()

    _resolve_targets(model, config)
    preprocess_loraga(model, config, gradients)
    return peft.get_peft_model(model, config)


def _corda(model: PreTrainedModel, config: LoraConfig, batches: Batches) -> PeftModel:
    @torch.no_grad()
    def run() -> None:
        for row in itertools.islice(_rows(batches()), CORDA_ROWS):
            model(**row)

    _resolve_targets(model, config)
    training = model.training
    with _three_dimensional(model):
        preprocess_corda(model, config, run_model=run)
    model.train(training)
    return peft.get_peft_model(model, config)


_FROM_DATA = {"eva": _eva, "corda": _corda, "lora_ga": _lora_ga}


def _inputs_only(batch: Batch) -> dict[str, Tensor]:
    """Labels of whole texts would be taken for a mask of tokens."""
    per_token = batch["labels"].shape == batch["input_ids"].shape
    return {name: value for name, value in batch.items() if name != "labels" or per_token}


def _tokens(layer_input: Any, model_input: Tensor, name: str) -> Tensor:
    """What a layer sees of each unmasked token; of each text, behind a pooling layer."""
    tensor: Tensor = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    return tensor if tensor.dim() == 2 else prepare_layer_inputs_fn_language_modeling(tensor, model_input, name)


def _rows(batches: Iterable[Batch]) -> Iterator[dict[str, Tensor]]:
    """Rows of batches one by one, without labels and padding: peft's covariance would count it."""
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            kept = mask.bool()
            yield {"input_ids": ids[kept][None], "attention_mask": mask[kept][None]}


def _resolve_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    """Replace target_modules "all-linear", or none, by names, as get_peft_model will: this comes before it."""
    if config.target_modules is None and not config.target_parameters:
        config.target_modules = list(_USUAL_TARGETS.get(model.config.model_type, ())) or None
    _maybe_include_all_linear_layers(config, model)


@contextmanager
def _three_dimensional(model: PreTrainedModel) -> Iterator[None]:
    """Show linear layers behind a pooling layer (1, 1, n) instead of (1, n), whose 1 peft would squeeze away."""

    widened: set[torch.nn.Module] = set()

    def widen(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        if args[0].dim() != 2:
            return None
        widened.add(module)
        return (args[0][None],)

    def narrow(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if module not in widened:
            return None
        widened.remove(module)
        return output[0]

    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    handles = [hook for m in linear for hook in (m.register_forward_pre_hook(widen), m.register_forward_hook(narrow))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
