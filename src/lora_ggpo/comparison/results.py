"""The results of a comparison or a study: five files, which are functions of its run folders alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ggpo.comparison.grid import Grid, PlannedRun
from lora_ggpo.comparison.pool import FAILURE
from lora_ggpo.errors import UserError
from lora_ggpo.statistics.calibration import calibration_curves
from lora_ggpo.statistics.measured import measure_share, plain
from lora_ggpo.training.calibrated import calibration_scores, mean_predictions, read_predictions
from lora_ggpo.workspace.files import read_json, read_json_lines, write_json_lines

Row = Mapping[str, Any]
"""A line of runs.jsonl, tuning.jsonl, curves.jsonl or ensembles.jsonl."""


@dataclass(frozen=True)
class Results:
    """The files of a results folder; `facts` says with what and how they were made.

    Attributes:
        peft: Results of PEFT's method_comparison, to stand beside these.
    """

    runs: Sequence[Row]
    tuning: Sequence[Row]
    curves: Sequence[Row]
    ensembles: Sequence[Row]
    peft: Sequence[Row]
    facts: Row

    def logs(self, setting: str, method: str) -> dict[int, Sequence[Row]]:
        """Logs by seed of the runs that did not fail: the log of one that did ends where it failed."""
        of, curves = (
            [row for row in rows if (row["setting"], row["method"]) == (setting, method)]
            for rows in (self.runs, self.curves)
        )
        finished = {run["seed"] for run in of if not run["failed"]}
        return {row["seed"]: row["rows"] for row in curves if row["seed"] in finished}


def read_results(folder: Path) -> Results:
    """Read runs.jsonl, tuning.jsonl, curves.jsonl, ensembles.jsonl and facts.json.

    Raises:
        UserError: one of them is missing or damaged, or there is no run.
    """
    facts = {"environments": [], **read_json(folder / "facts.json")}
    names = ("runs", "tuning", "curves", "ensembles", "peft")  # an earlier release has no ensembles
    runs, tuning, curves, ensembles, peft = (read_json_lines(folder / f"{name}.jsonl") for name in names)
    if not runs:
        raise UserError(f"{folder} holds no run to report.")
    return Results(runs, tuning, curves, ensembles, peft, facts)


def write_results(grid: Grid, tuning: Iterable[PlannedRun], runs: Iterable[PlannedRun]) -> None:
    """Write tuning.jsonl, runs.jsonl, curves.jsonl and ensembles.jsonl, in the order of the grid."""
    settings, methods = list(grid.settings), [method.name for method in grid.methods]

    def order(run: PlannedRun) -> tuple[int, ...]:
        return settings.index(run.setting), methods.index(run.method.name), run.seed, run.trial or 0

    tuning, runs = sorted(tuning, key=order), sorted(runs, key=order)
    write_json_lines(grid.output / "tuning.jsonl", [_tuning_row(run, grid.metric) for run in tuning])
    write_json_lines(grid.output / "runs.jsonl", map(_run_row, runs))
    write_json_lines(grid.output / "curves.jsonl", map(_curve_row, runs))
    write_json_lines(grid.output / "ensembles.jsonl", _ensemble_rows(runs))


def validation_score(run: PlannedRun, metric: str) -> float | None:
    """The validation metric of a finished run; None if it failed."""
    if _failure(run):
        return None
    value = read_json(run.folder / "metrics.json")["evaluation"]["validation"][metric]["value"]
    return None if value is None else float(value)


def _failure(run: PlannedRun) -> str | None:
    file = run.folder / FAILURE
    return read_json(file)["message"] if file.is_file() else None


def _identity(run: PlannedRun) -> dict[str, Any]:
    return {"setting": run.setting, "method": run.method.name, "title": run.method.title}


def _tuning_row(run: PlannedRun, metric: str) -> Row:
    found = {"values": dict(run.values), "score": validation_score(run, metric), "metric": metric}
    return {**_identity(run), "trial": run.trial, "seed": run.seed, **found, "failed": _failure(run)}


def _run_row(run: PlannedRun) -> Row:
    failed = _failure(run)
    metrics: Row = {} if failed else read_json(run.folder / "metrics.json")
    evaluation = metrics.get("evaluation", {})
    found = {"evaluation": evaluation, "training": metrics.get("training", {})}
    if predictions := read_predictions(run.folder, evaluation):
        scores = plain(calibration_scores(predictions))
        found["evaluation"] = {name: {**scores.get(name, {}), **of} for name, of in evaluation.items()}
        found["calibration"] = {name: calibration_curves(*of).to_dict() for name, of in predictions.items()}
    if drawn := sorted((run.folder / "evaluation").glob("sets-own-*-draws.json")):
        found["draws"] = [{key: read_json(file)[key] for key in ("draws", "evaluation")} for file in drawn]
    if (solved := run.folder / "evaluation" / "gsm8k" / "scores.json").is_file():
        found["gsm8k"] = read_json(solved)["evaluation"]["gsm8k"]["accuracy"]["value"]
    return {**_identity(run), "seed": run.seed, "chosen": dict(run.values), **found, "failed": failed}


def _ensemble_rows(runs: Sequence[PlannedRun]) -> Iterator[Row]:
    """What the seeds of each method predict together, where there are several and they give probabilities."""
    for _, group in itertools.groupby(runs, key=lambda run: (run.setting, run.method.name)):
        finished = [run for run in group if not _failure(run)]
        sets = read_json(finished[0].folder / "metrics.json")["evaluation"] if len(finished) > 1 else {}
        together = mean_predictions([read_predictions(run.folder, sets) for run in finished]) if sets else {}
        if together:
            scores = calibration_scores(together)
            for name, (probabilities, labels) in together.items():
                scores[name]["accuracy"] = measure_share(probabilities.argmax(axis=1) == labels)
            yield {**_identity(finished[0]), "seeds": [run.seed for run in finished], "evaluation": plain(scores)}


def _curve_row(run: PlannedRun) -> Row:
    keys = ("step", "epoch", "loss", "seconds", "best")
    rows = [
        {key: value for key, value in row.items() if key in keys or key.startswith("validation/")}
        for row in read_json_lines(run.folder / "log.jsonl")
    ]
    return {**_identity(run), "seed": run.seed, "rows": rows}
