"""The report of `lora-ggpo sharpness`: one table, and figures, of runs side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lora_ggpo.errors import UserError
from lora_ggpo.report.page import Report, Section, count
from lora_ggpo.report.plots import Line, Panels, draw_lines, draw_planes
from lora_ggpo.report.tables import NOTHING, TextTable, format_interval, rows_table
from lora_ggpo.statistics.intervals import Interval, mean_interval, p_value, verdict
from lora_ggpo.workspace.files import read_json

Key = tuple[str, str, str | None, float | None]
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


def _measures(run: Mapping[str, Any]) -> dict[Key, Interval]:
    """Each value with the error of its estimate."""
    return {
        (row["space"], row["measure"], row["noise"], row["size"]): Interval(
            row["value"], math.nan if row["se"] is None else row["se"], 1
        )
        for row in run["measures"]
    }


def _by_key(measured: Measured) -> dict[Key, dict[str, dict[int, Interval]]]:
    """The values of each measure by label and seed."""
    found: dict[Key, dict[str, dict[int, Interval]]] = {}
    for label, seeds in measured.items():
        for seed, run in seeds.items():
            for key, interval in _measures(run).items():
                found.setdefault(key, {one: {} for one in measured})[label][seed] = interval
    return found


def _differences(first: Mapping[int, Interval], second: Mapping[int, Interval]) -> list[float]:
    """The second less the first, at the seeds of both."""
    return [second[seed].mean - first[seed].mean for seed in sorted(first.keys() & second.keys())]


def _table(measured: Measured) -> TextTable:
    first, *others = measured
    counts = {label: len(seeds) for label, seeds in measured.items()}
    named = {label: label if len(set(counts.values())) == 1 else f"{label} (n = {n})" for label, n in counts.items()}
    several = _several(measured)
    rows = []
    for key, values in _by_key(measured).items():
        cells = []
        for found in (list(of_label.values()) for of_label in values.values()):
            summary = mean_interval([one.mean for one in found]) if found and several else next(iter(found), None)
            cells.append(_cell(summary))
        for differences in (_differences(values[first], values[other]) for other in others):
            cells.append(_cell(mean_interval(differences) if differences else None, sign=True))
        rows.append((describe(key), *cells))
    header = ("measure", *named.values(), *(f"{other} - {first}" for other in others))
    return TextTable("Measures", header, tuple(rows))


def describe(key: Key) -> str:
    """A measure in words."""
    space, measure, noise, size = key
    words = {
        "expected": f"expected rise, {noise} noise, sigma {size or 0:g}",
        "worst": f"worst rise found, rho {size or 0:g}",
        "eigenvalue": f"eigenvalue {size or 0:.0f}",
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
        for key, values in _by_key(measured).items():
            differences = _differences(values[first], values[other])
            if differences and key[1] != "loss":
                words = verdict(mean_interval(differences), p_value(differences), "sharper", "flatter")
                said.setdefault(words, []).append(describe(key))
        counts = (f"{w}: {', '.join(of) if len(of) <= 4 else f'{len(of)} measures'}" for w, of in said.items())
        findings[f"{other} against {first}"] = "; ".join(counts) or "no seed in common"
    return findings


# --- figures -------------------------------------------------------------------------------------------------------


def _figures(measured: Measured, lines: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    runs = [run for seeds in measured.values() for run in seeds.values()]
    spaces = list(dict.fromkeys(row["space"] for run in runs for row in run["measures"]))
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
    sizes: dict[tuple[str, str | None], list[float]] = {}
    by_key = _by_key(measured)
    for space, measure, noise, size in by_key:
        if measure == "expected":
            sizes.setdefault((space, noise), []).append(size or 0.0)
    for (space, noise), at in sizes.items():
        values = [by_key[space, "expected", noise, size] for size in at]
        panels[f"{space}: {noise} noise"] = {
            label: Line(at, np.array([[of_size[label][seed].mean for of_size in values] for seed in values[0][label]]))
            for label in measured
            if values[0][label]  # a run without an adapter has no such space
        }
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
