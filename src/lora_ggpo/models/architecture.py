"""The kinds of models that tasks need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from lora_ggpo.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """A kind of model.

    Attributes:
        auto_class: transformers' class that loads it.
        peft_task: peft's name for it.
        new_head: Whether a new head is put on the pretrained body, and trained in full.
        check: Called with a model's name and config; raises a UserError if it is of another kind.
    """

    auto_class: Any
    peft_task: str
    new_head: bool
    check: Callable[[str, Any], None]


def label_head(labels: list[str]) -> dict[str, Any]:
    """The config of a head with one output for each of `labels`."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def _check_causal(name: str, config: Any) -> None:
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if encoder or getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"Model {name!r} ({config.model_type}) is not a causal language model, which the task needs; "
            "choose a decoder such as smollm2, or task 'classification'."
        )


def _check_encoder_decoder(name: str, config: Any) -> None:
    if type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise UserError(
            f"Model {name!r} ({config.model_type}) is not an encoder-decoder, which the task needs; choose one such as "
            "google-t5/t5-base, or task 'causal-classification' for a decoder."
        )
    if getattr(config, "decoder_start_token_id", None) is None:
        raise UserError(f"Model {name!r} has no decoder_start_token_id in its config.json; add it (0 for T5).")


HEADED = Architecture(AutoModelForSequenceClassification, "SEQ_CLS", True, lambda name, config: None)
CAUSAL = Architecture(AutoModelForCausalLM, "CAUSAL_LM", False, _check_causal)
ENCODER_DECODER = Architecture(AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM", False, _check_encoder_decoder)
