"""`lora-ggpo merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_ggpo.cli.options import Base, path


def command(
    run: Annotated[Path, typer.Argument(parser=path, help="A run folder with one seed, or seed-N in it.")],
    out: Annotated[Path, typer.Argument(parser=path, help="The folder to write.")],
    base: Base = None,
) -> None:
    """Fold a run's adapter into the model's weights and save the plain model."""
    from lora_ggpo.training.merge import merge_run

    merged = merge_run(run, out, base)
    print(f"Merged model: {out}")
    reach = f"(logits reach {merged.largest:.2g})"
    print(f"Its logits differ from the adapter's by at most {merged.difference:.1e} {reach}.")
    if merged.quantised:
        kind, difference = merged.quantised
        print(f"They differ from the run's, whose model was in {kind}, by at most {difference:.1e}.")
