"""The recipe of a run: every setting, typed and checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from peft import AdaLoraConfig, LoraConfig
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from lora_ggpo.data import DataConfig
from lora_ggpo.errors import UserError
from lora_ggpo.models.load import settled
from lora_ggpo.perturbation import GGPOConfig
from lora_ggpo.recipe.fields import (
    ADAPTER_DEFAULT,
    TRAINING_DEFAULTS,
    AdapterFields,
    GGPOFields,
    MGPOFields,
    OptimizerFields,
    SAMFields,
    TrainingFields,
    adapter_owned,
    training_owned,
)
from lora_ggpo.recipe.source import KeyPath, Source, parse_source, read_source
from lora_ggpo.tasks import TASKS, Task, TaskConfig
from lora_ggpo.workspace.paths import absolute, expanded

_NICKNAMES = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "seed": "seeds",
    "dataset": "data",
    "name": "source",
    "lora": "adapter",
    "peft": "adapter",
}


class Recipe(BaseModel):
    """Everything that decides a run. `load_recipe` makes one from a YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: typing.Annotated[str, AfterValidator(settled)] = Field(
        min_length=1, description="Bundled model (minilm, smollm2), local folder, or hub id."
    )
    task: TaskConfig = Field(description="Task settings, or just the kind of task.")
    data: DataConfig = Field(description="Data settings, or just the source.")
    adapter: AdapterFields | None = Field(
        AdapterFields(**ADAPTER_DEFAULT), description="Fields of peft.LoraConfig; null is full fine-tuning."
    )
    ggpo: GGPOFields | None = Field(
        None,
        description="Fields of GGPOConfig; null is plain LoRA. The noise seed is the run's seed unless it is set here.",
    )
    sam: SAMFields | None = Field(None, description="Sharpness-aware minimisation; null is none.")
    mgpo: MGPOFields | None = Field(None, description="LoRA-MGPO; null is none.")
    optimizer: OptimizerFields | None = Field(None, description="peft's optimizers; null is training.optim.")
    freeze_body: bool = Field(False, description="With adapter: null, train the new classification head alone.")
    training: TrainingFields = Field(TrainingFields(), description="Fields of transformers.TrainingArguments.")
    seeds: list[int] = Field([0], min_length=1, description="One run for each seed, in OUTPUT/seed-N.")
    output: typing.Annotated[str, AfterValidator(expanded)] = Field(min_length=1, description="Folder of the runs.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Type of the model's weights.")
    quantise: Literal["nf4", "int8"] | None = Field(
        None, description="QLoRA: keep the linear layers of the model in 4 (nf4) or 8 bits (int8); null does not."
    )
    validate_every: int | None = Field(
        None, gt=0, description="Optimizer steps between validations (at most 500 rows) during training; null is never."
    )

    stop_loss: float | None = Field(
        None,
        gt=0,
        description=(
            "End the training at the first validation that finds the mean loss of the training rows (at most 500, "
            "labels as given, without noise or dropout) at or below this; null trains all steps."
        ),
    )
    score_test: bool = Field(
        True, description="Score the test sets after training; false while settings are still being chosen."
    )

    _source: Source | None = PrivateAttr(None)

    @field_validator("seeds")
    @classmethod
    def _usable_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**32:
            raise ValueError("seeds must be different whole numbers from 0 to 4294967295")
        return seeds

    @field_validator("training")
    @classmethod
    def _usable_training(cls, fields: BaseModel) -> BaseModel:
        values = fields.model_dump(exclude_unset=True)
        if values.get("max_steps", 1) < 1 and values["max_steps"] != -1:  # -1 is transformers' "not set"
            raise ValueError("max_steps must be above 0, or there is nothing to train")
        if not values.get("dataloader_num_workers"):
            idle = [name for name in _OF_WORKERS if values.get(name)]
            if idle:
                raise ValueError(f"{idle[0]} is for workers; set training.dataloader_num_workers, or leave it out")
        return fields

    @field_validator("ggpo")
    @classmethod
    def _valid_ggpo(cls, fields: BaseModel | None) -> BaseModel | None:
        if fields is not None:
            try:
                GGPOConfig(**fields.model_dump(exclude_unset=True))
            except ValueError as error:
                raise ValueError(str(error).removeprefix("GGPOConfig.")) from error
        return fields

    @model_validator(mode="after")
    def _compatible(self) -> Recipe:
        for section, needs in _NEEDS.items():
            value = getattr(self, section)
            problem = needs(self, value) if value else None
            if problem:  # of a field of the section it begins with a dot
                raise ValueError(f"{section}{problem}" if problem.startswith(".") else f"{section} {problem}")
        return self

    @property
    def adapter_fields(self) -> dict[str, Any] | None:
        """The LoraConfig fields that are set, or None for full fine-tuning."""
        return None if self.adapter is None else self.adapter.model_dump(exclude_unset=True)

    @property
    def adalora(self) -> bool:
        """Whether the adapter is AdaLoRA's."""
        return (self.adapter_fields or {}).get("type") == "adalora"

    @property
    def training_fields(self) -> dict[str, Any]:
        """The TrainingArguments fields that are set, by the recipe or by `TRAINING_DEFAULTS`.

        Completions are scored in batches as large as those of training, whatever fits that: logits over the whole
        vocabulary for every token take more memory than anything else of a forward pass.
        """
        fields = TRAINING_DEFAULTS | self.training.model_dump(exclude_unset=True)
        if self.task.type.scores_every_token and "per_device_eval_batch_size" not in self.training.model_fields_set:
            fields["per_device_eval_batch_size"] = fields["per_device_train_batch_size"]
        return fields

    def ggpo_config(self, seed: int) -> GGPOConfig | None:
        """The method's settings in the run with `seed`, or None for plain LoRA."""
        if self.ggpo is None:
            return None
        return GGPOConfig(**{"seed": seed} | self.ggpo.model_dump(exclude_unset=True))

    def resolved(self, seed: int) -> dict[str, Any]:
        """The recipe of the one run with `seed`, defaults spelt out: plain values, and itself a valid recipe.

        It means the same in any working directory.
        """
        ggpo = self.ggpo_config(seed)
        values: dict[str, Any] = {
            "model": self.model,
            "task": self.task.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json"),
            "adapter": self.adapter_fields,
            "ggpo": ggpo and ggpo.to_dict(),
            "sam": self.sam and self.sam.model_dump(),
            "mgpo": self.mgpo and self.mgpo.model_dump(),
            "optimizer": self.optimizer and self.optimizer.model_dump(),
            "freeze_body": self.freeze_body,
            "training": self.training_fields,
            "seeds": [seed],
            "output": absolute(self.output),
            "dtype": self.dtype,
            "quantise": self.quantise,
            "validate_every": self.validate_every,
            "stop_loss": self.stop_loss,
            "score_test": self.score_test,
        }
        # Sets and enums, which a LoraConfig or TrainingArguments field may hold, as lists and strings.
        plain = TypeAdapter(dict[str, Any]).dump_python(values, mode="json")
        return typing.cast(dict[str, Any], plain)

    @contextmanager
    def locate_errors(self) -> Iterator[None]:
        """Put file and line before an error that begins with one of the recipe's fields (``adapter.r ...``)."""
        try:
            yield
        except UserError as error:
            message = str(error)
            section, *within = message.split(" ", 1)[0].rstrip(":,").split(".")
            if self._source is None or section.lower() not in Recipe.model_fields:
                raise
            raise UserError(f"{self._source.where((section.lower(), *within))}: {message}") from error


