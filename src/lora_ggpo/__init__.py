"""LoRA-GGPO (arXiv 2502.14538v1): LoRA adapters trained under random perturbations of the full weight."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .integrations.callback import GGPOCallback
    from .integrations.doctor import doctor
    from .perturbation import GGPO, GGPOConfig, Parts, register_layer

__all__ = ["GGPO", "GGPOCallback", "GGPOConfig", "Parts", "doctor", "register_layer"]
__version__ = version("lora-ggpo")

_HOMES = {
    **dict.fromkeys(("GGPO", "GGPOConfig", "Parts", "register_layer"), "perturbation"),
    "GGPOCallback": "integrations.callback",
    "doctor": "integrations.doctor",
}


def __getattr__(name: str) -> Any:
    # Torch and transformers take seconds to import: the command line's help must not wait for them.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
