"""The precision of a run. Where its recipe says `auto` the machine that begins it decides, and it keeps that."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from lora_ggpo.errors import UserError
from lora_ggpo.recipe.recipe import Recipe
from lora_ggpo.training.folder import is_begun, recorded_precision
from lora_ggpo.workspace.environment import is_fast_in_bf16

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
"""Types of autocast by precision; None is the model's own."""


def choose_precision(recipe: Recipe, folder: Path) -> str:
    """As the recipe asks; for `auto` as the run in `folder` was begun, or else as is fastest here.

    A run that does not say how it was begun is of release 0.1.0, which knew no `auto`.

    Raises:
        UserError: it cannot be had here, or what the folder says of it is damaged.
    """
    on_cpu = recipe.training_fields.get("use_cpu") or not torch.accelerator.is_available()
    asked = recipe.asked_precision
    if asked == "fp16" and on_cpu:
        raise UserError("precision fp16 needs a GPU; set it to auto.")
    if asked != "auto":
        return asked
    if not is_begun(folder):
        return "bf16" if is_fast_in_bf16(on_cpu) else "fp32"
    begun = recorded_precision(folder) or "fp32"
    if begun not in TYPES:
        raise UserError(f"{folder / 'versions.json'} is damaged: {begun!r} is no precision.")
    return begun


def precision_of(args: TrainingArguments) -> str:
    """The precision that `args` ask for."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