def _ggpo_problem(recipe: Recipe, ggpo: GGPOFields) -> str | None:
    if recipe.adapter is None:
        return "perturbs a LoRA adapter, but adapter is null; set ggpo: null as well, or an adapter"
    if recipe.adalora:
        return "perturbs LoRA layers, which those of AdaLoRA are not; choose adapter.type lora"
    return None


def _sam_problem(recipe: Recipe, sam: SAMFields) -> str | None:
    if recipe.ggpo:
        return "and ggpo both decide where the gradient is taken; set one of them to null"
    if sam.space == "weights" and (recipe.adapter is None or recipe.adalora):
        return "with space weights moves the full weights of LoRA layers, and there are none; use space adapter"
    return None


def _mgpo_problem(recipe: Recipe, mgpo: MGPOFields) -> str | None:
    if recipe.ggpo or recipe.sam:
        other = "ggpo" if recipe.ggpo else "sam"
        return f"and {other} both decide where the gradient is taken; set one of them to null"
    if recipe.optimizer and recipe.optimizer.kind == "lora-fa":
        return "follows Adam's momentum, which LoRA-FA does not keep; set optimizer: null"
    if recipe.training_fields.get("optim", _MOMENTUM_KEPT[0]) not in _MOMENTUM_KEPT:
        return f"follows the momentum of torch's Adam; set training.optim to {' or '.join(_MOMENTUM_KEPT)}"
    return None


