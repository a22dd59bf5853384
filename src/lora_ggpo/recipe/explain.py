"""pydantic's errors in words: where in the recipe, which setting, what is wrong with it, what may have been meant."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lora_ggpo.recipe.fields import why_not_set
from lora_ggpo.recipe.source import KeyPath, Source

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
    "early_stopping_patience": "patience",
    "dataset": "data",
    "name": "source",
    "lora": "adapter",
    "peft": "adapter",
}
_WORDING = {
    "Input should be greater than or equal to": "must be at least",
    "Input should be": "must be",
    "Input should have": "must have",
    "String should": "must",
    "Unable to parse input string as an integer, exceeded maximum size": "must be a smaller number",
    "Unexpected keyword argument": "is not a setting of it",
}
"""pydantic's messages as they read behind the name of a field."""


def sections(model: type[BaseModel]) -> dict[KeyPath, type[BaseModel]]:
    """`model`, and the models of its fields by their names."""
    found: dict[KeyPath, type[BaseModel]] = {(): model}
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found[name,] = kind
    return found


def explain(model: type[BaseModel], source: Source, error: ValidationError) -> str:
    """The first thing that is wrong with the values of `source`, in one sentence; a setting that is none comes first.

    Args:
        model: What the values were to become.
    """
    errors = error.errors(include_url=False)
    unknown = next((one for one in errors if one["type"] == "extra_forbidden"), None)
    if unknown:
        return _explain_unknown(sections(model), source, unknown["loc"])
    path = _written(source, errors[0]["loc"])
    # pydantic lists an error for each member of a union; a check of the member that fits says the most.
    first = next((e for e in errors if e["type"] == "value_error" and e["loc"][: len(path)] == path), errors[0])
    if first["type"] == "missing":
        return f"{source.where(path)}: {_dotted(first['loc'])} is missing; add it."
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    for pydantic, ours in _WORDING.items():
        message = message.replace(pydantic, ours)
    if first["type"] == "value_error":
        field, _, rest = message.partition(" ")
        within = _written(source, tuple(field.split(".")), path)
        if len(within) > len(path):
            path, message = within, rest  # a rule names the setting first: point at it
        elif path and field == path[-1]:
            message = rest
    return f"{source.where(path)}: {_dotted(path)}{' ' if path else ''}{message}{_shown(first)}."


def _shown(error: ErrorDetails) -> str:
    value = error["input"]
    if error["type"] == "value_error" or isinstance(value, (dict, list, BaseModel)):
        return ""
    return ", not null" if value is None else f", not {value!r}"


def _explain_unknown(known: dict[KeyPath, type[BaseModel]], source: Source, loc: KeyPath) -> str:
    path = _written(source, loc) or loc[-1:]
    section = next(path[:end] for end in range(len(path) - 1, -1, -1) if path[:end] in known)
    place, key = f"{source.where(path)}: {_dotted(path)}", str(path[-1])
    reason = why_not_set(_dotted(section), key)
    if reason:
        return f"{place} cannot be set: {reason}."
    valid, nickname = list(known[section].model_fields), _NICKNAMES.get(key)
    near = [nickname] if nickname in valid else difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    homes = [(home, name) for home, of in known.items() for name in (key, nickname) if name in of.model_fields]
    elsewhere = [_dotted((*home, name)) for home, name in homes]
    if near or elsewhere:
        hint = f"did you mean {(near or elsewhere)[0]}?"
    else:
        hint = f"valid here: {', '.join(valid)}." if len(valid) <= 16 else "`lora-ggpo schema` lists what is."
    return f"{place} is not a setting; {hint}"


def _dotted(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))


def _written(source: Source, loc: KeyPath, path: KeyPath = ()) -> KeyPath:
    """`path` and what of pydantic's location is in the recipe: it also names union members and validators."""
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
