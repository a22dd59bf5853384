r"""LoRA-GGPO (arXiv 2502.14538v1): LoRA trained under row-wise, gradient-guided Gaussian noise on the full weight.

A layer W' = W0 + s B A has m x n entries; W0 is frozen, B (m x r) and A (r x n) are trained. The method minimises

    E_eps[ L(W' + eps) ],   eps_ij ~ N(0, tau_i^2),   tau_i^2 = (sigma^2 / n) (||W'_i||^2 + beta ||G_i||^2),

with one draw of eps for each forward pass and G = dL/dW' of the optimizer step before. Nothing here imports the rest of
the package. Read in this order:

1. ``scales``: row norms from thin factors, and the rules that turn them into tau. ``noise``: the laws of eps.
   ``config``: the settings.
2. ``linear``: x (W0 + s B A + eps)^T as one autograd function. ``kernel``: dense noise on a GPU.
3. ``kinds``: what a type of layer does with its weight. ``weights``: W0, also quantised or cut by FSDP and ZeRO.
   ``layers``: a layer of PEFT, perturbed. ``own``: one of any other class. ``inside``: weights that are read and never
   called. ``rows``: the norms and sizes of all layers at once.
4. ``ggpo``: the object that a training loop holds. It uses ``find`` (which layers), ``passes`` (when they are noisy),
   ``rise`` (sigma by what noise does to the loss), ``watch`` (what a run should be told), ``compiled`` (torch.compile)
   and ``zero`` (DeepSpeed). ``reach``: what became of each layer. ``fuse``: the same forward without noise.
   ``predict``: noise in evaluation.

To add a rule, an estimator of ||G_i||^2, a schedule, a noise or a type of layer, add one entry to ``RULES``,
``ESTIMATORS`` or ``RAMPS`` in ``scales``, to ``NOISES`` in ``noise`` or to ``KINDS`` in ``kinds``.
"""

from .config import GGPOConfig
from .ggpo import GGPO
from .linear import perturbed_linear
from .own import Parts, register_layer

__all__ = ["GGPO", "GGPOConfig", "Parts", "perturbed_linear", "register_layer"]
