"""LoRA against LoRA-GGPO: same data, batches and steps; a table, a figure and what they say."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.table import Table

from lora_ggpo.errors import UserError
from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.recipe.source import Source, parse_source
from lora_ggpo.report.plots import save_comparison_plot
from lora_ggpo.report.tables import format_interval, markdown_table, rows_table
from lora_ggpo.statistics.intervals import Interval, mean_interval, paired_difference, verdict
from lora_ggpo.training.folder import Run
from lora_ggpo.training.run import train
from lora_ggpo.workspace.files import disk_errors, read_json, write_json, write_text
from lora_ggpo.workspace.progress import Reporter

LORA, GGPO = "LoRA", "LoRA-GGPO"


@dataclass(frozen=True)
class Quantity:
    """A row of the table: where its value lies in metrics.json, and which way is better (None: neither)."""

    name: str
    path: tuple[str, ...]
    higher_is_better: bool | None


@dataclass(frozen=True)
class Demo:
    """What a demo found."""

    runs: dict[str, list[Run]]
    table: Table
    verdict: str


def run_demo(seeds: int, output: Path, overrides: Iterable[str] = (), reporter: Reporter | None = None) -> Demo:
    """Run the demo's recipe with and without GGPO and write results.json, results.md and demo.png.

    Args:
        seeds: Runs of each method, with seeds 0, 1, ...
        output: Folder of the runs (``lora/``, ``lora-ggpo/``) and results; finished runs in it are not run again.
        overrides: Settings to change for both methods, ``key=value``.

    Raises:
        UserError, Interrupted: as `train`; or an override of what the demo itself decides.
    """
    text = (files("lora_ggpo.training") / "demo.yaml").read_text(encoding="utf-8")
    overrides = tuple(overrides)
    _refuse(parse_source(text, "the demo's recipe", overrides))
    methods = {LORA: ["ggpo=null"], GGPO: []}
    runs: dict[str, list[Run]] = {method: [] for method in methods}
    # Seed by seed: a machine that grows slow or busy slows both methods, and what is there early is paired.
    for seed in range(seeds):
        for method, special in methods.items():
            placed = [f"seeds=[{seed}]", f"output={(output / method.lower()).as_posix()!r}"]
            recipe = parse_recipe(text, "the demo's recipe", [*overrides, *special, *placed])
            runs[method] += train(recipe, reporter)
    with disk_errors(output):
        return _report(runs, output)


def _refuse(source: Source) -> None:
    """Refuse an override that would have no effect, or leave nothing to compare."""
    for key, why in _DECIDED.items():
        if (key,) in source.overrides:
            raise UserError(f"{source.where((key,))}: {key} {why}.")
    if source.values.get("ggpo") is None:
        raise UserError(f"{source.where(('ggpo',))}: ggpo null leaves the demo nothing to compare; leave it out.")


_DECIDED = {
    "seeds": "of the demo are given as --seeds, their number",
    "output": "of the demo is given as --output",
    "score_test": "is always true in the demo, which compares scores of the test set; leave it out",
}


def _report(runs: dict[str, list[Run]], output: Path) -> Demo:
    rows, record = [], {}
    for quantity in _quantities(runs[LORA][0]):
        values = {method: [_value(run, quantity) for run in of_method] for method, of_method in runs.items()}
        if any(value is None for of_method in values.values() for value in of_method):
            continue
        row, record[quantity.name] = _compare(quantity, values)
        rows.append(row)
    header = ["", LORA, GGPO, "difference", "verdict"]
    summary = _in_words(record, len(runs[LORA]))
    facts = _facts(runs)
    write_json(output / "results.json", {"quantities": record, "verdict": summary, **facts})
    write_text(output / "results.md", _markdown(header, rows, summary, facts))
    save_comparison_plot(
        {method: [run.log for run in of_method] for method, of_method in runs.items()},
        {method: _accuracies(record, method) for method in runs},
        output / "demo.png",
    )
    caption = f"mean of {len(runs[LORA])} seeds ± 95 % t interval; difference is paired by seed"
    return Demo(runs, rows_table(header, rows, caption), summary)


def _quantities(run: Run) -> list[Quantity]:
    assert run.metrics is not None
    others = [
        name
        for name in run.metrics["evaluation"]
        if name not in ("validation", "test", "train", "train-clean", "train-noisy")
    ]
    return [
        Quantity("test accuracy", ("evaluation", "test", "accuracy", "value"), True),
        Quantity("test log-loss", ("evaluation", "test", "log_loss", "value"), False),
        *(Quantity(f"{name} accuracy", ("evaluation", name, "accuracy", "value"), True) for name in others),
        *(Quantity(f"{name} log-loss", ("evaluation", name, "log_loss", "value"), False) for name in others),
        Quantity("train accuracy, right labels", ("evaluation", "train-clean", "accuracy", "value"), True),
        Quantity("train accuracy, wrong labels", ("evaluation", "train-noisy", "accuracy", "value"), False),
        Quantity("seconds per step", ("training", "seconds_per_step"), False),
    ]


def _value(run: Run, quantity: Quantity) -> float | None:
    value: Any = run.metrics
    for key in quantity.path:
        value = value.get(key) if value is not None else None
    return value


def _compare(quantity: Quantity, values: Mapping[str, Sequence[Any]]) -> tuple[list[str], dict[str, Any]]:
    intervals = {method: mean_interval(of_method) for method, of_method in values.items()}
    difference = paired_difference(values[LORA], values[GGPO])
    words = verdict(difference, GGPO, higher_is_better=bool(quantity.higher_is_better))
    row = [
        quantity.name,
        *(format_interval(intervals[m], digits=3) for m in (LORA, GGPO)),
        format_interval(difference, sign=True, digits=3),
        words,
    ]
    record = {method: {"values": list(of_method), **_plain(intervals[method])} for method, of_method in values.items()}
    return row, {**record, "difference": _plain(difference), "verdict": words}


def _plain(interval: Interval) -> dict[str, float | None]:
    return {"mean": interval.mean, "half_interval": interval.half if interval.half == interval.half else None}


def _in_words(record: Mapping[str, Any], seeds: int) -> str:
    """One sentence that claims no more than the intervals do."""
    found = [f"{record[name]['verdict']} in {name}" for name in ("test accuracy", "test log-loss") if name in record]
    return f"On {seeds} seed{'s' if seeds > 1 else ''}: {'; '.join(found)}."


def _facts(runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    run = runs[GGPO][0]
    return {
        "seeds": [one.recipe["seeds"][0] for one in runs[GGPO]],
        "recipe": run.recipe,
        "versions": read_json(run.folder / "versions.json"),
        "cpus": os.cpu_count(),
    }


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], summary: str, facts: Mapping[str, Any]) -> str:
    versions = facts["versions"]
    return (
        f"# LoRA against LoRA-GGPO\n\n{summary}\n\n{markdown_table(header, rows)}\n"
        f"Mean of {len(facts['seeds'])} seeds ± half the 95 % t interval; the difference is LoRA-GGPO minus LoRA, "
        "paired by seed, and a verdict is given where its interval excludes zero. Seeds vary the head, the adapter, "
        "the order of the data and the noise, not the data. Wrong labels: accuracy there is memorisation, so lower is "
        "better.\n\n"
        f"![curves](demo.png)\n\nMade by `lora-ggpo demo` with lora-ggpo {versions['lora-ggpo']}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}, peft {versions['peft']}; "
        f"{versions['platform']}, {facts['cpus']} CPUs, {versions['threads']} threads.\n"
    )


def _accuracies(record: Mapping[str, Any], method: str) -> dict[str, list[float]]:
    return {
        name.replace(" accuracy", "").replace("accuracy", ""): row[method]["values"]
        for name, row in record.items()
        if "accuracy" in name
    }
