"""`lora-ggpo demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_ggpo.cli.options import Overrides, path
from lora_ggpo.cli.output import print_table


def command(
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    output: Annotated[Path, typer.Option(parser=path, help="Folder of the runs, the table and the figure.")] = Path(
        "runs/demo"
    ),
    overrides: Overrides = None,
) -> None:
    """Compare LoRA with LoRA-GGPO on movie reviews with wrong labels in them."""
    from lora_ggpo.training.demo import run_demo

    result = run_demo(seeds, output, overrides or ())
    print_table(result.table)
    print(result.verdict)
    print(f"Files: {output / 'results.md'}, {output / 'results.json'}, {output / 'demo.png'}")
    print(f"Adapters: {', '.join(str(run.folder / 'adapter') for runs in result.runs.values() for run in runs[:1])}")
