"""The recipe of a run: every setting, typed and checked before anything is loaded."""

from __future__ import annotations

import json
import os
import typing
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from lora_ggpo.data import DataConfig
from lora_ggpo.data.general import GeneralTextConfig
from lora_ggpo.errors import UserError
from lora_ggpo.models.load import settle
from lora_ggpo.perturbation import GGPOConfig
from lora_ggpo.recipe.aliases import describe, translate
from lora_ggpo.recipe.explain import explain
from lora_ggpo.recipe.fields import (
    ADAPTER_DEFAULT,
    TRAINING_DEFAULTS,
    AdapterFields,
    BiLoRAFields,
    GGPOFields,
    MGPOFields,
    OptimizerFields,
    SAMFields,
    TrainingFields,
)
from lora_ggpo.recipe.rules import broken_rules
from lora_ggpo.recipe.source import Source, parse_source, read_source
from lora_ggpo.tasks import TaskConfig
from lora_ggpo.workspace.paths import expand_home

_FLAGS = ("bf16", "fp16")


class Recipe(BaseModel):
    """Everything that decides a run. `load_recipe` makes one from a YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: typing.Annotated[str, AfterValidator(settle)] = Field(
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
    bi_lora: BiLoRAFields | None = Field(None, description="Bi-LoRA; null is none.")
    optimizer: OptimizerFields | None = Field(None, description="Optimizers of other packages; null is training.optim.")
    freeze_body: bool = Field(False, description="With adapter: null, train the new classification head alone.")
    freeze_head: bool = Field(
        False, description="Leave the classification head as it was drawn; it is saved with the adapter all the same."
    )
    model_dropout: float | None = Field(
        None, ge=0, lt=1, description="Dropout in the model itself, in place of all rates in its config; null is those."
    )
    attn_implementation: str | None = Field(
        None,
        min_length=1,
        description="Attention in training, as transformers names it: sdpa, eager, flash_attention_2 (on a GPU, with "
        "flash-attn and 16-bit weights); null is transformers' own choice.",
    )
    frozen_prefix: bool = Field(
        True,
        description="Where embeddings and lowest layers are neither trained nor perturbed nor dropped out, compute "
        "what they give once for each row (tasks classification and regression).",
    )
    training: TrainingFields = Field(TrainingFields(), description="Fields of transformers.TrainingArguments.")
    seeds: list[int] = Field([0], min_length=1, description="One run for each seed, in OUTPUT/seed-N.")
    output: typing.Annotated[str, AfterValidator(expand_home)] = Field(min_length=1, description="Folder of the runs.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Type of the model's weights.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="bf16 or fp16: autocast to it; fp32: none, so the type of the weights decides; auto: bf16 where "
        "the processor has instructions for it, else fp32.",
    )
    quantise: Literal["nf4", "int8"] | None = Field(
        None, description="QLoRA: keep the linear layers of the model in 4 (nf4) or 8 bits (int8); null does not."
    )
    sharding: Literal["none", "fsdp2", "zero1", "zero2", "zero3"] = Field(
        "none",
        description=(
            "What the processes of a launcher share out: every weight (fsdp2, and zero3 by DeepSpeed), the optimizer's "
            "state (zero1), or that and the gradients (zero2)."
        ),
    )
    validate_every: int | None = Field(
        None, gt=0, description="Optimizer steps between validations (at most 500 rows) during training; null is never."
    )
    keep: Literal["last", "best"] = Field(
        "last", description="Which weights to save and to score: the last, or those of the best validation."
    )
    keep_metric: str | None = Field(
        None, description="The metric of the validation set that says which is best; null is the task's loss."
    )
    patience: int | None = Field(
        None,
        gt=0,
        description="With keep best: end the training after so many validations in a row without a better one.",
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
    score_rows: int | None = Field(
        None, gt=0, description="Rows of each set to score, at most, the same in every run; null is all of them."
    )

    forgetting: GeneralTextConfig | None = Field(
        None,
        description="Causal language models: text on which the rise of the loss by training is measured, or just its "
        "source, such as general-text; null measures none.",
    )

    _source: Source | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _translated(cls, values: Any) -> Any:
        return translate(values)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        broken = next(broken_rules(self), None)
        if broken:
            raise ValueError(broken)
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
    def asked_precision(self) -> str:
        """`precision`; where that is auto, what ``training.bf16`` and ``training.fp16`` of an older recipe say."""
        said = {name: getattr(self.training, name) for name in _FLAGS if name in self.training.model_fields_set}
        if self.precision != "auto" or not said:
            return self.precision
        return next((name for name, value in said.items() if value), "fp32")

    @property
    def shards(self) -> str | None:
        """Who shares the model out, by `sharding` or by what `training` sets: fsdp2, zero1 and so on, or None."""
        training = self.training_fields
        if self.sharding != "none":
            return self.sharding
        if training.get("fsdp"):
            return "fsdp2"
        zero = (training.get("deepspeed") or {}).get("zero_optimization")
        stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
        return f"zero{stage}" if training.get("deepspeed") else None

    @property
    def training_fields(self) -> dict[str, Any]:
        """The TrainingArguments fields that are set, by the recipe or by `TRAINING_DEFAULTS`; the precision apart.

        Completions are scored in batches as large as those of training, whatever fits that: logits over the whole
        vocabulary for every token take more memory than anything else of a forward pass.
        """
        fields = TRAINING_DEFAULTS | self.training.model_dump(exclude_unset=True, exclude=set(_FLAGS))
        if self.task.type.scores_every_token and "per_device_eval_batch_size" not in self.training.model_fields_set:
            fields["per_device_eval_batch_size"] = fields["per_device_train_batch_size"]
        return fields

    @property
    def kept_metric(self) -> str:
        """The metric of the validation set by which the best weights are kept."""
        return self.keep_metric or self.task.type.loss

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
        own = {
            "adapter": self.adapter_fields,
            "ggpo": ggpo and ggpo.to_dict(),
            "training": self.training_fields,
            "precision": self.asked_precision,
            "seeds": [seed],
            "output": os.path.abspath(self.output),
        }
        others = self.model_dump(exclude=set(own))
        values = {name: own[name] if name in own else others[name] for name in Recipe.model_fields}
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
    try:
        recipe = Recipe.model_validate(source.values)
    except ValidationError as error:
        raise UserError(explain(Recipe, source, error)) from error
    recipe._source = source
    return recipe


def json_schema() -> str:
    """The JSON schema of a recipe: every field of LoraConfig, GGPOConfig and TrainingArguments, and the aliases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # defaults that JSON has no form for are left out
        schema = Recipe.model_json_schema()
    schema["$defs"]["TrainingFields"]["properties"] |= describe()
    return json.dumps(schema, indent=2)
