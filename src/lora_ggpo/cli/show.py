"""`lora-ggpo show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_ggpo.cli.options import RunFolder, path
from lora_ggpo.cli.output import print_calibration, print_metrics


def command(
    run: RunFolder,
    peft_json: Annotated[
        Path | None, typer.Option(parser=path, help="Also write it into this folder as PEFT's method_comparison does.")
    ] = None,
) -> None:
    """Show a run: recipe in short, metrics, calibration, loss curve."""
    from lora_ggpo.report.tables import sparkline
    from lora_ggpo.training.folder import find_runs, summary

    runs = find_runs(run)
    print(summary(runs[0]))
    print_metrics(runs)
    print_calibration(runs)
    for one in runs:
        losses = [row["loss"] for row in one.log if row.get("loss") is not None]
        state = "" if one.metrics else " (unfinished; give its `lora-ggpo train` command again)"
        print(f"{one.folder}{state}")
        if losses:
            print(f"  loss {sparkline(losses)} {losses[0]:.3f} to {losses[-1]:.3f}")
        for plot in sorted(one.folder.glob("*.png")):
            print(f"  plot {plot}")
    if peft_json:
        from lora_ggpo.report.method_comparison import write_peft_results

        for file in write_peft_results(runs, peft_json):
            print(f"PEFT's form: {file}")
