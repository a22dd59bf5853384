"""Pretrained models: loading, adapters, quantisation, chat templates, saving."""

from lora_ggpo.models.load import load_model

__all__ = ["load_model"]
