"""What data to train on."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lora_ggpo.data.sources import OWN_SETS, set_names, settle

_Source = Annotated[str, AfterValidator(settle)]


class DataConfig(BaseModel):
    """Where the text comes from, which columns hold it, and how it is split, cut down and corrupted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: _Source = Field(
        min_length=1,
        description="A bundled set (movie-reviews, amazon-reviews), a .jsonl, .json, .csv, .tsv or .parquet file, "
        "a folder of train, validation and test files of these types, or a hub id.",
    )
    subset: str | None = Field(None, description="Name of a hub dataset's configuration, such as sst2.")
    columns: list[str] | None = Field(
        None, description="Names of the columns of CSV and TSV files that have no header line, from left to right."
    )
    text: str | None = Field(None, description='Column of the text; default "text".')
    text_pair: str | None = Field(
        None, description='Column of a second text, such as hypothesis; default "text_pair", if there is one.'
    )
    label: str | None = Field(
        None, description='Column of the label; default "label" (regression: "score", if there is one).'
    )
    prompt: str | None = Field(
        None,
        description='Fine-tuning on completions: column of the prompt; default "prompt". Columns "messages", '
        '"conversations" (ShareGPT), "instruction", "input", "output" (Alpaca, WizardLM) and "query" with "response" '
        '(MetaMathQA) or "answer" (CodeFeedback) are recognised.',
    )
    completion: str | None = Field(None, description='Column of the completion; default "completion".')
    chosen: str | None = Field(None, description='Preferences: column of the better answer; default "chosen".')
    rejected: str | None = Field(None, description='Preferences: column of the worse answer; default "rejected".')
    choices: str | list[str] | None = Field(
        None,
        description="Multiple choice: column of the options, or one column for each of them; those of ARC, HellaSwag, "
        "OpenBookQA, PIQA and MMLU are recognised.",
    )
    single_turn: bool = Field(
        False,
        description="Of conversations keep those of one user and one assistant message, as prompt and completion: "
        "for models without a chat template.",
    )
    ignore: list[str] = Field(
        [],
        description="Columns that are not looked at, though their names have a meaning for training, such as system, "
        "tools or text_pair.",
    )
    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of the training rows to validate on, if the source has no such split."
    )
    test_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of the training rows to test on, if the source has no such split."
    )
    test_split: Literal["validation"] | None = Field(
        None,
        description="validation: the source's validation split is the test set, and validation rows are split off the "
        "training rows; for data whose test labels are withheld, such as GLUE. null: the test split.",
    )
    split_seed: int = Field(0, ge=0, description="Seed of the splits made here and of the choice of train_size rows.")
    train_size: int | None = Field(
        None, gt=0, description="Number of training rows, stratified by label; a larger size contains the smaller."
    )
    label_noise: float = Field(
        0.0, ge=0, lt=1, description="Share of the training rows whose label is changed to another one."
    )
    noise_seed: int = Field(0, ge=0, description="Seed of the label noise; more noise contains the lesser.")
    out_of_domain: list[_Source] = Field(
        [], description="Further sources with the same labels; their test split is an extra test set."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction and test_fraction must add up to less than 1")
        if self.columns is not None and (not self.columns or len(set(self.columns)) < len(self.columns)):
            raise ValueError("columns must be names that differ, one for each column of the file")
        if len({self.source, *self.out_of_domain}) <= len(self.out_of_domain):
            raise ValueError("out_of_domain must name different sources, none of them the training source")
        taken = sorted(OWN_SETS & set(self.set_names.values()))
        if taken:
            raise ValueError(f"out_of_domain has a source named {taken[0]}, as a set of the run's own is; rename it")
        return self

    @property
    def set_names(self) -> dict[str, str]:
        """What the out-of-domain sets are called, by source."""
        return set_names(self.out_of_domain, OWN_SETS)
