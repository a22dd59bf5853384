"""LoRA-GGPO (arXiv 2502.14538v1): LoRA trained under row-wise, gradient-guided Gaussian noise on the full weight.

Read in this order: ``scales`` (the equations), ``noise`` (what is drawn), ``linear`` (how a layer is perturbed),
``layers`` and ``statistics`` (PEFT's layers), ``ggpo`` (the object a training loop holds). Nothing here depends on the
rest of the package.
"""

from .config import GGPOConfig
from .ggpo import GGPO
from .linear import perturbed_linear

__all__ = ["GGPO", "GGPOConfig", "perturbed_linear"]
