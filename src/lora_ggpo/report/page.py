"""What reports are made of: tables of ready-made cells, figures in files, and pages that need nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from lora_ggpo.report.plots import inline_svg, render
from lora_ggpo.report.tables import escape_markdown, latex_table, markdown_table
from lora_ggpo.workspace.files import write_bytes

NOTHING = "–"
_WORDS = ("method", "verdict", "values", "setting", "why", "chosen", "axis", "curve")


@dataclass(frozen=True)
class Grid:
    """A table of ready-made cells."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def words(self) -> tuple[int, ...]:
        """Columns of words; the others hold numbers."""
        return tuple(index for index, name in enumerate(self.header) if name in _WORDS)

    def markdown(self, level: str) -> str:
        """The table below its title, a heading of `level` (``##``)."""
        header, *rows = [[escape_markdown(cell) for cell in row] for row in (self.header, *self.rows)]
        return f"{level} {escape_markdown(self.title)}\n\n{markdown_table(header, rows, self.words)}\n"

    def latex(self, setting: str = "") -> str:
        """The table for LaTeX, with its title, after that of the setting, as the caption."""
        caption = f"{setting}: {self.title}" if setting else self.title
        return latex_table(self.header, self.rows, caption, self.words)


def write_figures(folder: Path, figures: Mapping[str, Figure]) -> None:
    """Write each figure as figures/NAME.png and .svg."""
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            write_bytes(folder / "figures" / f"{name}.{kind}", render(figure, kind))


def render_page(template: str, figures: Mapping[str, Figure], captions: Mapping[str, str], **values: Any) -> str:
    """Fill in a template of this package; it finds the figures with their captions under ``figures``."""
    loader = FunctionLoader(lambda name: (files("lora_ggpo.report") / name).read_text(encoding="utf-8"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    drawn = [(name, Markup(inline_svg(figure)), captions[name]) for name, figure in figures.items()]
    return environment.get_template(template).render(figures=drawn, **values)
