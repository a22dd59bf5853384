"""DeepSpeed ZeRO: weights cut into pieces, and gradients that only its optimizer holds.

Stage 3 marks a parameter with ``ds_id`` and leaves it empty while it is not used; ``ds_tensor`` is this process's part.
Stages 1 and 2 mark what is trained with ``_hp_mapping``, and leave it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, distributed


def is_cut(parameter: Any) -> bool:
    """Whether ZeRO-3 has cut the parameter into one piece a process."""
    return hasattr(parameter, "ds_id")


def is_zero(parameter: Tensor) -> bool:
    """Whether a trained parameter belongs to a ZeRO optimizer of any stage."""
    return is_cut(parameter) or hasattr(parameter, "_hp_mapping")


@contextmanager
def gather(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Put together the parameters that ZeRO-3 has cut, on every process, until the block ends."""
    cut: list[Any] = [parameter for parameter in parameters if is_cut(parameter)]
    cut = [parameter for parameter in cut if parameter.ds_status.name != "AVAILABLE"]  # small ones stay whole
    if not cut:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(cut):
        yield


def local_rows(weight: Any) -> tuple[int, Tensor]:
    """The rows of a cut weight (m, n) that this process has a part of: the number of the first, and a copy (k, n).

    ZeRO cuts the flattened weight, so this process may have the first and the last of these rows in part; what it lacks
    is 0.

    Raises:
        ValueError: the piece is on disk (ZeRO-Infinity).
    """
    (m, n), piece = weight.ds_shape, weight.ds_tensor
    if piece.status.name != "AVAILABLE":
        raise ValueError("GGPO cannot read base weights that ZeRO-3 has offloaded to disk; offload them to the CPU")
    start = min(distributed.get_rank(weight.ds_process_group) * piece.ds_numel, m * n)
    stop = min(start + piece.ds_numel, m * n)  # the last pieces are padded
    first, last = start // n, -(-stop // n)
    rows = torch.zeros((last - first) * n, dtype=piece.dtype, device=weight.device)
    rows[start - first * n : stop - first * n] = piece[: stop - start]
    return first, rows.view(-1, n)


def sum_rows(weight: Any, first: int, part: Tensor) -> Tensor:
    """The sum (m, ...) over processes of what each has, (k, ...), of rows [first, first + k) of a cut weight."""
    total = part.new_zeros(weight.ds_shape[0], *part.shape[1:])
    total[first : first + len(part)] = part
    distributed.all_reduce(total, group=weight.ds_process_group)
    return total


def full_gradient(parameter: Tensor) -> Tensor:
    """The gradient of the global batch, as ZeRO's optimizer has it when its step begins; 0 where there is none."""
    from deepspeed.utils import safe_get_full_grad

    gradient = safe_get_full_grad(parameter)
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return torch.zeros(shape, device=parameter.device) if gradient is None else gradient


class StepHook:
    """Calls back as each step of a ZeRO optimizer begins, before it clips, until removed.

    That optimizer has no hooks of its own, and its step is taken by its engine.
    """

    def __init__(self, optimizer: Any, callback: Callable[[], None]) -> None:
        self._optimizer = optimizer

        def step(*args: Any, **kwargs: Any) -> Any:
            callback()
            return type(optimizer).step(optimizer, *args, **kwargs)

        optimizer.step = step

    def remove(self) -> None:
        self._optimizer.__dict__.pop("step", None)


def zero_optimizer(trained: Iterable[Tensor], optimizer: Any) -> Any:
    """The optimizer behind accelerate's wrapper, or None where no parameter is ZeRO's.

    Raises:
        ValueError: parameters are ZeRO's, and no optimizer was given.
    """
    if not any(is_zero(parameter) for parameter in trained):
        return None
    if optimizer is None:
        raise ValueError(
            "this model is trained by DeepSpeed ZeRO, whose optimizer alone has the gradients: give GGPO the optimizer "
            "that deepspeed.initialize() or accelerator.prepare() returned, GGPO(model, config, optimizer=optimizer)"
        )
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
