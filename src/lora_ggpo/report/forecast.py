"""A forecast of a run as tables."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from rich.table import Table

from lora_ggpo.report.tables import rows_table
from lora_ggpo.workspace.progress import duration

if TYPE_CHECKING:
    from lora_ggpo.training.forecast import Forecast


def forecast_tables(found: Forecast) -> list[Table]:
    """Parameters, memory, time and disk."""
    tables = [rows_table(["parameters", "number"], _parameters(found))]
    if found.memory:
        tables.append(_memory("memory", found.memory, "peak, measured on the longest rows"))
    if found.of_each and found.processes > 1:
        tables.append(
            _memory(f"memory of each of {found.processes} processes", found.of_each, "peak, reckoned from that")
        )
    return [*tables, rows_table(["time", ""], _time(found)), rows_table(["disk", "size"], _disk(found))]


def batch_sentence(found: Forecast) -> str:
    """Which batch is expected to fit."""
    if found.obtainable is None:
        return "This system does not tell how much memory there is, so it is not known which batch fits."
    there = f"Of {size(found.obtainable)} that are free for the run"
    if found.largest_batch is None:
        return f"{there}, batches this small take too little to say how many rows would fit."
    if found.largest_batch == 0:
        return f"{there}, 90 % are less than one row a batch is expected to need."
    rows = min(found.largest_batch, found.rows)
    return (
        f"{there}, 90 % are expected to hold a training.per_device_train_batch_size of {rows:,}"
        f"{', all rows' if rows == found.rows else ''} (estimate; the recipe has {found.batch:,})."
    )


def _memory(title: str, parts: dict[str, int], peak: str) -> Table:
    rows = [[name, size(bytes_)] for name, bytes_ in parts.items()]
    return rows_table([title, "size"], [*rows, [peak, size(sum(parts.values()))]])


def size(bytes_: int) -> str:
    """Bytes in MiB or GiB."""
    if abs(bytes_) < 2**30:
        return f"{bytes_ / 2**20:,.1f} MiB"
    return f"{bytes_ / 2**30:,.2f} GiB"


def _parameters(found: Forecast) -> list[list[str]]:
    noise = [] if found.perturbed is None else [["layers with GGPO's noise", f"{found.perturbed:,}"]]
    return [
        ["all", f"{found.parameters:,}"],
        ["trained", f"{found.trained:,}"],
        ["share", f"{found.trained / found.parameters:.3%}"],
        *noise,
    ]


def _time(found: Forecast) -> list[list[str]]:
    step, low, high = statistics.median(found.step_seconds), min(found.step_seconds), max(found.step_seconds)
    whole = found.training_seconds + found.validation_seconds + found.scoring_seconds
    rows = [
        ["precision", found.precision],
        [f"a step: median and range of {len(found.step_seconds)}", f"{step:.3f} s ({low:.3f} to {high:.3f} s)"],
        ["tokens a second, without padding", f"{found.tokens_a_second:,.0f}"],
        [f"{found.steps:,} steps on {found.rows:,} rows", duration(found.training_seconds)],
        *([[f"validations ({found.validations:,})", duration(found.validation_seconds)]] if found.validations else []),
        ["scoring in the end", duration(found.scoring_seconds)],
        ["a run, without loading and saving", duration(whole)],
    ]
    if found.seeds > 1:
        rows.append([f"one run for each of {found.seeds} seeds", duration(found.seeds * whole)])
    return rows


def _disk(found: Forecast) -> list[list[str]]:
    whole = found.weights_size + found.checkpoints * found.checkpoint_size
    return [
        ["saved weights with tokenizer", size(found.weights_size)],
        ["a checkpoint", size(found.checkpoint_size)],
        [f"a run, with the checkpoints kept ({found.checkpoints})", size(whole)],
    ]
