"""Tables: for the terminal, Markdown and LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lora_ggpo.statistics.intervals import Interval, mean_interval

Evaluation = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""{set: {metric: {"value", "se", "n"}}}, as metrics.json holds it."""

_LATEX: Mapping[str, str] = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"\ensuremath{\pm}",
    "×": r"\ensuremath{\times}",
    "↑": r"\ensuremath{\uparrow}",
    "↓": r"\ensuremath{\downarrow}",
    "–": "--",
    **{character: f"{{{character}}}" for character in "[]*"},  # which the line break before it would take
}


def metrics_table(evaluations: Sequence[Evaluation]) -> Table:
    """One row for each set: with one run, value ± standard error; with several, mean ± half the 95 % t interval."""
    sets = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation))
    metrics = list(
        dict.fromkeys(metric for evaluation in evaluations for rows in evaluation.values() for metric in rows)
    )
    spread = "± standard error" if len(evaluations) == 1 else f"mean of {len(evaluations)} seeds ± 95 % t interval"
    table = _table("set", "rows", *map(escape, metrics), title=spread)
    for name in sets:
        found = [evaluation[name] for evaluation in evaluations if name in evaluation]
        rows = str(next(iter(found[0].values()))["n"])
        table.add_row(escape(name), rows, *(_cell([metrics.get(metric) for metrics in found]) for metric in metrics))
    return table


def rows_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A table of ready-made cells in rich's markup, the first column on the left."""
    table = _table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[int] = (0,)) -> str:
    """The same cells in Markdown; columns of `words` are on the left, the others, numbers, on the right."""
    lines = [header, ["---" if index in words else "---:" for index in range(len(header))], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def escape_markdown(text: str) -> str:
    """Any text as the inside of a Markdown table's cell."""
    escaped = re.sub(r"([\\`*_\[\]|$~])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, words: Collection[int]) -> str:
    """The same cells as a LaTeX table, for the package booktabs.

    Args:
        words: Columns on the left; the others are numbers, on the right.
    """
    columns = "".join("l" if index in words else "r" for index in range(len(header)))
    first, *others = (" & ".join(map(escape_latex, line)) + " \\\\\n" for line in (header, *rows))
    return (
        f"\\begin{{table}}\n\\centering\n\\caption{{{escape_latex(caption)}}}\n\\begin{{tabular}}{{{columns}}}\n"
        f"\\toprule\n{first}\\midrule\n{''.join(others)}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
    )


def escape_latex(text: str) -> str:
    """Any text as LaTeX that prints it."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def format_interval(interval: Interval, *, sign: bool = False, digits: int = 4) -> str:
    """``0.842 ± 0.006``; the mean alone where the width is not known."""
    form = f".{digits}f" if abs(interval.mean) < 1000 else f".{max(digits, 4)}g"
    mean = f"{interval.mean:{'+' if sign else ''}{form}}"
    return f"{mean} ± {interval.half:{form}}" if math.isfinite(interval.half) else mean


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """A curve in one line of text."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    if len(finite) > width:
        finite = [finite[round(i * (len(finite) - 1) / (width - 1))] for i in range(width)]
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[round((value - low) / span * (len(bars) - 1))] for value in finite)


def _table(*header: str, title: str | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, caption=title, caption_justify="left", pad_edge=False)
    for index, name in enumerate(header):
        numbers = index > 0 and name != "verdict"
        table.add_column(name, justify="right" if index else "left", overflow="fold", no_wrap=numbers)
    return table


def _cell(metrics: Sequence[Mapping[str, Any] | None]) -> str:
    values = [metric["value"] for metric in metrics if metric is not None and metric["value"] is not None]
    if not values:
        return "–"
    if len(metrics) == 1:
        se = metrics[0]["se"] if metrics[0] else None
        return format_interval(Interval(values[0], math.nan if se is None else se, 1))
    return format_interval(mean_interval(values))
