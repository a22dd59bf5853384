"""`lora-ggpo doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_ggpo.cli.options import Overrides, path
from lora_ggpo.errors import UserError

BYPASSED = 1
"""Exit code where the noise does not reach each layer."""


def command(
    what: Annotated[Path | None, typer.Argument(parser=path, metavar="RUN|RECIPE", help="A run, or a recipe.")] = None,
    overrides: Overrides = None,
) -> None:
    """Say what to paste into an issue: versions, device, and whether the noise reaches each layer of RUN or RECIPE."""
    if what is None:
        from lora_ggpo.workspace.environment import aligned, environment

        print("\n".join(aligned(environment().items())))
        return
    if what.suffix == ".py":
        raise UserError(
            f"{what} is a script; have it print(lora_ggpo.doctor(model, batch)) before it trains the model."
        )
    if what.is_dir() and overrides:
        raise UserError(f"{what} is a run, whose settings are what they are; leave out {overrides[0]}.")
    from lora_ggpo.recipe.source import read_source

    source = None if what.is_dir() else read_source(what, overrides or ())  # errors come before the heavy imports
    from lora_ggpo.recipe.recipe import check_recipe
    from lora_ggpo.training.checkup import examine_recipe, examine_run

    found = examine_run(what) if source is None else examine_recipe(check_recipe(source))
    print(found)
    if found.bypassed:
        raise typer.Exit(BYPASSED)
