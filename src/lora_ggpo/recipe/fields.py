"""The sections of a recipe that mirror a library's own settings: types, ranges, and what a recipe may not set."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval
from peft import AdaLoraConfig
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    create_model,
)
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError
from transformers import TrainingArguments

from lora_ggpo.perturbation.config import CHOICES, OLD_NOISES, GGPOConfig
from lora_ggpo.recipe.aliases import ALIASES
from lora_ggpo.workspace.paths import expand_home

ADAPTER_DEFAULT: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}

TRAINING_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "logging_steps": 10,
    "save_steps": 100,
    "save_total_limit": 2,
    "train_sampling_strategy": "group_by_length",
    "dataloader_pin_memory": False,
}
"""Our defaults for ``training``; all others are transformers' own."""

# --- ranges --------------------------------------------------------------------------------------------------------


def _regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")
    return value


def _noise_of_today(value: Any) -> Any:
    return OLD_NOISES.get(value, value) if isinstance(value, str) else value


def _settings(value: Any) -> Any:
    """Settings as they are, or those of a JSON file."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(Path(expand_home(value)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{value!r} cannot be read as a JSON file: {error}") from error


_Pattern = Annotated[str, AfterValidator(_regular_expression)]
_Count = Annotated[int, Ge(1), BeforeValidator(_number)]
_AboveZero = Annotated[float, Gt(0), BeforeValidator(_number)]
_Index = Annotated[int, Ge(0), BeforeValidator(_number)]
_SHARE, _INNER_SHARE = Interval(ge=0, lt=1), Interval(gt=0, lt=1)

# Outside these ranges the libraries say nothing, or raise an error that explains nothing.
_ADAPTER_RANGES: dict[str, Any] = {
    **dict.fromkeys(("r", "init_r", "deltaT", "qalora_group_size"), Ge(1)),
    **dict.fromkeys(("tinit", "tfinal", "orth_reg_weight"), Ge(0)),
    **dict.fromkeys(("beta1", "beta2"), _INNER_SHARE),
    "lora_alpha": Gt(0),
    "lora_dropout": _SHARE,
}
_TRAINING_RANGES: dict[str, Any] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), Ge(1)
    ),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "save_steps"), Ge(0)),
    **dict.fromkeys(("save_total_limit", "dataloader_num_workers", "neftune_noise_alpha"), Ge(0)),
    **dict.fromkeys(("gradient_accumulation_steps", "dataloader_prefetch_factor", "torch_empty_cache_steps"), Ge(1)),
    **dict.fromkeys(("num_train_epochs", "adam_epsilon", "logging_steps", "ddp_timeout", "ddp_bucket_cap_mb"), Gt(0)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _SHARE),
}
_INITS = r"^(gaussian|pissa|pissa_niter_[0-9]{1,3}|olora|eva|corda|lora_ga|sc_lora|loftq|orthogonal|mica)$"
_ADAPTER_TYPES: dict[str, Any] = {
    # peft's annotation knows neither lora_ga nor a number in pissa_niter_N; sc_lora is ours.
    "init_lora_weights": Annotated[str, Field(pattern=_INITS)] | bool,
    "target_modules": list[str] | _Pattern | None,
    "exclude_modules": list[str] | _Pattern | None,
    "layers_pattern": list[_Pattern] | _Pattern | None,
    "layers_to_transform": list[_Index] | _Index | None,
    "rank_pattern": dict[_Pattern, _Count] | None,
    "alpha_pattern": dict[_Pattern, _AboveZero] | None,
    "trainable_token_indices": list[_Index] | dict[str, list[_Index]] | None,
}
_Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
_TRAINING_TYPES: dict[str, Any] = {
    "train_sampling_strategy": Literal["group_by_length", "random", "sequential"],
    "accelerator_config": dict[str, Any] | None,  # not the path of a file
    "fsdp": bool | str | None,
    **dict.fromkeys(("fsdp_config", "deepspeed"), Annotated[dict[str, JsonValue] | None, BeforeValidator(_settings)]),
    "include_num_input_tokens_seen": Literal["all", "non_padding", "no"] | bool,
    "report_to": list[_Tracker] | _Tracker | Literal["none"],
}

# --- what the recipe may not set -----------------------------------------------------------------------------------

_BY_TASK = "the task and the model set it"
_ADAPTER_OWNED = dict.fromkeys(
    ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"), _BY_TASK
) | {
    "inference_mode": "training needs it off",
    "runtime_config": "it is not part of an adapter",
    "arrow_config": "it routes between adapters that are trained already",
    "total_step": "the number of steps of the run sets it",
    "target_r": "it is adapter.r",
}

_EVALUATION = "evaluation is done after training, and every validate_every steps if the recipe says so"
_HUB = "training uploads nothing; `lora-ggpo push` does"
_COLUMNS = "the task chooses the columns"
_RESUMES = "an unfinished run resumes by itself"
_TRAINING_OWNED = {
    "output_dir": "the recipe's output sets it",
    "seed": "the recipe's seeds set it",
    "data_seed": "the recipe's seeds set the order of the data",
    **dict.fromkeys(("resume_from_checkpoint", "restore_callback_states_from_checkpoint"), _RESUMES),
    "ignore_data_skip": "a resumed run must see the batches it has not seen yet",
    "save_only_model": "a run must be able to resume",
    "auto_find_batch_size": "a run must be able to resume with the same batches",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    **dict.fromkeys(("remove_unused_columns", "length_column_name", "label_names"), _COLUMNS),
    **dict.fromkeys(
        [
            *("do_train", "do_eval", "do_predict", "eval_delay", "eval_on_start"),
            *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "batch_eval_metrics"),
            *("include_for_metrics", "prediction_loss_only", "bf16_full_eval", "fp16_full_eval"),
        ],
        _EVALUATION,
    ),
    "disable_tqdm": "progress is shown in one way",
    "parallelism_config": "the processes share rows and weights, not sequences or layers; see the recipe's sharding",
    "local_rank": "torchrun sets it",
    "enable_jit_checkpoint": "a run that is asked to stop saves a checkpoint in any case",
    "debug": "a loss that is not finite stops the run, and --debug shows tracebacks",
}
_OWNED: dict[str, dict[str, str]] = {"adapter": _ADAPTER_OWNED, "training": _TRAINING_OWNED}


def why_not_set(section: str, name: str) -> str | None:
    """Why a recipe may not set ``section.name``; None if it may, or if there is no such setting."""
    if section == "training" and name.startswith(("push_to_hub", "hub_", "trackio_")):
        return _HUB
    return _OWNED.get(section, {}).get(name)


# --- sections ------------------------------------------------------------------------------------------------------


_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _mirror(
    name: str,
    cls: type,
    section: str,
    ranges: Mapping[str, Any] | None = None,
    types: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    **further: tuple[Any, Any],
) -> type[BaseModel]:
    """A pydantic model with the fields of dataclass `cls`, so that they are checked and described like our own.

    Args:
        section: Of the recipe, which leaves out the fields that it may not set.
        ranges: Of numbers, by field.
        types: Those that are narrower or wider than the dataclass's.
        defaults: Those that differ from the dataclass's.
        further: Fields that it has not.
    """
    hints = typing.get_type_hints(cls) | dict(types or {})
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.init and field.name not in ALIASES and not why_not_set(section, field.name):
            default = None if field.default is dataclasses.MISSING else field.default
            hint = _ranged(_describable(hints[field.name]), (ranges or {}).get(field.name))
            shown = (defaults or {}).get(field.name, default)
            description = field.metadata.get("help")
            fields[field.name] = (hint | None if default is None else hint, Field(shown, description=description))
    return create_model(name, __config__=_STRICT, **(fields | further))


@functools.cache  # most fields have one of a few types
def _describable(hint: Any) -> Any:
    """`hint`, or Any where pydantic cannot express the type."""
    if hint is float:
        return float | int  # a whole number stays one: transformers' step counts are declared as floats
    members = typing.get_args(hint)
    if str in members and any(isinstance(member, type) and issubclass(member, Enum) for member in members):
        return typing.Union[tuple(member for member in members if member is not str)]  # noqa: UP007  built from parts
    try:
        TypeAdapter(hint).json_schema()
    except (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema):
        return Any
    return hint


def _ranged(hint: Any, interval: Any) -> Any:
    """`hint` with its numbers in `interval`; true and false are no numbers."""
    members = set(typing.get_args(hint)) or {hint}
    if not members & {int, float} or bool in members:
        return hint
    bounds = (*([interval] if interval else []), BeforeValidator(_number))
    ranged = [Annotated[m, *bounds] if m in (int, float) else m for m in typing.get_args(hint) or (hint,)]
    return typing.Union[tuple(ranged)]  # noqa: UP007  built from parts


if typing.TYPE_CHECKING:

    class AdapterFields(BaseModel): ...

    class GGPOFields(BaseModel): ...

    class TrainingFields(BaseModel): ...

else:
    AdapterFields = _mirror(
        "AdapterFields",
        AdaLoraConfig,  # LoraConfig and what AdaLoRA adds
        "adapter",
        _ADAPTER_RANGES,
        _ADAPTER_TYPES,
        type=(Literal["lora", "adalora"], Field("lora", description="adalora: r is the average rank in the end.")),
        layers_by_gradient=(
            _ranged(float | None, Interval(gt=0, le=1)),
            Field(None, description="Share of the blocks that get LoRA, by the size of their gradients (2604.15351)."),
        ),
        sc_lora_beta=(
            _ranged(float | None, Interval(ge=0, le=1)),
            Field(None, description="sc_lora: weight of the general text that it keeps away from; null is 0.8."),
        ),
    )
    _CHOICES: dict[str, Any] = {name: Literal[*names] for name, names in CHOICES.items()}
    _CHOICES |= {"noise": Annotated[Literal[*CHOICES["noise"]], BeforeValidator(_noise_of_today)]}
    GGPOFields = _mirror("GGPOFields", GGPOConfig, "ggpo", types=_CHOICES)
    TrainingFields = _mirror(
        "TrainingFields", TrainingArguments, "training", _TRAINING_RANGES, _TRAINING_TYPES, TRAINING_DEFAULTS
    )


class OptimizerFields(BaseModel):
    """An optimizer of another package; the learning rate and weight decay are those of ``training``."""

    model_config = _STRICT

    kind: Literal["lora-plus", "lora-fa", "ivon"] = Field(
        description="lora-plus (2402.12354), lora-fa (2308.03303) or ivon (2411.04421)."
    )
    lr_ratio: float = Field(16.0, ge=1, description="lora-plus: learning rate of B in units of that of A.")
    ess: float = Field(1e7, gt=0, description="ivon: effective sample size; the more, the smaller its draws.")
    hess_init: float = Field(3e-4, gt=0, description="ivon: what its Hessian begins with; the more, the smaller draws.")

    @property
    def options(self) -> dict[str, float]:
        """The settings that this kind has."""
        names = {"lora-plus": ["lr_ratio"], "lora-fa": [], "ivon": ["ess", "hess_init"]}[self.kind]
        return {name: getattr(self, name) for name in names}


class SAMFields(BaseModel):
    """Sharpness-aware minimisation: a second forward and backward pass at a worse point (arXiv 2010.01412)."""

    model_config = _STRICT

    rho: float = Field(0.05, gt=0, description="Distance of the worse point.")
    space: Literal["adapter", "weights"] = Field(
        "adapter", description="What is moved: A and B (all parameters without an adapter), or W0 + s B A."
    )


class MGPOFields(BaseModel):
    """LoRA-MGPO: the gradient is taken ahead along the optimizer's momentum (arXiv 2502.14538v2).

    Its mu is ``training.adam_beta1``. Its authors set rho, mu and beta to 0.05, 0.9 and 0.9 for understanding, and to
    0.01, 0.8 and 0.8 for generation.
    """

    model_config = _STRICT

    rho: float = Field(0.05, gt=0, description="Length of a layer's move where its average gradient norm is 1.")
    beta: float = Field(0.9, ge=0, lt=1, description="Weight of the past in that average.")


class BiLoRAFields(BaseModel):
    """Bi-LoRA: a second adapter, dropped in the end, ascends the loss as the first descends (arXiv 2508.19564)."""

    model_config = _STRICT

    rho: float = Field(0.05, gt=0, description="Largest norm of the second adapter's part of the weights, all layers.")
    rank: int = Field(8, ge=1, description="Its rank.")
