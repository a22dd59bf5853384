"""Tables and what stands in them: for the terminal, Markdown and LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from lora_ggpo.statistics.intervals import Interval
    from lora_ggpo.statistics.metrics import Metric

Evaluation = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""{set: {metric: {"value", "se", "n"}}}, as metrics.json holds it."""

NOTHING = "–"
_WORDS = ("method", "model", "predicted by", "verdict", "values", "setting", "why", "chosen", "curve")
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


@dataclass(frozen=True)
class TextTable:
    """A table of ready-made cells."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def words(self) -> tuple[int, ...]:
        """Columns of words, which stand on the left; the others hold numbers, on the right."""
        return tuple(index for index, name in enumerate(self.header) if not index or name in _WORDS)

    def markdown(self, level: str = "##") -> str:
        """The table below its title, a heading of `level`."""
        header, *rows = [[escape_markdown(cell) for cell in row] for row in (self.header, *self.rows)]
        rule = ["---" if index in self.words else "---:" for index in range(len(header))]
        lines = "".join("| " + " | ".join(line) + " |\n" for line in (header, rule, *rows))
        return f"{level} {escape_markdown(self.title)}\n\n{lines}\n"

    def latex(self, section: str = "") -> str:
        """The table for the package booktabs, with its title, after that of the section, as the caption."""
        caption = escape_latex(f"{section}: {self.title}" if section else self.title)
        columns = "".join("l" if index in self.words else "r" for index in range(len(self.header)))
        first, *others = (" & ".join(map(escape_latex, line)) + " \\\\\n" for line in (self.header, *self.rows))
        return (
            f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n\\begin{{tabular}}{{{columns}}}\n"
            f"\\toprule\n{first}\\midrule\n{''.join(others)}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
        )


def metrics_table(evaluations: Sequence[Evaluation]) -> Table:
    """Metrics by set, the fewer of the two side by side, so that it is narrow.

    With one run, value ± standard error; with several, mean ± half the 95 % t interval.
    """
    spread = "± standard error" if len(evaluations) == 1 else f"mean of {len(evaluations)} seeds ± 95 % t interval"
    found = {
        name: [evaluation[name] for evaluation in evaluations if name in evaluation]
        for name in dict.fromkeys(name for evaluation in evaluations for name in evaluation)
    }
    metrics = list(dict.fromkeys(metric for runs in found.values() for run in runs for metric in run))
    cells = {
        name: [_metric_cell([run.get(metric) for run in runs]) for metric in metrics] for name, runs in found.items()
    }
    counts = {name: str(next(iter(runs[0].values()))["n"]) for name, runs in found.items()}
    if "temperature" in metrics:
        spread += "; scaled: after temperature scaling on the validation set"
    if len(metrics) <= len(found):
        rows = [[name, counts[name], *cells[name]] for name in found]
        return rows_table(["set", "rows", *metrics], rows, spread)
    rows = [["rows", *counts.values()], *([metric, *of] for metric, *of in zip(metrics, *cells.values(), strict=True))]
    return rows_table(["", *found], rows, spread)


def rows_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A table of ready-made cells, the first column on the left; a row of a single cell is a heading."""
    table = Table(box=box.SIMPLE_HEAD, caption=title, caption_justify="left", pad_edge=False, collapse_padding=True)
    for index, name in enumerate(header):
        numbers = index > 0 and name != "verdict"
        table.add_column(escape(name), justify="right" if index else "left", overflow="fold", no_wrap=numbers)
    for row in rows:
        table.add_row(*map(escape, row), style="bold" if len(row) < len(header) else None)
    return table


def escape_markdown(text: str) -> str:
    """Any text as the inside of a Markdown table's cell."""
    escaped = re.sub(r"([\\`*_\[\]|$~])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def escape_latex(text: str) -> str:
    """Any text as LaTeX that prints it."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def format_interval(interval: Interval, *, sign: bool = False, digits: int = 4) -> str:
    """``0.842 ± 0.006``; the mean alone where the width is not known."""
    form = f".{digits}f" if abs(interval.mean) < 1000 else f".{max(digits, 4)}g"
    mean = f"{interval.mean:{'+' if sign else ''}{form}}"
    return f"{mean} ± {interval.half:{form}}" if math.isfinite(interval.half) else mean


def format_score(interval: Interval | None, metric: Metric, *, sign: bool = False) -> str:
    """`interval` as `metric` is shown."""
    return NOTHING if interval is None else format_interval(metric.scaled(interval), sign=sign, digits=metric.digits)


def format_p(p: float) -> str:
    """A p-value; nan is none."""
    return NOTHING if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


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


def _metric_cell(metrics: Sequence[Mapping[str, Any] | None]) -> str:
    from lora_ggpo.statistics.intervals import Interval, mean_interval  # numpy: a table of words must not wait for it

    found = [metric for metric in metrics if metric is not None and metric["value"] is not None]
    if not found:
        return NOTHING
    if len(metrics) == 1:
        se = found[0]["se"]
        return format_interval(Interval(found[0]["value"], math.nan if se is None else se, 1))
    return format_interval(mean_interval([metric["value"] for metric in found]))
