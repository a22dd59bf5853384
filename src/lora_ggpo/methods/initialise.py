"""Adapters whose starting values come from the data or change the base weights: by peft's own code, and SC-LoRA's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import prepare_layer_inputs_fn_language_modeling
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.lora.monteclora import MontecloraSampler
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as _USUAL_TARGETS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_ggpo.errors import UserError
from lora_ggpo.methods.select import select_blocks
from lora_ggpo.methods.subspace import BETA, begin_in_subspace, read

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
_MOVES_BASE = ("pissa", "olora", "corda", "lora_ga", "sc_lora")
_OURS = ("layers_by_gradient", "sc_lora_beta")
"""Fields that LoraConfig has not."""


def initialise(
    model: PreTrainedModel, fields: Mapping[str, Any], batches: Batches | None, general: Batches | None = None
) -> PeftModel:
    """Put the LoRA adapter of LoraConfig's `fields` on `model` (in place) with its starting values.

    Args:
        batches: Of training data.
        general: Of general text, which SC-LoRA keeps away from.

    Raises:
        UserError: the values need data that is None; the rank is larger than a layer allows; or they move base
            weights where that cannot be saved.
    """
    init = str(fields.get("init_lora_weights"))
    _check_fields(init, fields)
    if init in _CONFIGS:
        name, cls = _CONFIGS[init]
        fields = {**fields, name: cls(**(fields.get(name) or {}))}
    share, beta = map(fields.get, _OURS)
    config = LoraConfig(**{name: value for name, value in fields.items() if name not in _OURS})
    if share:
        _resolve_targets(model, config)
        config.layers_to_transform = select_blocks(model, iter(_needed(batches, "layers_by_gradient")()), share)
    if config.monteclora_config:
        config.monteclora_config.buffer_size = 1
    if init == "sc_lora":
        adapted: PeftModel = _sc_lora(model, config, batches, general, BETA if beta is None else beta)
    elif init not in _CONFIGS:
        adapted = peft.get_peft_model(model, config)
    else:
        start = {"eva": _eva, "corda": _corda, "lora_ga": _lora_ga}[init]
        adapted = start(model, config, _needed(batches, f"init_lora_weights {init!r}"))
    _check_layers(adapted, init)
    _draw_afresh(adapted)
    return adapted


def _needed(batches: Batches | None, setting: str) -> Batches:
    if batches is None:
        raise UserError(f"adapter.{setting} needs training data.")
    return batches


def _draw_afresh(model: PeftModel) -> None:
    """Have MonteCLoRA draw in each forward pass, as the state of torch's generator says: a resumed run draws the same.

    peft draws ahead, and uses up what it has drawn: a checkpoint holds none of it, a checkpointed layer that runs again
    gets the next draw instead of its own.
    """
    for sampler in model.modules():
        if isinstance(sampler, MontecloraSampler):
            sampler.sampler.index = sampler.sampler.buffer_size


def _check_fields(init: str, fields: Mapping[str, Any]) -> None:
    if fields.get("use_dora") and (init in ("corda", "lora_ga", "sc_lora") or init.startswith("pissa_niter")):
        raise UserError(
            f"adapter.init_lora_weights {init!r} moves the base weights, which DoRA's magnitudes tie the adapter to; "
            "use one of the two."
        )
    if fields.get("alora_invocation_tokens") and init.startswith(_MOVES_BASE):
        raise UserError(
            f"adapter.init_lora_weights {init!r} moves the base weights, which aLoRA's model is to have as they were "
            "before its invocation; use one of the two."
        )
    patterns = fields.get("rank_pattern") or fields.get("alpha_pattern")
    clashes = {
        "bias": fields.get("bias", "none") != "none",
        "layer_replication": fields.get("layer_replication") is not None,
        "use_rslora with a rank_pattern or alpha_pattern": fields.get("use_rslora") and patterns,
    }
    clash = next((name for name, is_set in clashes.items() if is_set), None)
    if clash and _moves(init, fields.get("use_dora")):
        raise UserError(
            f"adapter.init_lora_weights {init!r} is saved as a difference of two adapters, which peft cannot do with "
            f"{clash}; use one of the two."
        )


def _check_layers(model: PeftModel, init: str) -> None:
    """Refuse what peft makes without a word: factors of fewer ranks, and what its difference leaves out."""
    embeddings = [model.get_base_model().get_output_embeddings()] if moves_base(model) else []  # type: ignore[operator]
    for full, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        name, r = full.removeprefix("base_model.model."), layer.r["default"]
        factor: Any = layer.lora_A["default"].weight if "default" in layer.lora_A else None
        rank = r if factor is None else len(factor)
        if rank < r:
            raise UserError(
                f"adapter.r is {r}, but init_lora_weights {init!r} gives {name} {rank} at most; lower it, give that "
                "layer less in rank_pattern, or leave it out."
            )
        if embeddings and (layer in embeddings or isinstance(layer.get_base_layer(), nn.Embedding)):
            raise UserError(
                f"adapter.init_lora_weights {init!r} is saved as a difference of two adapters, which peft cannot do "
                f"for {name}; leave it out of target_modules."
            )


# --- base weights that have moved ----------------------------------------------------------------------------------


def moves_base(model: PeftModel) -> bool:
    """Whether an adapter is saved as the difference to its starting values, with factors of twice the rank."""
    config: Any = model.peft_config["default"]
    return _moves(config.init_lora_weights, config.use_dora)


def writes_base(model: PeftModel) -> bool:
    """Whether its starting values were taken off W0: without its adapter such a model is not the one that came."""
    config: Any = model.peft_config["default"]
    return str(config.init_lora_weights).startswith((*_MOVES_BASE, "loftq"))


def _moves(init: Any, use_dora: Any) -> bool:
    return not use_dora and str(init).startswith(_MOVES_BASE)


def save_start(model: PeftModel, folder: Path) -> bool:
    """Keep an adapter's starting values in `folder` if training must be saved as the difference to them.

    PiSSA, OLoRA, CorDA, LoRA-GA and SC-LoRA begin with s B A != 0 and subtract it from W0. What is saved in the end is
    the difference of two products, a plain LoRA adapter of twice the rank that fits the untouched W0.
    """
    if not moves_base(model):
        return False
    config: Any = model.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True  # or loading it would change W0 once more
    model.save_pretrained(str(folder))
    config.init_lora_weights = init
    return True


def save_difference(model: PeftModel, folder: Path, start: Path) -> None:
    """Save a trained adapter as its difference to the starting values in `start` (see `save_start`)."""
    model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(start))
    # peft writes the factors alone: put back what else was trained, such as a classification head.
    file = folder / "adapter_model.safetensors"
    factors = load_file(file)
    others = {name: value for name, value in peft.get_peft_model_state_dict(model).items() if name not in factors}
    save_file({**{name: value.contiguous() for name, value in others.items()}, **factors}, file, {"format": "pt"})


# --- starting values from the data ---------------------------------------------------------------------------------


def _eva(model: PreTrainedModel, config: LoraConfig, batches: Batches) -> PeftModel:
    adapted = peft.get_peft_model(model, config)
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    # peft compares layers' inputs through views, which a slice such as a pooling layer's first token does not allow.
    handles = [layer.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),)) for layer in layers]
    try:
        peft.initialize_lora_eva_weights(
            adapted,
            _Passes(_without_text_labels(batch) for batch in itertools.islice(batches(), DATA_BATCHES)),
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


def _without_text_labels(batch: Batch) -> dict[str, Tensor]:
    """Labels of whole texts would be taken for a mask of tokens."""
    per_token = batch["labels"].shape == batch["input_ids"].shape
    return {name: value for name, value in batch.items() if name != "labels" or per_token}


def _tokens(layer_input: Any, model_input: Tensor, name: str) -> Tensor:
    """What a layer sees of each unmasked token; of each text, behind a pooling layer."""
    tensor: Tensor = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    return tensor if tensor.dim() == 2 else prepare_layer_inputs_fn_language_modeling(tensor, model_input, name)


def _lora_ga(model: PreTrainedModel, config: LoraConfig, batches: Batches) -> PeftModel:
    def take_gradients() -> None:
        for batch in itertools.islice(batches(), DATA_BATCHES):
            model(**batch).loss.backward()

    _resolve_targets(model, config)
    preprocess_loraga(model, config, take_gradients)
    try:
        return peft.get_peft_model(model, config)
    except RuntimeError as error:
        if "shapes cannot be multiplied" not in str(error):
            raise
        raise UserError(
            f"adapter.r is {config.r}, but init_lora_weights 'lora_ga' takes two singular directions of a layer's "
            "gradient for each rank, and a layer has fewer; lower it."
        ) from error


def _corda(model: PreTrainedModel, config: LoraConfig, batches: Batches) -> PeftModel:
    @torch.no_grad()
    def run() -> None:
        for row in itertools.islice(_rows(batches()), CORDA_ROWS):
            model(**row)

    _resolve_targets(model, config)
    training = model.training
    with _widen_inputs(model):
        preprocess_corda(model, config, run_model=run)
    model.train(training)
    return peft.get_peft_model(model, config)


def _sc_lora(
    model: PreTrainedModel, config: LoraConfig, batches: Batches | None, general: Batches | None, beta: float
) -> PeftModel:
    setting = "init_lora_weights 'sc_lora'"
    task, kept = _needed(batches, setting), _needed(general, setting)
    config.init_lora_weights = True  # peft does not know the other
    adapted = peft.get_peft_model(model, config)
    begin_in_subspace(adapted, task(), kept(), beta)
    config.init_lora_weights = "sc_lora"  # type: ignore[assignment]  # from here on W0 is not what it was
    return adapted


def _rows(batches: Iterable[Batch]) -> Iterator[dict[str, Tensor]]:
    """Rows of batches one by one, without labels and padding: peft's covariance would count it."""
    for batch in batches:
        inputs, mask = read(batch)
        for row, kept in enumerate(mask):
            yield {name: tensor[row, kept][None] for name, tensor in inputs.items()}


def _resolve_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    """Replace target_modules "all-linear", or none, by names, as get_peft_model will: this comes before it."""
    if config.target_modules is None and not config.target_parameters:
        config.target_modules = list(_USUAL_TARGETS.get(model.config.model_type, ())) or None
    _maybe_include_all_linear_layers(config, model)


@contextmanager
def _widen_inputs(model: PreTrainedModel) -> Iterator[None]:
    """Show linear layers behind a pooling layer (1, 1, n) instead of (1, n), whose 1 peft would squeeze away."""
    widened: set[nn.Module] = set()

    def widen(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        if args[0].dim() != 2:
            return None
        widened.add(module)
        return (args[0][None],)

    def narrow(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if module not in widened:
            return output
        widened.remove(module)
        return output[0]

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [hook for m in linear for hook in (m.register_forward_pre_hook(widen), m.register_forward_hook(narrow))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
