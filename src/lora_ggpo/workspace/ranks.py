"""The processes of a run that torchrun or a cluster started: all compute, the first one writes.

torch is imported where it is used: the command line asks who is first before it loads anything heavy.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def is_launched() -> bool:
    """Whether a launcher (torchrun, accelerate launch, srun, Ray) started this process as one of a run's."""
    return "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process is the one that writes; a single process always is."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Wait until every process has arrived here."""
    if _many():
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def any_of(flag: bool) -> bool:
    """Whether `flag` is set in any process; every process must call this."""
    if not _many():
        return flag
    import torch
    from accelerate import PartialState
    from torch import distributed

    flags = torch.tensor(int(flag), device=PartialState().device)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags)


def share_of(items: Sequence[V]) -> list[V]:
    """This process's part of `items`, every n-th of n processes, and the last once more where others have one more.

    So all have as many: what they compute together, as a sharded model, takes every one of them.
    """
    if not _many():
        return list(items)
    from torch import distributed

    world, rank = distributed.get_world_size(), distributed.get_rank()
    return [items[min(index + rank, len(items) - 1)] for index in range(0, len(items), world)]


def merged(parts: Mapping[K, V]) -> dict[K, V]:
    """The entries that any process has in its `parts`; every process must call this."""
    if not _many():
        return dict(parts)
    from torch import distributed

    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, dict(parts))
    return {key: value for one in found for key, value in one.items()}


def _many() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
