"""`lora-ggpo demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_ggpo.cli.options import Output, Overrides
from lora_ggpo.cli.output import print_report
from lora_ggpo.cli.placement import Jobs, carry_out, start_pool


def command(
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    output: Output = Path("runs/demo"),
    overrides: Overrides = None,
    jobs: Jobs = 2,
) -> None:
    """Compare LoRA with LoRA-GGPO on movie reviews with wrong labels in them; resumes what is unfinished."""
    with start_pool(jobs) as pool:
        from lora_ggpo.comparison.grid import plan_demo

        grid = plan_demo(seeds, output, overrides or ())
        carry_out(grid, pool)
    from lora_ggpo.report.comparison import write_report

    print_report(write_report(output), output)
    print(f"Adapters: {', '.join(str(run.folder / 'adapter') for run in grid.final()[: len(grid.methods)])}")
