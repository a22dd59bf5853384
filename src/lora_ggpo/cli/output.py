"""What commands print on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from pathlib import Path

    from lora_ggpo.report.page import Report
    from lora_ggpo.training.folder import Run


def print_table(table: Table) -> None:
    """Print a table as wide as it needs: in a pipe rich assumes 80 columns and would fold it."""
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=160)).print(table)


def print_report(report: Report, folder: Path) -> None:
    """Print what was found, and where the rest of it is."""
    print_table(report.table)
    print("\n".join(report.verdicts))
    print(f"Report: {folder / 'report.html'}")


def print_calibration(runs: Sequence[Run]) -> None:
    """Print how far the probabilities of the runs that are finished can be trusted, if they gave any."""
    scored = [(run.folder, run.metrics["evaluation"]) for run in runs if run.metrics]
    if not any("log_loss" in metrics for _, sets in scored for metrics in sets.values()):
        return  # before numpy is imported: nothing has probabilities
    from lora_ggpo.report.tables import metrics_table
    from lora_ggpo.statistics.measured import plain
    from lora_ggpo.training.calibrated import calibration_scores, read_predictions

    found = [plain(calibration_scores(read_predictions(folder, sets))) for folder, sets in scored]
    if any(found):
        print("calibration")
        print_table(metrics_table(found))


def print_metrics(runs: Sequence[Run]) -> None:
    """Print the metrics of the runs that are finished."""
    from lora_ggpo.report.tables import metrics_table

    evaluations = [run.metrics["evaluation"] for run in runs if run.metrics]
    if evaluations:
        print_table(metrics_table(evaluations))
