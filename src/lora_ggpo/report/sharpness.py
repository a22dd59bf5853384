"""The report of `lora-ggpo sharpness`: one table, and figures, of runs side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lora_ggpo.errors import UserError, count
from lora_ggpo.report.page import Report, Section
from lora_ggpo.report.plots import Line, Panels, draw_lines, draw_planes
from lora_ggpo.report.tables import NOTHING, TextTable, format_interval, rows_table
from lora_ggpo.statistics.intervals import Interval, mean_interval, p_value, verdict
from lora_ggpo.workspace.files import read_json

Key = tuple[str, str, str, float]
"""Space, measure, noise law and size."""

Measured = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""What was measured of each run, by label and seed."""

_NOTES = {
    True: "Mean over seeds ± half its 95 % t interval; differences are paired by seed.",
    False: "Value ± error of its estimate: standard error; residual norm (eigenvalue); spread of restarts (worst).",
}
_CAPTIONS = {
    "expected": "Expected rise of the loss under noise of growing size: mean over seeds with its 95 % t interval.",
    "slices": "Loss along one filter-normalised random direction: mean over seeds with its 95 % t interval.",
    "spectrum": "Density of the Hessian’s eigenvalues: mean over seeds with its 95 % t interval.",
    "lines": "Loss on the straight line between two models of the same seed.",
    "planes": "Loss in the plane of two filter-normalised random directions, of each label’s first seed.",
}


def write_sharpness_report(folder: Path) -> Report:
    """Write sharpness.md, sharpness.tex, report.html and figures/ of the runs that ``folder/measured.json`` lists.

    Raises:
        UserError: there is none, or a file is damaged.
    """
    if not (folder / "measured.json").is_file():
        raise UserError(f"{folder} holds no measurements; give its `lora-ggpo sharpness` command again.")
    listed = read_json(folder / "measured.json")
    measured: dict[str, dict[int, Mapping[str, Any]]] = {}
    for one in listed["runs"]:
        measured.setdefault(one["label"], {})[one["seed"]] = read_json(folder / "points" / one["file"])
    lines = [{**read_json(folder / "points" / one["file"]), **one} for one in listed["lines"]]
    notes = _NOTES[_several(measured)]
    table = _table(measured)
    asked = read_json(folder / "settings.json") if (folder / "settings.json").is_file() else {}
    report = Report(
        title="Sharpness",
        lead=f"{', '.join(measured)}; {count(len(listed['runs']), 'run')}",
        findings=_verdicts(measured),
        table=rows_table(table.header, table.rows, notes),
        sections=[Section("", [table])],
        figures=_figures(measured, lines),
        captions=_CAPTIONS,
        notes=notes,
        made=[(name, str(value)) for part in ("settings", "versions") for name, value in asked.get(part, {}).items()],
    )
    report.write(folder, markdown="sharpness.md", latex="sharpness.tex", template="sharpness.html.j2")
    return report


def _several(measured: Measured) -> bool:
    """Whether spreads are those over seeds; else they are the errors of the estimates."""
    return any(len(seeds) > 1 for seeds in measured.values())


def _rows(measured: Measured) -> pd.DataFrame:
    """A row for each value of each run; without noise or size these are "" and 0."""
    return pd.DataFrame(
        {**row, "noise": row["noise"] or "", "size": row["size"] or 0.0, "label": label, "seed": seed}
        for label, seeds in measured.items()
        for seed, run in seeds.items()
        for row in run["measures"]
    )


def _by_measure(measured: Measured) -> Iterator[tuple[Key, pd.DataFrame, pd.DataFrame]]:
    """Each measure with its values and their errors: (seeds, labels)."""
    for key, rows in _rows(measured).groupby(["space", "measure", "noise", "size"], sort=False):
        values, errors = (rows.pivot(index="seed", columns="label", values=of) for of in ("value", "se"))
        yield key, values.reindex(columns=list(measured)), errors


def _table(measured: Measured) -> TextTable:
    first, *others = measured
    counts = {label: len(seeds) for label, seeds in measured.items()}
    named = {label: label if len(set(counts.values())) == 1 else f"{label} (n = {n})" for label, n in counts.items()}
    rows = []
    for key, values, errors in _by_measure(measured):
        cells = []
        for label in measured:
            interval = _mean(values[label])
            if interval and not _several(measured):
                interval = replace(interval, half=float(errors[label].iloc[0]))
            cells.append(_cell(interval))
        cells += [_cell(_mean(values[other] - values[first]), sign=True) for other in others]
        rows.append((describe(key), *cells))
    header = ("measure", *named.values(), *(f"{other} - {first}" for other in others))
    return TextTable("Measures", header, tuple(rows))


