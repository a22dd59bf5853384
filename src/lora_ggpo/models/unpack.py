"""GGUF files: the libraries take half a minute to read a small one, so what they made of it is kept."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_ggpo.workspace.cache import cache_folder
from lora_ggpo.workspace.files import disk_errors, file_name, read_json, settle, write_json

_MADE_FROM = "made-from.json"


def unpacked(file: Path) -> Path:
    """The folder in the user's cache with the model and the tokenizer of a GGUF file, in float32; made at first use.

    It is made again when the file has changed, or the libraries that read it have.

    Raises:
        UserError: the disk is full, or the cache cannot be written.
    """
    stat = file.stat()
    versions = [version(name) for name in ("gguf", "transformers")]
    facts: list[Any] = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, *versions]
    folder = cache_folder() / "unpacked" / file_name(str(file.resolve()))
    if not _is_of(folder, facts):
        with disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(mkdtemp(dir=folder.parent, prefix="."))
            try:
                _unpack(file, temporary)
                write_json(temporary / _MADE_FROM, facts)
                settle(temporary)
                if not _is_of(folder, facts):  # another process may have been quicker, and read it by now
                    shutil.rmtree(folder, ignore_errors=True)
                    os.rename(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _is_of(folder: Path, facts: list[Any]) -> bool:
    made_from = folder / _MADE_FROM
    return made_from.is_file() and read_json(made_from) == facts


def _unpack(file: Path, folder: Path) -> None:
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "trust_remote_code": False,
    }
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    if hasattr(transformers, "GgufConfig"):  # newer releases may keep the blocks packed, which cannot be trained
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
    if getattr(model, "hf_quantizer", None):
        # The weights are plain tensors by now, but transformers would still refuse to train or save the model.
        model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(folder)
