"""GGPO in Axolotl: a plugin, with its settings under ``ggpo:``.

Axolotl's fused LoRA kernels read the weights of a layer and never call it, so no noise could reach it: the plugin
switches them off. Axolotl switches them on by itself where its file does not mention them.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger
from pydantic import BaseModel, Field, field_validator

from ..perturbation import GGPOConfig
from .callback import GGPOCallback

LOG = get_logger(__name__)

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class GGPOArgs(BaseModel):
    """What the plugin adds to Axolotl's file."""

    ggpo: dict[str, Any] | None = Field(default=None, description="The fields of lora_ggpo.GGPOConfig.")

    @field_validator("ggpo")
    @classmethod
    def _known(cls, settings: dict[str, Any] | None) -> dict[str, Any] | None:
        GGPOConfig.from_dict(settings or {})
        return settings


class GGPOPlugin(BasePlugin):  # type: ignore[misc]
    """Adds :class:`~lora_ggpo.GGPOCallback` to whatever Trainer Axolotl builds::

        plugins: [lora_ggpo.integrations.axolotl.GGPOPlugin]
        ggpo: {sigma: 0.03, rule: relative, beta: 0.5}

    Its methods are those of Axolotl's ``BasePlugin``.
    """

    def get_input_args(self) -> str:
        return f"{__name__}.{GGPOArgs.__name__}"

    def register(self, cfg: MutableMapping[str, Any]) -> None:
        asked = [kernel for kernel in KERNELS if cfg.get(kernel)]
        cfg.update(dict.fromkeys(KERNELS, False))  # None would have Axolotl switch them on
        LOG.warning(
            "GGPO trains without Axolotl's fused LoRA kernels%s: they read the weights of a layer and never call it, "
            "so the noise would not reach it",
            f" ({', '.join(asked)} switched off)" if asked else "",
        )

    def add_callbacks_post_trainer(self, cfg: MutableMapping[str, Any], trainer: Any) -> list[GGPOCallback]:
        return [GGPOCallback(cfg.get("ggpo") or {})]