def _mean(values: pd.Series) -> Interval | None:
    """Over the seeds that have a value; None where none has."""
    known = values.dropna()
    return mean_interval(known.tolist()) if len(known) else None


def describe(key: Key) -> str:
    """A measure in words."""
    space, measure, noise, size = key
    words = {
        "expected": f"expected rise, {noise} noise, sigma {size:g}",
        "worst": f"worst rise found, rho {size:g}",
        "eigenvalue": f"eigenvalue {size:.0f}",
        "trace": f"trace, per sigma² of {noise} noise" if noise else "trace",
    }
    return f"{space}: {words.get(measure, measure)}"


def _cell(interval: Interval | None, *, sign: bool = False) -> str:
    if interval is None:
        return NOTHING
    digits = max(0, min(7, 3 - math.floor(math.log10(abs(interval.mean) or 1.0))))
    return format_interval(interval, sign=sign, digits=digits)


def _verdicts(measured: Measured) -> dict[str, str]:
    """For each other label: where it is flatter, where sharper, and where nothing was found."""
    first, *others = measured
    findings = {}
    for other in others:
        said: dict[str, list[str]] = {}
        for key, values, _ in _by_measure(measured):
            differences = values[other] - values[first]
            mean = _mean(differences)
            if mean and key[1] != "loss":
                words = verdict(mean, p_value(differences.dropna().tolist()), "sharper", "flatter")
                said.setdefault(words, []).append(describe(key))
        counts = (f"{w}: {', '.join(of) if len(of) <= 4 else f'{len(of)} measures'}" for w, of in said.items())
        findings[f"{other} against {first}"] = "; ".join(counts) or "no seed in common"
    return findings


# --- figures -------------------------------------------------------------------------------------------------------


def _figures(measured: Measured, lines: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    spaces = list(_rows(measured)["space"].unique())
    slices = {
        f"{space}: loss along a filter-normalised direction": _stack(measured, "slices", space, "at", "loss")
        for space in spaces
    }
    spectra = {
        f"{space}: spectral density of the Hessian": _stack(measured, "spectra", space, "eigenvalue", "density")
        for space in spaces
    }
    expected = _expected_panels(measured)
    figures = {
        "expected": draw_lines(expected, "sigma, relative size of the noise", "rise of the loss", log_x=True),
        "slices": draw_lines(slices, "step, in lengths of each row", "loss"),
    }
    if any(spectra.values()):
        figures["spectrum"] = draw_lines(spectra, "eigenvalue", "density", log_y=True)
    if lines:
        between = {"loss between models": _between(lines)}
        figures["lines"] = draw_lines(between, "from the first model to the other", "loss")
    planes = {
        f"{label}, {space}": run["planes"][space]
        for label, seeds in measured.items()
        for run in list(seeds.values())[:1]
        for space in spaces
        if run["planes"].get(space)
    }
    if planes:
        figures["planes"] = draw_planes(planes)
    return figures


def _expected_panels(measured: Measured) -> Panels:
    panels: dict[str, dict[str, Line]] = {}
    rows = _rows(measured)
    expected = rows[rows["measure"] == "expected"].groupby(["space", "noise", "label"], sort=False)
    for (space, noise, label), of in expected:
        table = of.pivot(index="seed", columns="size", values="value")
        panels.setdefault(f"{space}: {noise} noise", {})[label] = Line(list(table.columns), table.to_numpy())
    return panels


def _stack(measured: Measured, what: str, space: str, places: str, values: str) -> dict[str, Line]:
    """Curves over the places of all of them: the places of spectra differ, and none may lose a peak."""
    found = {
        label: [run[what][space] for run in seeds.values() if run[what].get(space)] for label, seeds in measured.items()
    }
    at = sorted({place for of_label in found.values() for one in of_label for place in one[places]})
    return {
        label: Line(at, np.array([np.interp(at, one[places], one[values], 0, 0) for one in of_label]))
        for label, of_label in found.items()
        if of_label
    }


def _between(lines: Sequence[Mapping[str, Any]]) -> dict[str, Line]:
    pairs: dict[str, list[Mapping[str, Any]]] = {}
    for one in lines:
        pairs.setdefault(f"{one['from']} to {one['to']}", []).append(one)
    return {pair: Line(found[0]["at"], np.array([one["loss"] for one in found])) for pair, found in pairs.items()}
