"""`lora-ggpo sharpness`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_ggpo.cli.options import Base, Output, path
from lora_ggpo.cli.output import print_report
from lora_ggpo.errors import UserError


def command(
    runs: Annotated[
        list[Path], typer.Argument(parser=path, help="Finished runs, or folders of seeds; the first is the baseline.")
    ],
    on: Annotated[Literal["train", "validation", "test"], typer.Option(help="Set to measure the loss on.")] = "train",
    rows: Annotated[int, typer.Option(min=1, help="Rows of it, at most.")] = 64,
    space: Annotated[
        Literal["weights", "adapter", "both"], typer.Option(help="Space of W0 + sBA, of A and B, or both.")
    ] = "both",
    sigma: Annotated[str, typer.Option(help="Sizes of the noise of expected sharpness.")] = "0.03,0.1,0.2",
    rho: Annotated[str, typer.Option(help="Radii of worst-case sharpness.")] = "0.0003,0.001",
    draws: Annotated[int, typer.Option(min=2, help="Pairs of draws of the noise, and draws of the trace.")] = 10,
    eigenvalues: Annotated[int, typer.Option(min=0, help="Top Hessian eigenvalues; 0 leaves the Hessian out.")] = 3,
    products: Annotated[int, typer.Option(min=9, help="Hessian products for eigenvalues, and for the density.")] = 45,
    plane: Annotated[int, typer.Option(min=0, help="Points a side of a two-dimensional slice; 0 draws none.")] = 0,
    output: Output = Path("runs/sharpness"),
    base: Base = None,
) -> None:
    """Measure how sharp the minima of RUNS are: rise of the loss under noise, at worst, and the Hessian."""
    from lora_ggpo.report.sharpness import write_sharpness_report
    from lora_ggpo.sharpness.measure import Settings, measure_runs
    from lora_ggpo.workspace.progress import Reporter

    if plane == 1:
        raise UserError("--plane 1 is a single point; give 2 or more a side, or 0 for no slice.")
    settings = Settings(
        split=on,
        rows=rows,
        spaces=("weights", "adapter") if space == "both" else (space,),
        sigmas=_sizes(sigma, "--sigma"),
        draws=draws,
        rhos=_sizes(rho, "--rho"),
        eigenvalues=eigenvalues,
        products=products,
        plane=plane,
    )
    measure_runs(runs, settings, output, Reporter(), base)
    print_report(write_sharpness_report(output), output)


def _sizes(text: str, option: str) -> tuple[float, ...]:
    try:
        sizes = tuple(float(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or not all(0 < size < float("inf") for size in sizes):
        raise UserError(f"{option} {text!r} is not a list of numbers above 0, such as 0.03,0.1.")
    return sizes
