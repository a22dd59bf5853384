"""Whether a run still has the data, the base model and the day that it was begun with."""

from __future__ import annotations

import json
import warnings
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from lora_ggpo.data import Splits, digest
from lora_ggpo.errors import UserError
from lora_ggpo.models.chat_template import write_day, writes_day
from lora_ggpo.models.load import explain_unreadable, locate
from lora_ggpo.workspace.files import digests, read_json, write_json

_MODEL_FILES = (".safetensors", ".json", ".txt", ".model")  # weights, settings and tokenizer; the rest is for readers


def record(folder: Path, model: str, splits: Splits, *, begun: bool) -> None:
    """Write ``data.json`` and ``model.json``; check that those of a run that is `begun` say the same still.

    Raises:
        UserError: the data or the model has changed.
    """
    for what, now in (("data", _data(splits)), ("model", _model(model))):
        file = folder / f"{what}.json"
        if begun and _differs(file, now):
            raise UserError(f"The {what} has changed since {folder} was begun; choose another output.")
        write_json(file, now)


def check_model(folder: Path, model: str, *, chosen: bool) -> None:
    """Check that `model` is what the run in `folder` was trained on (an earlier release did not write it down).

    Args:
        chosen: The user names it in place of the one in the recipe.

    Raises:
        UserError: it is not, or it is not there.
    """
    then, elsewhere = _written(folder / "model.json"), "" if chosen else " If it has moved, give its place as --model."
    try:
        now = _model(model)
    except UserError as error:
        raise UserError(f"{error}{elsewhere}") from error
    of_hub, on_hub = "commit" in then, not now or "commit" in now
    if of_hub and not on_hub and chosen:
        told = f"{folder} was trained on a model of the hub; whether {model} is the same cannot be told."
        warnings.warn(told, stacklevel=3)
    elif then and on_hub and not of_hub:
        raise UserError(f"Model {model!r} was a folder when {folder} was trained, and is none here.{elsewhere}")
    elif then and now and then != now:
        raise UserError(f"Model {model!r} is not what {folder} was trained on: its files have changed; put them back.")


def check_data(folder: Path, splits: Splits) -> None:
    """Check that `splits` are those of the run in `folder`.

    Raises:
        UserError: they are not.
    """
    if _differs(folder / "data.json", _data(splits)):
        raise UserError(f"The data has changed since {folder} was trained on it; name what to score with --on.")


def weight_digests(weights: Path) -> dict[str, str]:
    """Digests of the files that decide the trained model; the others in the folder are for readers and for a hub."""
    return digests(sorted(path for path in weights.iterdir() if path.suffix in (".safetensors", ".json")), weights)


def check_weights(weights: Path, metrics: dict[str, Any]) -> None:
    """Check that the weights are those the metrics were measured with (an earlier release did not write it down).

    Raises:
        UserError: they are not.
    """
    for name, digest_then in metrics.get("weights", {}).items():
        file = weights / name
        if not file.is_file():
            raise UserError(f"{file} is missing; the run ended with it, and other weight formats are not read.")
        if digests([file], weights)[name] != digest_then:
            raise UserError(f"{file} is damaged: it is not what the run ended with.")


def keep_day(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Make a chat template that writes today's date write the day on which the run in `folder` was begun."""
    if not writes_day(tokenizer):
        return
    day = recorded_day(folder / "versions.json", "begun")
    if day is None:
        day = date.fromtimestamp((folder / "recipe.yaml").stat().st_mtime)
        warnings.warn(
            f"{folder} does not say on which day it was begun (an earlier release did not write it down), but its "
            f"chat template writes the day: {day} is taken, the date of its recipe.yaml.",
            stacklevel=2,
        )
    write_day(tokenizer, day)


def recorded_day(file: Path, key: str) -> date | None:
    """The day that a `file` of a run or an evaluation has under `key`, if it is written down.

    Raises:
        UserError: what is written there is no day.
    """
    day = _written(file).get(key)
    try:
        return None if day is None else date.fromisoformat(day)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: {day!r} is no day such as 2026-01-31.") from error


def same_model(folder: Path, other: Path) -> bool:
    """Whether two runs train the same base model, as far as their folders tell."""
    one, another = _written(folder / "model.json"), _written(other / "model.json")
    known = one and another and ("commit" in one) == ("commit" in another)  # a commit cannot be told from files
    return not known or one == another


def _written(file: Path) -> dict[str, Any]:
    found = read_json(file) if file.exists() else {}  # an earlier release did not write it
    return found if isinstance(found, dict) else {}


def _differs(file: Path, now: dict[str, Any]) -> bool:
    then = _written(file)
    return bool(then and now and _plain(then) != _plain(now))  # nothing is known of a model not yet downloaded


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """`facts` without the names of out-of-domain sets, which an earlier release called by their paths."""
    if not isinstance(facts.get("splits"), dict):
        return facts
    own = {name: facts["splits"].get(name) for name in ("train", "validation", "test")}
    others = [json.dumps(of, sort_keys=True) for name, of in facts["splits"].items() if name not in own]
    return {**facts, "splits": {**own, "others": sorted(others)}}


def _data(splits: Splits) -> dict[str, Any]:
    sets = {"train": splits.train, "validation": splits.validation, "test": splits.test, **splits.out_of_domain}
    return {
        "labels": splits.labels,
        "splits": {name: {"rows": len(rows), "sha256": digest(rows)} for name, rows in sets.items()},
    }


def _model(name: str) -> dict[str, str]:
    """The digests of a model's files, or the hub's commit of what is cached here; empty if nothing is."""
    source, gguf_file = locate(name)
    folder = Path(source)
    if gguf_file:
        return {gguf_file: _digest(folder / gguf_file)}
    if folder.is_dir():
        return {file.name: _digest(file) for file in sorted(folder.iterdir()) if file.suffix in _MODEL_FILES}
    with explain_unreadable("Model", name):
        cached = try_to_load_from_cache(name, "config.json")
    return {"commit": Path(cached).parent.name} if isinstance(cached, str) else {}


def _digest(file: Path) -> str:
    stat = file.stat()
    return _digest_once(file, stat.st_size, stat.st_mtime_ns)


# Each seed asks for the same large files.
@lru_cache(maxsize=256)
def _digest_once(file: Path, size: int, changed: int) -> str:
    return digests([file], file.parent)[file.name]
