"""The report of a study: the double descent of each curve in words and numbers, figures, and one page of it all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lora_ggpo.report.analysis import METRICS, Results, format_amount, read_results
from lora_ggpo.report.descents import QUANTITIES, STEP, TRAIN, Curve, StudyResult, set_name, study_results
from lora_ggpo.report.page import NOTHING, Grid, render_page, write_figures
from lora_ggpo.report.study_figures import caption, study_figures
from lora_ggpo.report.tables import escape_markdown, format_interval, rows_table
from lora_ggpo.statistics.descent import FITTED_ERROR, FITTED_LOSS
from lora_ggpo.statistics.intervals import mean_interval
from lora_ggpo.workspace.files import write_json_lines, write_text

_NAMED = 3
"""Curves that a verdict names; the table has them all."""


@dataclass(frozen=True)
class Study:
    """What a study found.

    Attributes:
        verdicts: One line for each axis and method.
        table: The scores of each setting and method, for the terminal.
    """

    verdicts: list[str]
    table: Table


def write_study_report(folder: Path) -> Study:
    """Write report.md, report.html, table.tex, descent.jsonl and figures/ from the results in `folder`.

    The same results always give the same bytes, and every file is whole at any time.

    Raises:
        UserError: a results file is missing or damaged, or there is no run.
    """
    results = read_results(folder)
    found = study_results(results)
    verdicts = _verdicts(found)
    grids = [grid for grid in (_score_grid(found), _descent_grid(found), _failure_grid(found)) if grid.rows]
    figures = study_figures(found)
    captions = {name: caption(name) for name in figures}
    write_figures(folder, figures)
    write_json_lines(folder / "descent.jsonl", map(_record, found.curves))
    write_text(folder / "report.md", _markdown(found, verdicts, grids, captions, results))
    write_text(folder / "table.tex", "% \\usepackage{booktabs}\n" + "\n".join(grid.latex() for grid in grids))
    page = render_page(
        "study.html.j2",
        figures,
        captions,
        title=_title(found),
        found=found,
        facts=results.facts,
        verdicts=verdicts,
        grids=grids,
        fitted_error=f"{100 * FITTED_ERROR:g}",
        fitted_loss=f"{FITTED_LOSS:g}",
    )
    write_text(folder / "report.html", page)
    lines = [f"{axis}, {method}: {words}" for (axis, method), words in verdicts.items()]
    return Study(lines, _terminal_table(found))


# --- words ---------------------------------------------------------------------------------------------------------


def _verdicts(found: StudyResult) -> dict[tuple[str, str], str]:
    """In plain words, by name of the axis and title of the method."""
    scored = [curve for curve in found.curves if curve.descent]
    groups = {
        (axis, method): [curve for curve in scored if (curve.axis, curve.method) == (axis, method)]
        for axis in (*found.numeric, STEP)
        for method in found.methods
    }
    return {(found.axis_name(axis), method): _verdict(of, found) for (axis, method), of in groups.items() if of}


def _verdict(curves: Sequence[Curve], found: StudyResult) -> str:
    """One sentence that claims no more than the tests do."""
    long = [curve for curve in curves if len(curve.places) >= 4]
    if not long:
        return "too few points: a double descent takes four or more"
    sure = sorted((curve for curve in long if curve.found), key=_in_spreads, reverse=True)
    more = [f"and {len(sure) - _NAMED} more"] if len(sure) > _NAMED else []
    rises = ", ".join([*(_rise(curve, found) for curve in sure[:_NAMED]), *more])
    words = [f"double descent: {rises}" if sure else "no double descent found"]
    unsure = [curve for curve in long if curve.rises and not curve.found]
    tested = [curve for curve in unsure if not math.isnan(curve.p)]
    for those, why in (
        (tested, "not shown to be more than noise"),
        ([curve for curve in unsure if curve not in tested], "untested: three different seeds or more can tell"),
    ):
        if those:
            words.append(f"{len(those)} of {len(long)} mean curves rise between two descents, {why}")
    return "; ".join(words)


def _in_spreads(curve: Curve) -> float:
    return (curve.descent and curve.descent.relative) or 0.0


def _rise(curve: Curve, found: StudyResult) -> str:
    """``test error rises by 3.20 points from r=4 to r=16 (p = 0.012)``."""
    assert curve.descent
    amount = format_amount(curve.descent.score, QUANTITIES[curve.quantity])
    axis = "step " if curve.axis == STEP else f"{found.axis_name(curve.axis)}="
    start, end = (_place(curve, place) for place in curve.rises or ())
    settles = ", then settles" if (curve.axis, curve.data) == (STEP, TRAIN) else ""
    places = f"from {axis}{start} to {axis}{end}{settles}"
    return f"{_name(curve)} rises by {amount} {places} (p {'<' if curve.p < 0.001 else '='} {max(curve.p, 0.001):.3f})"


def _place(curve: Curve, place: float) -> str:
    return f"{place:.0f}" if curve.axis == STEP else f"{place:g}"


def _name(curve: Curve) -> str:
    words = f"{set_name(curve.data)} {curve.quantity}"
    return f"{words} with {curve.others}" if curve.others else words


def _title(found: StudyResult) -> str:
    varied = [found.axis_name(key) for key, values in found.axes.items() if len(values) > 1]
    return ", ".join([*varied, found.axis_name(STEP)])


# --- tables --------------------------------------------------------------------------------------------------------


def _score_grid(found: StudyResult) -> Grid:
    scored = list(dict.fromkeys(key for scores in found.scores.values() for key in scores))
    header = ["setting", "method", "seeds", *(_score_heading(*key) for key in scored)]
    rows = [
        (setting or NOTHING, method, str(max(map(len, scores.values()), default=0)), *_score_cells(scores, scored))
        for (setting, method), scores in found.scores.items()
    ]
    return Grid("Scores", tuple(header), tuple(rows))


def _score_heading(data: str, metric: str) -> str:
    shown = METRICS[metric]
    return f"{set_name(data)} {shown.shown_as} {'↑' if shown.higher_is_better else '↓'}"


def _score_cells(scores: Mapping[tuple[str, str], list[float]], keys: Sequence[tuple[str, str]]) -> list[str]:
    cells = []
    for key in keys:
        shown, values = METRICS[key[1]], scores.get(key)
        scaled = mean_interval([value * shown.scale for value in values]) if values else None
        cells.append(format_interval(scaled, digits=shown.digits) if scaled else NOTHING)
    return cells


def _terminal_table(found: StudyResult) -> Table:
    keys = [(found.sets[0], metric) for metric in found.quantities.values()]
    rows = [
        [escape(setting), escape(method), *_score_cells(scores, keys)]
        for (setting, method), scores in found.scores.items()
    ]
    header = ["setting", "method", *(_score_heading(*key) for key in keys)]
    return rows_table(header, rows, "mean ± half the 95 % t interval over seeds")


def _descent_grid(found: StudyResult) -> Grid:
    header = ("axis", "method", "curve", "points", "seeds", "score", "in spreads", "checked", "p", "rises", "fitted at")
    rows = tuple(_descent_row(curve, found) for curve in found.curves if curve.descent)
    return Grid("Double descent", (*header, "verdict"), rows)


def _descent_row(curve: Curve, found: StudyResult) -> tuple[str, ...]:
    assert curve.descent
    shown, descent = QUANTITIES[curve.quantity], curve.descent
    checked = descent.checked
    scaled = checked and dataclasses.replace(checked, mean=checked.mean * shown.scale, half=checked.half * shown.scale)
    return (
        found.axis_name(curve.axis),
        curve.method,
        _name(curve),
        str(len(curve.places)),
        str(len(curve.seeds)),
        format_amount(descent.score, shown),
        NOTHING if descent.relative is None else f"{descent.relative:.1f}",
        format_interval(scaled, sign=True, digits=shown.digits) + shown.unit if scaled else NOTHING,
        NOTHING if math.isnan(curve.p) else "<0.001" if curve.p < 0.001 else f"{curve.p:.3f}",
        " to ".join(_place(curve, place) for place in curve.rises or ()) or NOTHING,
        NOTHING if curve.threshold is None else _place(curve, curve.threshold),
        _short_verdict(curve),
    )


def _short_verdict(curve: Curve) -> str:
    if len(curve.places) < 4:
        return "too few points"
    if not curve.rises:
        return "none"
    if math.isnan(curve.p):
        return "untested"
    return "double descent" if curve.found else "not shown"


def _failure_grid(found: StudyResult) -> Grid:
    rows = tuple(
        (setting or NOTHING, method, str(seed), why)
        for (setting, method), failures in found.failed.items()
        for seed, why in failures.items()
    )
    return Grid("Failed runs", ("setting", "method", "seed", "why"), rows)


def _record(curve: Curve) -> dict[str, Any]:
    """A line of descent.jsonl, in the units of the run folders."""
    descent = curve.descent
    return {
        "axis": curve.axis,
        "method": curve.method,
        "others": curve.others,
        "set": curve.data,
        "quantity": curve.quantity,
        "places": list(curve.places),
        "seeds": list(curve.seeds),
        "values": curve.values.tolist(),
        "score": descent and descent.score,
        "relative": descent and descent.relative,
        "positions": descent and descent.positions and [curve.places[index] for index in descent.positions],
        "checked": descent and descent.checked and descent.checked.mean,
        "p": descent and descent.p,
        "p_adjusted": None if math.isnan(curve.p) else curve.p,
        "fitted_at": curve.threshold,
    }


def _markdown(
    found: StudyResult,
    verdicts: Mapping[tuple[str, str], str],
    grids: Sequence[Grid],
    captions: Mapping[str, str],
    results: Results,
) -> str:
    lines = [
        f"- {escape_markdown(f'{axis}, {method}')}: {escape_markdown(words)}\n"
        for (axis, method), words in verdicts.items()
    ]
    figures = [f"![{name}](figures/{name}.svg)\n\n{escape_markdown(caption)}\n\n" for name, caption in captions.items()]
    command = escape_markdown(str(results.facts["command"]))
    parts = [f"# Study of {escape_markdown(_title(found))}\n\n", *lines, "\n", *figures]
    return "".join([*parts, *(grid.markdown("##") for grid in grids), _NOTES, f"\n\nMade by: {command}\n"])


_NOTES = (
    "Means over seeds ± half the 95 % t interval. A curve's score is how far its mean rises between two descents, no "
    "further than it fell before and falls after; “checked” is the same measured on seeds that had no part in choosing "
    "where, p that of its one-sided t test, adjusted by Holm over the curves of an axis, a set and a quantity. "
    "“Fitted at”: where the training data begins, or ceases, to be fitted."
)
