"""What a report says, and the ways it is written: Markdown, LaTeX, figures, and one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.table import Table

from lora_ggpo.report.plots import inline_svg, render
from lora_ggpo.report.tables import TextTable, escape_markdown
from lora_ggpo.workspace.files import write_bytes, write_text


@dataclass(frozen=True)
class Section:
    """Tables under one heading; a single table may do without. What is `folded` is for the page alone."""

    heading: str
    tables: Sequence[TextTable]
    folded: bool = False


@dataclass(frozen=True)
class Report:
    """What a report says.

    Attributes:
        title: Of the page.
        lead: What was compared, in one line.
        findings: In plain words, by what they are about.
        table: What the terminal shows.
        sections: All tables.
        figures: By name.
        captions: Of the figures, by name.
        notes: How to read the tables.
        made: With what, and how: names and values.
    """

    title: str
    lead: str
    findings: Mapping[str, str]
    table: Table
    sections: Sequence[Section]
    figures: Mapping[str, Figure]
    captions: Mapping[str, str]
    notes: str
    made: Sequence[tuple[str, str]]

    @property
    def verdicts(self) -> list[str]:
        """The findings as lines."""
        return [f"{subject}: {words}" for subject, words in self.findings.items()]

    def write(self, folder: Path, *, markdown: str, latex: str, template: str, **values: Any) -> None:
        """Write report.html, the files named and figures/.

        The same report always gives the same bytes, and every file is whole at any time.

        Args:
            template: Page of this package, which says how to read the report.
            values: What it needs beside the report.
        """
        (folder / "figures").mkdir(exist_ok=True)
        drawn = []
        for name, figure in self.figures.items():
            files = {kind: render(figure, kind) for kind in ("png", "svg")}
            for kind, file in files.items():
                write_bytes(folder / "figures" / f"{name}.{kind}", file)
            drawn.append((Markup(inline_svg(files["svg"])), self.captions[name]))
        write_text(folder / markdown, self._markdown())
        latex_tables = [table.latex(section.heading) for section in self._shown() for table in section.tables]
        write_text(folder / latex, "% \\usepackage{booktabs}\n" + "\n".join(latex_tables))
        page = Environment(
            loader=PackageLoader("lora_ggpo", "report"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        ).get_template(template)
        write_text(folder / "report.html", page.render(report=self, drawn=drawn, **values))

    def _shown(self) -> list[Section]:
        return [section for section in self.sections if not section.folded]

    def _markdown(self) -> str:
        parts = [f"# {escape_markdown(self.title)}\n\n"]
        parts += [f"- {escape_markdown(line)}\n" for line in self.verdicts]
        parts += ["\n", f"{escape_markdown(self.lead)}\n\n"]
        for name in self.figures:
            parts.append(f"![{name}](figures/{name}.svg)\n\n{escape_markdown(self.captions[name])}\n\n")
        for section in self._shown():
            parts += [f"## {escape_markdown(section.heading)}\n\n"] if section.heading else []
            parts += [table.markdown("###" if section.heading else "##") for table in section.tables]
        made = escape_markdown("; ".join(f"{name} {value}" for name, value in self.made))
        return "".join([*parts, f"{self.notes}\n", f"\nMade with: {made}.\n" if made else ""])


def provenance(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """With what a comparison or a study was made, from its facts.json."""
    made = [("command", facts["command"]), ("seeds", ", ".join(map(str, facts["seeds"])))]
    for index, one in enumerate(facts["environments"]):
        made.append(("other runs on" if index else "made on", f"{one['device']}, {one['cpus']} CPUs"))
        made += sorted(one["versions"].items(), key=lambda entry: entry[0].lower())
    return made
