"""The processes of a run that torchrun or a cluster started: all compute, the first one writes.

torch is imported where it is used: the command line asks who is first before it loads anything heavy.
"""

from __future__ import annotations

import os


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


def _many() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
