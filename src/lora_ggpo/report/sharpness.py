"""The report of `lora-ggpo sharpness`: one table, and figures, of runs side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from lora_ggpo.errors import UserError
from lora_ggpo.report.plots import Curves, draw_curves, draw_planes, render
from lora_ggpo.report.tables import escape_markdown, format_interval, latex_table, markdown_table, rows_table
from lora_ggpo.statistics.intervals import Interval, mean_interval, paired_difference, verdict
from lora_ggpo.workspace.files import read_json, write_bytes, write_text

Key = tuple[str, str, str | None, float | None]
"""Space, measure, noise law and size."""

_CAPTION = {
    True: "mean over seeds ± half its 95 % t interval; differences are paired by seed",
    False: "value ± error of its estimate: standard error; residual norm (eigenvalue); spread of restarts (worst rise)",
}


@dataclass(frozen=True)
class SharpnessReport:
    """What was found, for the terminal."""

    table: Table
    verdicts: list[str]


def write_sharpness_report(folder: Path) -> SharpnessReport:
    """Write the tables (sharpness.md, .tex) and figures/ of the runs that ``folder/measured.json`` lists.

    Raises:
        UserError: there is none, or a file is damaged.
    """
    if not (folder / "measured.json").is_file():
        raise UserError(f"{folder} holds no measurements; give its `lora-ggpo sharpness` command again.")
    measured = read_json(folder / "measured.json")
    by_label: dict[str, dict[int, Mapping[str, Any]]] = {}
    for one in measured["runs"]:
        by_label.setdefault(one["label"], {})[one["seed"]] = read_json(folder / "points" / one["file"])
    lines = [{**read_json(folder / "points" / one["file"]), **one} for one in measured["lines"]]
    header, rows = _cells(by_label)
    caption = _CAPTION[_several(by_label)]
    escaped = [[escape_markdown(cell) for cell in row] for row in rows]
    verdicts = _verdicts(by_label)
    text = "".join(f"- {escape_markdown(line)}\n" for line in verdicts)
    write_text(folder / "sharpness.md", f"# Sharpness\n\n{text}\n{markdown_table(header, escaped)}\n{caption}\n")
    write_text(folder / "sharpness.tex", "% \\usepackage{booktabs}\n" + latex_table(header, rows, caption, (0,)))
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in _figures(by_label, lines).items():
        for kind in ("png", "svg"):
            write_bytes(folder / "figures" / f"{name}.{kind}", render(figure, kind))
    return SharpnessReport(rows_table([*map(escape, header)], rows, caption), verdicts)


def _several(by_label: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> bool:
    """Whether spreads are those over seeds; else they are the errors of the estimates."""
    return any(len(seeds) > 1 for seeds in by_label.values())


def _measures(run: Mapping[str, Any]) -> dict[Key, Interval]:
    """Each value with the error of its estimate."""
    return {
        (row["space"], row["measure"], row["noise"], row["size"]): Interval(
            row["value"], math.nan if row["se"] is None else row["se"], 1
        )
        for row in run["measures"]
    }


def _values(seeds: Mapping[int, Mapping[str, Any]], key: Key) -> dict[int, Interval]:
    found = {seed: _measures(run).get(key) for seed, run in seeds.items()}
    return {seed: interval for seed, interval in found.items() if interval is not None}


def _summary(values: Mapping[int, Interval], *, several: bool) -> Interval | None:
    if not values:
        return None
    return mean_interval([one.mean for one in values.values()]) if several else next(iter(values.values()))


def _difference(first: Mapping[int, Interval], second: Mapping[int, Interval]) -> Interval | None:
    common = sorted(set(first) & set(second))
    if not common:
        return None
    return paired_difference([first[seed].mean for seed in common], [second[seed].mean for seed in common])


def _keys(by_label: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[Key]:
    return list(dict.fromkeys(key for seeds in by_label.values() for run in seeds.values() for key in _measures(run)))


def _cells(by_label: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    first, *others = by_label
    counts = {label: len(seeds) for label, seeds in by_label.items()}
    named = {label: label if len(set(counts.values())) == 1 else f"{label} (n = {n})" for label, n in counts.items()}
    header = ["measure", *named.values(), *(f"{other} - {first}" for other in others)]
    rows = []
    for key in _keys(by_label):
        values = {label: _values(seeds, key) for label, seeds in by_label.items()}
        shown = [_cell(_summary(found, several=_several(by_label))) for found in values.values()]
        shown += [_cell(_difference(values[first], values[other]), sign=True) for other in others]
        rows.append([describe(key), *shown])
    return header, rows


def describe(key: Key) -> str:
    """A measure in words."""
    space, measure, noise, size = key
    words = {
        "loss": "loss",
        "expected": f"expected rise, {noise} noise, sigma {size:g}" if size is not None else "",
        "worst": f"worst rise found, rho {size:g}" if size is not None else "",
        "eigenvalue": f"eigenvalue {size:.0f}" if size is not None else "",
        "trace": f"trace, per sigma² of {noise} noise" if noise else "trace",
    }
    return f"{space}: {words[measure]}"


def _cell(interval: Interval | None, *, sign: bool = False) -> str:
    if interval is None:
        return "–"
    magnitude = abs(interval.mean) or 1.0
    digits = max(0, min(7, 3 - math.floor(math.log10(magnitude))))
    return format_interval(interval, sign=sign, digits=digits)


def _verdicts(by_label: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
    """One line for each other label: where it is flatter, where sharper, and where nothing was found."""
    first, *others = by_label
    lines = []
    for other in others:
        said: dict[str, list[str]] = {}
        for key in _keys(by_label):
            difference = _difference(_values(by_label[first], key), _values(by_label[other], key))
            if difference is None or key[1] == "loss":
                continue
            words = verdict(difference, other, higher_is_better=False)
            words = {"better": "flatter", "worse": "sharper"}.get(words.rpartition(" ")[2], words)
            said.setdefault(words, []).append(describe(key))
        counts = "; ".join(f"{words}: {_count(found)}" for words, found in said.items())
        lines.append(f"{other} against {first}: {counts or 'no seed in common'}")
    return lines


def _count(found: Sequence[str]) -> str:
    return ", ".join(found) if len(found) <= 4 else f"{len(found)} measures"


# --- figures -------------------------------------------------------------------------------------------------------


def _figures(
    by_label: Mapping[str, Mapping[int, Mapping[str, Any]]], lines: Sequence[Mapping[str, Any]]
) -> dict[str, Figure]:
    spaces = list(dict.fromkeys(key[0] for key in _keys(by_label)))
    expected = dict(_expected_panels(by_label))
    slices = {
        f"{space}: loss along a filter-normalised direction": _stacked(by_label, "slices", space, "at", "loss")
        for space in spaces
    }
    spectra = {
        f"{space}: spectral density of the Hessian": _stacked(by_label, "spectra", space, "eigenvalue", "density")
        for space in spaces
    }
    figures = {
        "expected": draw_curves(expected, "sigma, relative size of the noise", "rise of the loss", log_x=True),
        "slices": draw_curves(slices, "step, in lengths of each row", "loss"),
    }
    if any(spectra.values()):
        figures["spectrum"] = draw_curves(spectra, "eigenvalue", "density", log_y=True)
    if lines:
        figures["lines"] = draw_curves(
            {"loss between models": _between(lines)}, "from the first model to the other", "loss"
        )
    planes = {
        f"{label}, {space}": run["planes"][space]
        for label, seeds in by_label.items()
        for run in list(seeds.values())[:1]
        for space in spaces
        if run["planes"].get(space)
    }
    if planes:
        figures["planes"] = draw_planes(planes)
    return figures


def _expected_panels(by_label: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Iterator[tuple[str, Curves]]:
    keys = [key for key in _keys(by_label) if key[1] == "expected"]
    for space, noise in dict.fromkeys((key[0], key[2]) for key in keys):
        sizes = [key[3] for key in keys if (key[0], key[2]) == (space, noise)]
        curves = {}
        for label, seeds in by_label.items():
            rows = [
                [found[space, "expected", noise, size].mean for size in sizes]
                for run in seeds.values()
                for found in [_measures(run)]
                if (space, "expected", noise, sizes[0]) in found  # a run without an adapter has no such space
            ]
            if rows:
                curves[label] = ([float(size or 0) for size in sizes], np.array(rows))
        yield f"{space}: {noise} noise", curves


def _stacked(
    by_label: Mapping[str, Mapping[int, Mapping[str, Any]]], what: str, space: str, places: str, values: str
) -> Curves:
    """Curves over the places of all, which slices share; of spectra, whose places differ, none so loses a peak."""
    found = {
        label: [run[what][space] for run in seeds.values() if run[what].get(space)] for label, seeds in by_label.items()
    }
    at = sorted({place for of_label in found.values() for one in of_label for place in one[places]})
    return {
        label: (at, np.array([np.interp(at, one[places], one[values], 0, 0) for one in of_label]))
        for label, of_label in found.items()
        if of_label
    }


def _between(lines: Sequence[Mapping[str, Any]]) -> Curves:
    by_pair: dict[str, list[Mapping[str, Any]]] = {}
    for one in lines:
        by_pair.setdefault(f"{one['from']} to {one['to']}", []).append(one)
    return {pair: (found[0]["at"], np.array([one["loss"] for one in found])) for pair, found in by_pair.items()}
