"""What the settings of a recipe must be to one another: each rule is what breaks it, and the sentence that says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from peft import AdaLoraConfig, LoraConfig
from pydantic import BaseModel

from lora_ggpo.models.architecture import CAUSAL, ENCODER_DECODER
from lora_ggpo.perturbation import GGPOConfig
from lora_ggpo.tasks import TASKS, Task

if TYPE_CHECKING:
    from lora_ggpo.recipe.recipe import Recipe

_ADALORA_ONLY = [n for n in AdaLoraConfig.__dataclass_fields__ if n not in LoraConfig.__dataclass_fields__]
_IDLE_IN_ADALORA = (
    *("rank_pattern", "alpha_pattern", "init_lora_weights", "eva_config", "corda_config", "lora_ga_config"),
    *("use_rslora", "lora_bias", "use_qalora", "use_bdlora", "velora_config", "monteclora_config", "kasa_config"),
    *("alora_invocation_tokens", "layers_by_gradient", "sc_lora_beta"),
)
_OF_WORKERS = ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context")
_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
_OF_ADAMS = ("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon")
_MOMENTUM_KEPT = ("adamw_torch", "adamw_torch_fused")
_LEAVES_W0 = (True, False, "gaussian", "eva")
"""Starting values for which peft neither decomposes nor writes W0."""


def broken_rules(recipe: Recipe) -> Iterator[str]:
    """The rules that `recipe` breaks, each in words that begin with the setting at fault."""
    for rules in (_of_adapter, _of_task, _of_methods, _of_moves, _of_weights, _of_sharding, _of_run):
        yield from rules(recipe)


def _of_adapter(recipe: Recipe) -> Iterator[str]:
    fields = {"r": LoraConfig().r, "init_r": None, **(recipe.adapter_fields or {})}
    r, init_r = fields["r"], fields["init_r"]
    if recipe.adapter and not recipe.adalora:
        for name in _set(recipe.adapter, _ADALORA_ONLY):
            yield f"adapter.{name} is a setting of AdaLoRA; set adapter.type to adalora as well"
    for name in _CHECKPOINTING:
        if fields.get("monteclora_config") and (recipe.training_fields.get(f"{name}_kwargs") or {}).get(
            "use_reentrant"
        ):
            divergence = "adapter.monteclora_config adds a loss that reentrant checkpoints have no gradient of"
            yield f"{divergence}; leave training.{name}_kwargs out"
    if fields.get("layers_by_gradient"):
        yield from (f"adapter.layers_by_gradient {why}; leave one of them out" for why in _no_gradients(recipe, fields))
    sc_lora = fields.get("init_lora_weights") == "sc_lora"
    if fields.get("sc_lora_beta") is not None and not sc_lora and not recipe.adalora:
        yield "adapter.sc_lora_beta is a setting of SC-LoRA; set adapter.init_lora_weights to sc_lora as well"
    if sc_lora and recipe.task.type.architecture is ENCODER_DECODER:
        plain = "adapter.init_lora_weights sc_lora reads general text, which is no pair of source and target"
        yield f"{plain} as task {recipe.task.kind} has them; choose eva"
    if recipe.adapter and recipe.adalora:
        if init_r is not None and init_r < r:
            yield f"adapter.init_r is the rank AdaLoRA starts from: it must be at least adapter.r, {r}, not {init_r}"
        for name in _changed(recipe.adapter, _IDLE_IN_ADALORA):
            yield f"adapter.{name} is none of AdaLoRA's settings; leave it out"


def _no_gradients(recipe: Recipe, fields: Mapping[str, Any]) -> Iterator[str]:
    """What stands against gradients of the pretrained weights, or against a choice of blocks by them."""
    if fields.get("layers_to_transform") is not None:
        yield "and adapter.layers_to_transform both choose the blocks"
    if recipe.quantise:
        yield f"needs gradients of the pretrained weights, which quantise {recipe.quantise} leaves without"
    if recipe.shards in ("fsdp2", "zero3"):
        yield f"needs gradients of whole weights, and sharding {recipe.shards} cuts them"
    if recipe.task.type.has_reference:
        yield f"needs a loss of the model alone, and task {recipe.task.kind} has one of two models"


def _of_task(recipe: Recipe) -> Iterator[str]:
    task, kind = recipe.task, recipe.task.kind
    fields = recipe.adapter_fields or {}
    if task.type.has_reference and not _has_lora(recipe):
        yield f"task {kind} compares the model with itself without its adapter, and there is no LoRA; set adapter"
    elif task.type.has_reference and fields.get("init_lora_weights", True) not in _LEAVES_W0:
        init = f"adapter.init_lora_weights {fields['init_lora_weights']} changes it"
        yield f"task {kind} needs the model under the adapter as it was, but {init}; choose true, gaussian or eva"
    for name in _changed(task, _of_other_tasks(task.type, lambda task: task.settings)):
        yield f"task sets {name}, which kind {kind} does not look at; leave it out"
    if recipe.forgetting and task.type.architecture is not CAUSAL:
        yield f"forgetting is the rise of a causal language model's loss, which task {kind} has none of; leave it out"
    if task.packing and recipe.training_fields.get("use_cache"):
        yield "task with packing needs training.use_cache: false: with a cache, examples would see those before them"
    for name in _changed(recipe.data, _of_other_tasks(task.type, lambda task: task.columns)):
        yield f"data sets {name}, which task {kind} does not look at; leave it out"


def _of_other_tasks(own: type[Task], look_at: Callable[[type[Task]], frozenset[str]]) -> list[str]:
    """Settings that other tasks look at and `own` does not."""
    return sorted(frozenset[str]().union(*map(look_at, TASKS.values())) - look_at(own))


def _of_methods(recipe: Recipe) -> Iterator[str]:
    """What decides where the gradient is taken, and the step along it."""
    ggpo, sam, optimizer, has_lora = recipe.ggpo, recipe.sam, recipe.optimizer, _has_lora(recipe)
    if ggpo:
        try:
            recipe.ggpo_config(seed=0)
        except ValueError as error:
            yield f"ggpo{str(error).removeprefix(GGPOConfig.__name__)}"
    if ggpo and recipe.adapter is None:
        yield "ggpo perturbs an adapter, but adapter is null; set ggpo: null as well, or an adapter"
    smoothing = "label smoothing" if recipe.training_fields.get("label_smoothing_factor") else ""
    elsewhere = f"task {recipe.task.kind}" if recipe.task.type.has_reference else smoothing
    if ggpo and getattr(ggpo, "rise", None) and elsewhere:
        yield f"ggpo.rise is measured by the model's own loss, but {elsewhere} takes another; set ggpo.sigma instead"
    ivon = ["optimizer ivon"] if optimizer and optimizer.kind == "ivon" else []
    first, *others = [n for n in ("ggpo", "sam", "mgpo", "bi_lora") if getattr(recipe, n)] + ivon or [""]
    for other in others:
        yield f"{other} and {first} both decide where the gradient is taken; set one of them to null"
    if sam and sam.space == "weights" and not has_lora:
        yield "sam with space weights moves the full weights of LoRA layers, and there are none; use space adapter"
    if optimizer and not ivon and not has_lora:
        yield f"optimizer {optimizer.kind} treats A and B of LoRA differently, and there is no LoRA; set it to null"
    if optimizer:
        own = [] if optimizer.kind == "lora-plus" else _set(recipe.training, _OF_ADAMS)
        idle = type(optimizer).model_fields.keys() - {"kind", *optimizer.options}
        for name in (*_changed(optimizer, sorted(idle)), *own):
            yield f"optimizer {optimizer.kind} takes no {name}; leave that out"
    if ivon and recipe.asked_precision == "fp16":
        yield "optimizer ivon reads gradients that fp16 scales; set precision to bf16 or fp32"


def _has_lora(recipe: Recipe) -> bool:
    return recipe.adapter is not None and not recipe.adalora


def _of_moves(recipe: Recipe) -> Iterator[str]:
    """What moves the full weight by thin factors: mgpo and bi_lora."""
    optimizer, training = recipe.optimizer, recipe.training_fields
    for name in ("mgpo", "bi_lora"):
        if not getattr(recipe, name):
            continue
        if not _has_lora(recipe):
            yield f"{name} moves the weights under LoRA layers, and there are none; set it to null"
        elif (recipe.adapter_fields or {}).get("use_dora"):
            yield f"{name} moves W0, which the norms of DoRA would not see; set adapter.use_dora to false"
        if optimizer and optimizer.kind == "lora-fa":
            yield f"{name} needs an optimizer that takes steps of A too, which LoRA-FA does not; set optimizer: null"
        if training.get("torch_compile"):
            yield f"{name} moves layers by hooks, which a compiled model may not call; leave training.torch_compile out"
    if recipe.mgpo and training.get("optim", _MOMENTUM_KEPT[0]) not in _MOMENTUM_KEPT:
        yield f"mgpo follows the momentum of torch's Adam; set training.optim to {' or '.join(_MOMENTUM_KEPT)}"
    if recipe.mgpo and recipe.asked_precision == "fp16":
        yield "mgpo averages gradient norms, which fp16 scales; set precision to bf16 or fp32"


def _of_weights(recipe: Recipe) -> Iterator[str]:
    """What is trained of the model's own weights, and how they are kept."""
    quantise, adapter = recipe.quantise, recipe.adapter_fields
    if recipe.freeze_body and adapter is not None:
        yield "freeze_body trains the head alone, but there is an adapter; set adapter: null"
    if recipe.freeze_body and recipe.freeze_head:
        yield "freeze_head leaves nothing to train beside freeze_body; set one of them to false"
    for name in ("freeze_body", "freeze_head"):
        if getattr(recipe, name) and not recipe.task.type.architecture.new_head:
            headed = " or ".join(kind for kind, task in TASKS.items() if task.architecture.new_head)
            yield f"{name} needs task {headed}: other tasks have no head of their own"
    if not quantise:
        return
    keeps = f"quantise {quantise} keeps the weights as they are"
    if adapter is None:
        yield f"quantise {quantise} needs an adapter: quantised weights cannot be trained; set one, or quantise to null"
        return
    init = adapter.get("init_lora_weights", True)
    if init not in _LEAVES_W0:
        reads = f"adapter.init_lora_weights {init} reads or changes them unquantised"
        yield f"{keeps}, but {reads}; choose true, gaussian or eva"
    if quantise == "int8" and adapter.get("use_dora"):
        yield "quantise int8 hides the scales of the weights from peft's DoRA; use nf4, or adapter.use_dora false"
    if recipe.sam and recipe.sam.space == "weights":
        yield f"{keeps}, but sam.space weights moves them; use space adapter"


