"""`lora-ggpo plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_ggpo.cli.options import Overrides, RecipeFile
from lora_ggpo.cli.output import print_table


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to time, after two that warm up.")] = 5,
    processes: Annotated[int, typer.Option(min=1, help="Processes of the run, of which one is tried here.")] = 1,
) -> None:
    """Say what RECIPE will take before it is run: parameters, memory, time, disk, and the batch that fits."""
    from lora_ggpo.recipe.source import read_source

    source = read_source(recipe, overrides or ())
    from lora_ggpo.recipe.recipe import check_recipe
    from lora_ggpo.report.forecast import batch_sentence, forecast_tables
    from lora_ggpo.training.forecast import forecast
    from lora_ggpo.workspace.progress import Reporter

    found = forecast(check_recipe(source), steps, Reporter(), processes)
    for table in forecast_tables(found):
        print_table(table)
    print(batch_sentence(found))