def _optimizer_problem(recipe: Recipe, optimizer: OptimizerFields) -> str | None:
    if recipe.adapter is None or recipe.adalora:
        return f"{optimizer.kind} treats A and B of a LoRA adapter differently, and there is none; set it to null"
    if optimizer.kind == "lora-fa":
        idle = _changed(optimizer, ("lr_ratio",)) or sorted(recipe.training.model_fields_set & _ADAMS)
        return f"lora-fa has an Adam of its own, which takes no {idle[0]}; leave that out" if idle else None
    return None


def _freeze_problem(recipe: Recipe, freeze_body: bool) -> str | None:
    if recipe.adapter is not None:
        return "trains the head alone, but there is an adapter; set adapter: null"
    if not recipe.task.type.architecture.new_head:
        headed = " or ".join(kind for kind, task in TASKS.items() if task.architecture.new_head)
        return f"needs task {headed}: other tasks have no head of their own"
    return None


def _quantise_problem(recipe: Recipe, quantise: str) -> str | None:
    if recipe.adapter is None:
        return f"{quantise} needs an adapter, since quantised weights cannot be trained; set it to null, or an adapter"
    fields = recipe.adapter_fields or {}
    init = fields.get("init_lora_weights", True)
    if init not in _INITS_BESIDE_W0:
        return (
            f"{quantise} keeps the weights as they are, but adapter.init_lora_weights {init} reads or changes them "
            "unquantised; choose true, gaussian or eva"
        )
    if quantise == "int8" and fields.get("use_dora"):
        return "int8 hides the scales of the weights from peft's DoRA; use nf4, or adapter.use_dora false"
    if recipe.sam and recipe.sam.space == "weights":
        return f"{quantise} keeps the weights as they are, but sam.space weights moves them; use space adapter"
    return None


_MOMENTUM_KEPT = ("adamw_torch", "adamw_torch_fused")
_OF_WORKERS = (
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
)
_LORA, _ADALORA = ({field.name for field in dataclasses.fields(config)} for config in (LoraConfig, AdaLoraConfig))
_IDLE_IN_ADALORA = (
    *("rank_pattern", "alpha_pattern", "init_lora_weights", "eva_config", "corda_config", "lora_ga_config"),
    *("use_rslora", "lora_bias", "use_qalora", "use_bdlora", "velora_config", "monteclora_config", "kasa_config"),
    "alora_invocation_tokens",
)
_DEFAULT_RANK: int = LoraConfig().r
_ADAMS = {"optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon"}
_INITS_BESIDE_W0 = (True, False, "gaussian", "eva")
"""Starting values for which peft neither decomposes nor writes W0."""


