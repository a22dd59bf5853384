"""Saving models and tokenizers so that transformers 4 (and vLLM on it) loads them as transformers 5 does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from lora_ggpo.models.chat_template import remove_day, write_day, written_day

_NEW_CLASS, _OLD_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
_OF_THE_LOADING = ("backend", "is_local", "local_files_only")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save `tokenizer`, under the class and with the settings of the base model's own files.

    transformers 5 calls many tokenizers by a class that transformers 4 does not know, and leaves out what its own
    classes do not look at, such as ``add_bos_token``.
    """
    day = written_day(tokenizer)
    remove_day(tokenizer)
    tokenizer.save_pretrained(folder)
    if day:
        write_day(tokenizer, day)
    own = get_tokenizer_config(tokenizer.name_or_path, local_files_only=True)

    def change(saved: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in own.items() if key not in {*saved, "chat_template", "auto_map"}}
        extra = saved.pop("extra_special_tokens", None)
        if extra and isinstance(extra, list):  # transformers 4 takes names with their tokens under this name
            kept["additional_special_tokens"] = extra
        elif extra:
            kept["extra_special_tokens"] = extra
        class_ = own.get("tokenizer_class") or saved.get("tokenizer_class")
        rest = {key: value for key, value in saved.items() if key not in _OF_THE_LOADING}
        return {**rest, **kept, "tokenizer_class": _OLD_CLASS if class_ == _NEW_CLASS else class_}

    _rewrite(folder / "tokenizer_config.json", change)


def save_model(model: PreTrainedModel | PeftModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Save `model`, with the rotary embedding under its names of transformers 4 as well; of a PEFT model the adapter.

    transformers 4 looks for ``rope_theta`` and ``rope_scaling``, and takes 10,000 and none where they are missing.

    Args:
        weights: Those of a model that is cut into pieces, put together; None are the model's own.
    """
    model.save_pretrained(str(folder), state_dict=weights)
    if isinstance(model, PeftModel):
        return
    try:
        own: dict[str, Any] = PretrainedConfig.get_config_dict(str(model.name_or_path), local_files_only=True)[0]
    except OSError:  # a GGUF file has none, or the folder is gone by now
        own = {}

    def change(saved: dict[str, Any]) -> dict[str, Any]:
        named = {key: own[key] for key in own if "rope" in key or "rotary" in key}
        return {**named, **_older_names(saved.get("rope_parameters")), **saved}

    _rewrite(folder / "config.json", change)


def save_ends(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Save what ends generation, as a saved model has it; an adapter by itself does not say."""
    generation = getattr(model.get_base_model() if isinstance(model, PeftModel) else model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def _older_names(rope: Any) -> dict[str, Any]:
    if not isinstance(rope, dict) or "rope_theta" not in rope:  # none, or one for each type of layer
        return {}
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    partial = {key: rope[key] for key in ("partial_rotary_factor",) if key in rope}
    default = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if default else scaling, **partial}


def _rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if file.is_file():
        content = change(json.loads(file.read_text(encoding="utf-8")))
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
