"""The report of a study: the double descent of each curve in words and numbers, and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lora_ggpo.comparison.results import read_results
from lora_ggpo.errors import count
from lora_ggpo.report.comparison import failure_table
from lora_ggpo.report.descents import STEP, TRAIN, Curve, StudyResult, set_name, study_results
from lora_ggpo.report.page import Report, Section, provenance
from lora_ggpo.report.study_figures import caption, study_figures
from lora_ggpo.report.tables import NOTHING, TextTable, format_p, format_score, rows_table
from lora_ggpo.statistics.descent import FITTED_ERROR, FITTED_LOSS
from lora_ggpo.statistics.intervals import mean_interval
from lora_ggpo.statistics.metrics import METRICS
from lora_ggpo.workspace.files import write_json_lines

_NAMED = 3
"""Curves that a verdict names; the table has them all."""

_NOTES = (
    "Means over seeds ± half the 95 % t interval. A curve's score is how far its mean rises between two descents, no "
    "further than it fell before and falls after; “checked” is the same measured on seeds that had no part in choosing "
    "where, p that of its one-sided t test, adjusted by Holm over the curves of an axis, a set and a quantity. "
    "“Fitted at”: where the training data begins, or ceases, to be fitted."
)


def write_study_report(folder: Path) -> Report:
    """Write report.md, report.html, table.tex, descent.jsonl and figures/ from the results in `folder`.

    Raises:
        UserError: a results file is missing or damaged, or there is no run.
    """
    results = read_results(folder)
    found, facts = study_results(results), results.facts
    varied = [found.axis_name(key) for key, values in found.axes.items() if len(values) > 1]
    failures = failure_table((*group, whys) for group, whys in found.failed.items())
    tables = [table for table in (_score_table(found), _descent_table(found), failures) if table.rows]
    figures = study_figures(found)
    settings, seeds = count(len(found.settings), "setting"), count(len(facts["seeds"]), "seed")
    report = Report(
        title=f"Study of {', '.join([*varied, found.axis_name(STEP)])}",
        lead=f"{', '.join(found.methods)}; {settings}, {seeds} of each; scored on {', '.join(found.sets)}",
        findings=_verdicts(found),
        table=_terminal_table(found),
        sections=[Section("", [table]) for table in tables],
        figures=figures,
        captions={name: caption(name) for name in figures},
        notes=_NOTES,
        made=provenance(facts),
    )
    write_json_lines(folder / "descent.jsonl", map(_record, found.curves))
    fitted = {"fitted_error": f"{100 * FITTED_ERROR:g}", "fitted_loss": f"{FITTED_LOSS:g}"}
    report.write(folder, markdown="report.md", latex="table.tex", template="study.html.j2", found=found, **fitted)
    return report


# --- words ---------------------------------------------------------------------------------------------------------


def _verdicts(found: StudyResult) -> dict[str, str]:
    """In plain words, by name of the axis and title of the method."""
    scored = [curve for curve in found.curves if curve.descent]
    groups = {
        (axis, method): [curve for curve in scored if (curve.axis, curve.method) == (axis, method)]
        for axis in (*found.numeric, STEP)
        for method in found.methods
    }
    return {f"{found.axis_name(axis)}, {method}": _verdict(of, found) for (axis, method), of in groups.items() if of}


def _verdict(curves: Sequence[Curve], found: StudyResult) -> str:
    """One sentence that claims no more than the tests do."""
    long = [curve for curve in curves if len(curve.places) >= 4]
    if not long:
        return "too few points: a double descent takes four or more"
    sure = [curve for curve in long if curve.found]
    sure.sort(key=lambda curve: (curve.descent and curve.descent.relative) or 0.0, reverse=True)
    more = [f"and {len(sure) - _NAMED} more"] if len(sure) > _NAMED else []
    rises = ", ".join([*(_rise(curve, found) for curve in sure[:_NAMED]), *more])
    words = [f"double descent: {rises}" if sure else "no double descent found"]
    for said, why in (
        ("not shown", "not shown to be more than noise"),
        ("untested", "untested: three different seeds or more can tell"),
    ):
        those = sum(curve.verdict == said for curve in long)
        words += [f"{those} of {len(long)} mean curves rise between two descents, {why}"] if those else []
    return "; ".join(words)


def _rise(curve: Curve, found: StudyResult) -> str:
    """``test error rises by 3.20 points from r=4 to r=16 (p = 0.012)``."""
    assert curve.descent
    amount = curve.metric.amount(curve.descent.score)
    axis = "step " if curve.axis == STEP else f"{found.axis_name(curve.axis)}="
    start, end = (_place(curve, place) for place in curve.rises or ())
    settles = ", then settles" if (curve.axis, curve.data) == (STEP, TRAIN) else ""
    places = f"from {axis}{start} to {axis}{end}{settles}"
    return f"{_name(curve)} rises by {amount} {places} (p {'<' if curve.p < 0.001 else '='} {max(curve.p, 0.001):.3f})"


def _place(curve: Curve, place: float | None) -> str:
    return NOTHING if place is None else f"{place:.0f}" if curve.axis == STEP else f"{place:g}"


def _name(curve: Curve) -> str:
    words = f"{set_name(curve.data)} {curve.quantity}"
    return f"{words} with {curve.others}" if curve.others else words


# --- tables --------------------------------------------------------------------------------------------------------


def _score_table(found: StudyResult) -> TextTable:
    scored = list(dict.fromkeys(key for scores in found.scores.values() for key in scores))
    header = ["setting", "method", "seeds", *(_score_heading(*key) for key in scored)]
    rows = [
        (setting or NOTHING, method, str(max(map(len, scores.values()), default=0)), *_score_cells(scores, scored))
        for (setting, method), scores in found.scores.items()
    ]
    return TextTable("Scores", tuple(header), tuple(rows))


def _score_heading(data: str, metric: str) -> str:
    return f"{set_name(data)} {METRICS[metric].heading}"


def _score_cells(scores: Mapping[tuple[str, str], list[float]], keys: Sequence[tuple[str, str]]) -> list[str]:
    values = [scores.get(key) for key in keys]
    intervals = [mean_interval(of_key) if of_key else None for of_key in values]
    return [format_score(one, METRICS[metric]) for (_, metric), one in zip(keys, intervals, strict=True)]


def _terminal_table(found: StudyResult) -> Table:
    keys = [(found.sets[0], metric) for metric in found.quantities.values()]
    rows = [[*group, *_score_cells(scores, keys)] for group, scores in found.scores.items()]
    header = ["setting", "method", *(_score_heading(*key) for key in keys)]
    return rows_table(header, rows, "mean ± half the 95 % t interval over seeds")


def _descent_table(found: StudyResult) -> TextTable:
    header = ("axis", "method", "curve", "points", "seeds", "score", "in spreads", "checked", "p", "rises", "fitted at")
    rows = tuple(_descent_row(curve, found) for curve in found.curves if curve.descent)
    return TextTable("Double descent", (*header, "verdict"), rows)


def _descent_row(curve: Curve, found: StudyResult) -> tuple[str, ...]:
    assert curve.descent
    descent = curve.descent
    return (
        found.axis_name(curve.axis),
        curve.method,
        _name(curve),
        str(len(curve.places)),
        str(len(curve.seeds)),
        curve.metric.amount(descent.score),
        NOTHING if descent.relative is None else f"{descent.relative:.1f}",
        format_score(descent.checked, curve.metric, sign=True) + (curve.metric.unit if descent.checked else ""),
        format_p(curve.p),
        " to ".join(_place(curve, place) for place in curve.rises or ()) or NOTHING,
        _place(curve, curve.threshold),
        curve.verdict,
    )


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
