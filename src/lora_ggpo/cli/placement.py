"""Where the runs of `compare` and `study` take place: on this machine, or on a Ray cluster."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from lora_ggpo.methods.table import GROUPS

if TYPE_CHECKING:
    from lora_ggpo.comparison.grid import Grid
    from lora_ggpo.comparison.pool import LocalPool, RayPool

Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time on this machine.")]
Ray = Annotated[str | None, typer.Option(help="Address of a Ray cluster to run on instead.")]
RayCpus = Annotated[int, typer.Option(min=0, help="Cores of a run on the cluster.")]
RayGpus = Annotated[float, typer.Option(min=0, help="GPUs of a run on the cluster.")]

_OPTIONS = ("--jobs", "--ray", "--ray-cpus", "--ray-gpus")


@contextmanager
def start_pool(
    jobs: int, ray: str | None = None, ray_cpus: int = 1, ray_gpus: float = 0
) -> Iterator[Callable[[], LocalPool | RayPool]]:
    """What gives the place of the runs. On this machine a worker imports the libraries from now on."""
    from lora_ggpo.comparison.pool import LocalPool, RayPool, load_libraries

    if ray:
        yield lambda: RayPool(ray, ray_cpus, ray_gpus)
        return
    pool = LocalPool(jobs)
    pool.submit(load_libraries)
    try:
        yield lambda: pool
    finally:
        pool.abandon()


def carry_out(grid: Grid, make_pool: Callable[[], LocalPool | RayPool]) -> None:
    """Do the runs of `grid`."""
    from lora_ggpo.comparison.engine import run_comparison
    from lora_ggpo.workspace.progress import Reporter

    command = shlex.join(["lora-ggpo", *_without_placement(sys.argv[1:])])
    run_comparison(grid, make_pool, command, Reporter())


def method_names(text: str) -> list[str]:
    """The names in a list with commas; a group stands for its methods."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return [one for name in names for one in GROUPS.get(name, (name,))]


def _without_placement(arguments: list[str]) -> list[str]:
    """The command without what decides only where it runs."""
    kept: list[str] = []
    for argument in arguments:
        if kept and kept[-1] in _OPTIONS:
            kept.pop()
        elif argument.partition("=")[0] not in _OPTIONS or argument in _OPTIONS:
            kept.append(argument)
    return kept
