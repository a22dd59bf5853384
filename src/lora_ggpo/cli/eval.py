"""`lora-ggpo eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_ggpo.cli.options import Base, Place, RunFolder, place
from lora_ggpo.cli.output import print_table


def command(
    run: RunFolder,
    on: Annotated[Place, typer.Option(parser=place, help="Other data: bundled name, file, folder or hub id.")] = None,
    base: Base = None,
) -> None:
    """Score a finished run again, or on other data. What it generates is scored by `lora-ggpo suite`."""
    from lora_ggpo.training.folder import find_runs

    runs = find_runs(run)  # what is wrong with it is said before the heavy imports
    from lora_ggpo.report.tables import metrics_table
    from lora_ggpo.training.reuse import evaluate_run

    print_table(metrics_table([evaluate_run(one.folder, on, base=base) for one in runs]))