def _of_sharding(recipe: Recipe) -> Iterator[str]:
    """What a model that is shared out allows."""
    training, shards = recipe.training_fields, recipe.shards
    for name in ("fsdp", "deepspeed"):
        if training.get(name) and recipe.sharding != "none":
            yield f"sharding {recipe.sharding} and training.{name} both share the model out; leave one of them out"
    if training.get("fsdp_config") and shards != "fsdp2":
        yield "training.fsdp_config is for FSDP; set sharding: fsdp2, or leave it out"
    if training.get("fsdp_config") and training["fsdp_config"].get("version", 2) != 2:
        yield "training.fsdp_config is for version 2 of FSDP, the one that LoRA-GGPO knows; leave version out"
    if not shards:
        return
    whole = f"sees whole weights and gradients, and sharding {shards} cuts them"
    for name in ("sam", "mgpo", "bi_lora"):
        if getattr(recipe, name):
            yield f"{name} {whole}; set one of the two to null"
    if recipe.optimizer and recipe.optimizer.kind != "lora-plus":
        yield f"optimizer {recipe.optimizer.kind} {whole}; use lora-plus, null, or sharding: none"
    if recipe.task.type.has_reference:
        yield f"task {recipe.task.kind} compares a model with what it was, which is not tried with sharding {shards}"
    if recipe.adalora:
        yield f"adapter.type adalora {whole}; use lora, or sharding: none"
    if shards not in ("fsdp2", "zero3"):
        return
    init = (recipe.adapter_fields or {}).get("init_lora_weights", True)
    if init not in (True, False, "gaussian"):
        yield f"adapter.init_lora_weights {init} {whole}; choose true or gaussian, or sharding: zero2"
    if recipe.quantise == "int8" or (recipe.quantise and shards == "zero3"):
        yield f"quantise {recipe.quantise} cannot be cut by sharding {shards}; use nf4 with fsdp2, or sharding: zero2"