def _changed(section: BaseModel, names: Iterable[str]) -> list[str]:
    """Which of `names` a recipe sets to something else than the default: a recorded recipe spells defaults out."""
    fields, values = type(section).model_fields, dict(section)
    return [n for n in names if values[n] != fields[n].get_default(call_default_factory=True, validated_data=values)]


def _idle(recipe: Recipe, section: BaseModel, looked_at: typing.Callable[[type[Task]], frozenset[str]]) -> list[str]:
    """Settings that the recipe changes and only other tasks look at."""
    others = frozenset[str]().union(*map(looked_at, TASKS.values())) - looked_at(recipe.task.type)
    return _changed(section, [name for name in type(section).model_fields if name in others])


def _data_problem(recipe: Recipe, data: DataConfig) -> str | None:
    idle = _idle(recipe, data, lambda task: task.columns)
    return f"sets {idle[0]}, which task {recipe.task.kind} does not look at; leave it out" if idle else None


def _task_problem(recipe: Recipe, task: TaskConfig) -> str | None:
    idle = _idle(recipe, task, lambda task: task.settings)
    if idle:
        return f"sets {idle[0]}, which kind {task.kind} does not look at; leave it out"
    if task.packing and recipe.training_fields.get("use_cache"):
        return "with packing needs training.use_cache: false: with a cache, examples would see those before them"
    return None


def _adapter_problem(recipe: Recipe, adapter: AdapterFields) -> str | None:
    fields = recipe.adapter_fields or {}
    if not recipe.adalora:
        own = [name for name in fields if name in _ADALORA and name not in _LORA]
        return f".{own[0]} is a setting of AdaLoRA; set adapter.type to adalora as well" if own else None
    init_r, r = fields.get("init_r"), fields.get("r", _DEFAULT_RANK)
    if init_r is not None and init_r < r:
        return f".init_r is the rank AdaLoRA starts from: it must be at least adapter.r, {r}, not {init_r}"
    idle = _changed(adapter, _IDLE_IN_ADALORA)
    return f".{idle[0]} is none of AdaLoRA's settings; leave it out" if idle else None


_NEEDS: dict[str, typing.Callable[[Recipe, Any], str | None]] = {
    "adapter": _adapter_problem,
    "task": _task_problem,
    "data": _data_problem,
    "ggpo": _ggpo_problem,
    "sam": _sam_problem,
    "mgpo": _mgpo_problem,
    "optimizer": _optimizer_problem,
    "freeze_body": _freeze_problem,
    "quantise": _quantise_problem,
    "stop_loss": lambda recipe, _: None if recipe.validate_every else "is looked at every validate_every steps: set it",
}
"""Of a section that is used: what forbids it in this recipe, or None."""

_SECTIONS: dict[KeyPath, type[BaseModel]] = {
    (): Recipe,
    ("task",): TaskConfig,
    ("data",): DataConfig,
    ("adapter",): AdapterFields,
    ("ggpo",): GGPOFields,
    ("sam",): SAMFields,
    ("mgpo",): MGPOFields,
    ("optimizer",): OptimizerFields,
    ("training",): TrainingFields,
}


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: A YAML file.
        overrides: ``key=value`` with dotted keys and YAML values, such as ``training.max_steps=10``.

    Raises:
        UserError: one sentence with the file, the line and the field of the first thing that is wrong.
    """
    return check_recipe(read_source(path, overrides))


def parse_recipe(text: str, name: str, overrides: Iterable[str] = ()) -> Recipe:
    """As `load_recipe`, for YAML text at hand; `name` stands for the file in error messages."""
    return check_recipe(parse_source(text, name, overrides))


def check_recipe(source: Source) -> Recipe:
    """Make a recipe of the values of `source`.

    Raises:
        UserError: as `load_recipe`.
    """
    _refuse_owned(source, "training", training_owned)
    _refuse_owned(source, "adapter", adapter_owned)
    try:
        recipe = Recipe.model_validate(source.values)
    except ValidationError as error:
        raise UserError(_explain(source, error)) from error
    recipe._source = source
    return recipe


def json_schema() -> str:
    """The JSON schema of a recipe, with every field of LoraConfig, GGPOConfig and TrainingArguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # defaults that JSON has no form for are left out
        return json.dumps(Recipe.model_json_schema(), indent=2)


