"""General text: what a language model could do before it was trained on something else."""

from __future__ import annotations

from typing import Annotated

import datasets
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lora_ggpo.data.bundled import GENERAL_TEXT, read_bundled_text
from lora_ggpo.data.sources import ALL, read_tables, settle
from lora_ggpo.errors import UserError

_SPLITS = ("test", "validation", ALL, "train")
"""The first of these that the source has is taken: the least likely to have been trained on."""


def _place(source: str) -> str:
    return source if source == GENERAL_TEXT else settle(source)


class GeneralTextConfig(BaseModel):
    """Text on which forgetting is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Annotated[str, AfterValidator(_place)] = Field(
        GENERAL_TEXT,
        min_length=1,
        description="general-text (bundled), a .jsonl, .json, .csv, .tsv or .parquet file, a folder of test files, or "
        "a hub id. The test split is taken; without one, the validation split, or all there is.",
    )
    subset: str | None = Field(None, description="Name of a hub dataset's configuration.")
    text: str = Field("text", description="Column of the text.")
    rows: int = Field(100, gt=0, description="Texts, at most, the same in every run.")
    max_length: int = Field(768, gt=1, description="Tokens of a text; what is behind them is left out.")


def read_general_text(config: GeneralTextConfig) -> datasets.Dataset:
    """The texts of `config`, all of them: "id" and "text".

    Raises:
        UserError: they cannot be read, or there is none.
    """
    bundled = config.source == GENERAL_TEXT
    tables = {ALL: read_bundled_text()} if bundled else read_tables(config.source, config.subset)
    table = next((tables[split] for split in _SPLITS if split in tables and len(tables[split])), None)
    if table is None:
        raise UserError(f"forgetting.source: {config.source} has no rows; give text to measure forgetting on.")
    try:
        return datasets.Dataset.from_dict({"id": table.ids(), "text": table.texts(config.text, "text")})
    except UserError as error:
        raise UserError(str(error).replace("data.text", "forgetting.text")) from error
