"""Base models whose linear layers are kept in 4 or 8 bits (QLoRA, arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import peft
import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

Kind = Literal["nf4", "int8"]


class Quantisation(NamedTuple):
    """How a base model is kept.

    Attributes:
        kind: "nf4" (4 bits, with the scales of its blocks quantised as well) or "int8" (a scale for each row).
        compute: Type of nf4's products; int8 has its own.
        device: Where the weights are quantised, and stay.
        gradient_checkpointing: Whether training forgets activations and computes them again.
        cut: Whether FSDP cuts the weights, which it can where nf4 is kept in numbers of the type of its products.
    """

    kind: Kind
    compute: torch.dtype
    device: torch.device
    gradient_checkpointing: bool = False
    cut: bool = False


def loading_arguments(quantisation: Quantisation, head: list[str]) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise as the weights are read.

    Args:
        head: Modules that are trained in full and so stay as they are; none leaves the choice, which is the output
            embeddings, to transformers.
    """
    bits: dict[str, Any] = {"load_in_8bit": True}
    if quantisation.kind == "nf4":
        bits = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": quantisation.compute,
            **({"bnb_4bit_quant_storage": quantisation.compute} if quantisation.cut else {}),
        }
    config = BitsAndBytesConfig(**bits, llm_int8_skip_modules=head or None)
    return {"quantization_config": config, "device_map": {"": quantisation.device}}


def prepare_quantised(model: PreTrainedModel, quantisation: Quantisation) -> PreTrainedModel:
    """Freeze `model`, with all that is not quantised in float32, so that an adapter can be put on it.

    Evaluation needs it as training does: it decides what the model computes.
    """
    for layer in model.modules():
        # On CPUs with AVX512-BF16 evaluation would pack the weights anew, in a form that has no gradient.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=quantisation.gradient_checkpointing)


def stored_bytes(parameter: torch.nn.Parameter) -> int:
    """Bytes of a parameter as it is kept, with the scales of a quantised one."""
    kind, scales = type(parameter).__name__, 0
    if kind == "Params4bit":
        state: Any = parameter.quant_state  # type: ignore[attr-defined]
        scales = state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    elif kind == "Int8Params":
        scales = 4 * len(parameter)
    return parameter.nbytes + scales
