"""`lora-ggpo eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_ggpo.cli.options import Base, Place, RunFolder, place
from lora_ggpo.cli.output import print_table
from lora_ggpo.errors import UserError
from lora_ggpo.workspace.libraries import importing


def command(
    run: RunFolder,
    on: Annotated[Place, typer.Option(parser=place, help="Other data: bundled name, file, folder or hub id.")] = None,
    draws: Annotated[int, typer.Option(min=0, help="Average over so many draws of noise on the weights.")] = 0,
    noise: Annotated[float | None, typer.Option(min=0, help="Its sigma; by default that of the training.")] = None,
    tolerate: Annotated[
        float | None,
        typer.Option(
            min=0, help="Or find the largest that costs the validation loss and the score at most this share."
        ),
    ] = None,
    base: Base = None,
) -> None:
    """Score a finished run again, or on other data. What it generates is scored by `lora-ggpo suite`."""
    if not draws and (noise is not None or tolerate is not None):
        raise UserError("--noise and --tolerate are for --draws; give it as well, such as --draws 10.")
    if noise is not None and tolerate is not None:
        raise UserError("--noise gives the size that --tolerate would find; leave out one of them.")
    from lora_ggpo.training.folder import find_runs

    runs = find_runs(run)  # what is wrong with it is said before the heavy imports
    with importing():
        from lora_ggpo.report.tables import metrics_table
        from lora_ggpo.training.draws import Draws
        from lora_ggpo.training.reuse import evaluate_run

    how = Draws(draws, noise, tolerate) if draws else None
    print_table(metrics_table([evaluate_run(one.folder, on, base=base, draws=how) for one in runs]))
