"""Options and arguments that several commands share, and how paths are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_ggpo.workspace.paths import expanded


def place(text: str) -> str:
    """What a user names that may be a path, or not."""
    try:
        return expanded(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} {error}.") from error


def path(text: str | Path) -> Path:
    """A path that a user names; typer hands over its own defaults as well."""
    return Path(place(str(text)))


Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change, such as training.max_steps=50 or 'seeds=[0,1,2]'.")
]
RecipeFile = Annotated[Path, typer.Argument(parser=path, help="A YAML recipe; `lora-ggpo schema` describes it.")]
MethodsRecipe = Annotated[
    Path, typer.Argument(parser=path, help="A YAML recipe; methods change its adapter, ggpo and optimizer.")
]
RunFolder = Annotated[Path, typer.Argument(parser=path, help="A run folder: an output folder, or seed-N in it.")]
Base = Annotated[
    str | None,
    typer.Option("--model", parser=place, help="Of a run: where its base model lies now; it must be the same one."),
]
