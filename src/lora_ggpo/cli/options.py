"""Options and arguments that several commands share, and how paths are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_ggpo.workspace.paths import expand_home

Place = str | None
"""What may be a path; its option needs `parser=place`."""


def place(text: str) -> str:
    """What a user names that may be a path, or not."""
    try:
        return expand_home(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} {error}.") from error


def path(text: str | Path) -> Path:
    """A path that a user names; typer hands over its own defaults as well."""
    return Path(place(str(text)))


def with_line_breaks(text: str) -> str:
    """`text` with each backslash and n as a line break."""
    return text.replace("\\n", "\n")


Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change, such as training.max_steps=50 or 'seeds=[0,1,2]'.")
]
RecipeFile = Annotated[Path, typer.Argument(parser=path, help="A YAML recipe; `lora-ggpo schema` describes it.")]
MethodsRecipe = Annotated[
    Path, typer.Argument(parser=path, help="A YAML recipe; methods change its adapter, ggpo and optimizer.")
]
RunFolder = Annotated[Path, typer.Argument(parser=path, help="A run folder: an output folder, or seed-N in it.")]
Base = Annotated[Place, typer.Option("--model", parser=place, help="Where the run's base model lies now.")]
Output = Annotated[Path, typer.Option(parser=path, help="Folder of the results.")]
