"""`lora-ggpo push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_ggpo.cli.options import path


def command(
    run: Annotated[Path, typer.Argument(parser=path, help="A run folder with one seed, or seed-N in it.")],
    repository: Annotated[str, typer.Argument(help="NAME or OWNER/NAME on the hub; it is made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make it one that only its owner sees.")] = False,
) -> None:
    """Upload a run's adapter (or model) with its model card to the Hugging Face hub."""
    from lora_ggpo.training.push import push_run

    print(f"Uploaded: {push_run(run, repository, private=private)}")