def _of_run(recipe: Recipe) -> Iterator[str]:
    training, precision = recipe.training_fields, recipe.asked_precision
    for name in _set(recipe.training, ("bf16", "fp16")):
        value = getattr(recipe.training, name)
        if value != (precision == name):
            yield f"training.{name} {str(value).lower()} contradicts precision {precision}; leave training.{name} out"
    if training.get("max_steps", 1) < 1 and training["max_steps"] != -1:  # -1 is transformers' "not set"
        yield "training.max_steps must be above 0, or there is nothing to train"
    for name in _OF_WORKERS:
        if training.get(name) and not training.get("dataloader_num_workers"):
            yield f"training.{name} is for workers; set training.dataloader_num_workers, or leave it out"
    for name in _CHECKPOINTING:
        if training.get(f"{name}_kwargs") and not any(training.get(one) for one in _CHECKPOINTING):
            yield f"training.{name}_kwargs is for checkpointing; set training.{name}: true, or leave it out"
    if len({seed for seed in recipe.seeds if 0 <= seed < 2**32}) < len(recipe.seeds):
        yield "seeds must be different whole numbers from 0 to 4294967295"
    if recipe.stop_loss and not recipe.validate_every:
        yield "stop_loss is looked at every validate_every steps: set it"
    if recipe.keep == "best" and not recipe.validate_every:
        yield "keep best takes the best of the validations, every validate_every steps: set it"
    for name in ("keep_metric", "patience"):
        if getattr(recipe, name) is not None and recipe.keep != "best":
            yield f"{name} is looked at where the best is kept; set keep: best, or leave it out"
    if recipe.kept_metric not in recipe.task.type.metrics:
        known = ", ".join(recipe.task.type.metrics)
        yield f"keep_metric {recipe.keep_metric} is not measured for task {recipe.task.kind}; choose one of {known}"


def _changed(section: BaseModel, names: Iterable[str]) -> Iterator[str]:
    """Those of `names` that are not at their defaults: a recorded recipe spells defaults out."""
    fields, values = type(section).model_fields, dict(section)
    for name in names:
        if values[name] != fields[name].get_default(call_default_factory=True, validated_data=values):
            yield name


def _set(section: BaseModel, names: Iterable[str]) -> list[str]:
    """Those of `names` that the recipe sets."""
    return [name for name in names if name in section.model_fields_set]