def dump_yaml(values: Mapping[str, Any]) -> str:
    """`values` as YAML, in the order given."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)


def _refuse_owned(source: Source, section: str, owned: typing.Callable[[str], str | None]) -> None:
    values = source.values.get(section)
    for key in values if isinstance(values, dict) else ():
        reason = owned(str(key))
        if reason:
            raise UserError(f"{source.where((section, key))}: {section}.{key} cannot be set: {reason}.")


_WORDING = {
    "Input should be greater than or equal to": "must be at least",
    "Input should be": "must be",
    "Input should have": "must have",
    "String should": "must",
    "Unable to parse input string as an integer, exceeded maximum size": "must be a smaller number",
    "Unexpected keyword argument": "is not a setting of it",
}
"""Of pydantic's messages, as they read behind the name of a field."""


def _explain(source: Source, error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    unknown = next((one for one in errors if one["type"] == "extra_forbidden"), None)
    if unknown:
        return _explain_unknown(source, unknown["loc"])
    path = _written(source, errors[0]["loc"])
    # Of the members of a union, the one that the value is of has more to say than that it is none of the others.
    first = next((e for e in errors if e["type"] == "value_error" and e["loc"][: len(path)] == path), errors[0])
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    for pydantic, ours in _WORDING.items():
        message = message.replace(pydantic, ours)
    if first["type"] == "missing":
        missing = ".".join(map(str, first["loc"]))
        return f"{source.where(path)}: {missing} is missing; add it."
    if first["type"] == "value_error":
        field, _, rest = message.partition(" ")
        within = _written(source, tuple(field.split(".")), path)
        if len(within) > len(path):
            path, message = within, rest  # a check of a whole section names the field first: point at it
        elif path and field == path[-1]:
            message = rest
    subject = ".".join(map(str, path))
    return f"{source.where(path)}: {f'{subject} ' if subject else ''}{message}{_shown(first)}."


def _shown(error: ErrorDetails) -> str:
    value = error["input"]
    if error["type"] in ("value_error", "missing") or isinstance(value, (dict, list, BaseModel)):
        return ""
    if value is None:
        return ", not null"
    return f", not {value!r}"


def _explain_unknown(source: Source, loc: KeyPath) -> str:
    path = _written(source, loc)
    section = next((path[:end] for end in range(len(path) - 1, -1, -1) if path[:end] in _SECTIONS), ())
    key = str(path[-1]) if path else str(loc[-1])
    valid = list(_SECTIONS[section].model_fields)
    nickname = _NICKNAMES.get(key)
    near = [nickname] if nickname in valid else difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    wanted = {key, nickname}
    homes = [f"{'.'.join(map(str, home))}." for home, model in _SECTIONS.items() if wanted & set(model.model_fields)]
    if near:
        hint = f"did you mean {near[0]}?"
    elif homes:
        actual = key if any(key in model.model_fields for model in _SECTIONS.values()) else nickname
        hint = f"did you mean {homes[0].lstrip('.')}{actual}?"
    else:
        hint = f"valid here: {', '.join(valid)}." if len(valid) <= 16 else "`lora-ggpo schema` lists what is."
    return f"{source.where(path)}: {'.'.join(map(str, path))} is not a setting; {hint}"


def _written(source: Source, loc: KeyPath, path: KeyPath = ()) -> KeyPath:
    """`path`, and the part of pydantic's location that is there: it also names union members and validators."""
    for part in loc:
        if part in _keys(source.values, path):
            path = (*path, part)
    return path


def _keys(values: Any, path: KeyPath) -> Iterable[Any]:
    for part in path:
        values = values[part]
    if isinstance(values, dict):
        return values.keys()
    return range(len(values)) if isinstance(values, list) else ()
