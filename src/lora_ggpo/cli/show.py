"""`lora-ggpo show`."""

from __future__ import annotations

from lora_ggpo.cli.options import RunFolder
from lora_ggpo.cli.output import print_calibration, print_metrics


def command(run: RunFolder) -> None:
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
