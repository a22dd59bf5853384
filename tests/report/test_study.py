import json
import re

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from lora_ggpo.comparison.results import read_results
from lora_ggpo.errors import UserError
from lora_ggpo.report.descents import study_results
from lora_ggpo.report.study import write_study_report
from lora_ggpo.report.study_figures import study_figures
from tests.report.grids import run, write_results, write_study
from tests.report.pages import HOSTILE, Page, asks_nothing_of_the_network, leave_out_pictures

FIGURES = ("axis-r", "axis-label_noise", "steps", "heat-steps", "heat-axes")
OUTPUTS = ["report.md", "report.html", "table.tex", "descent.jsonl"] + [
    f"figures/{name}.{kind}" for name in FIGURES for kind in ("png", "svg")
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("study"))
    return folder, write_study_report(folder)


@pytest.fixture
def undrawn(monkeypatch):
    leave_out_pictures(monkeypatch)


def test_all_files_are_written_and_nothing_else(report):
    folder, _ = report
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {*OUTPUTS, "runs.jsonl", "tuning.jsonl", "curves.jsonl", "facts.json"}


def test_a_second_report_is_the_same_to_the_byte(tmp_path):
    """Of a study that is small: that of all the figures would take half a minute."""
    made = []
    for _ in range(2):
        write_study_report(write_study(tmp_path, methods=("lora",), noises=(0.3,), ranks=(1, 4), seeds=1))
        made.append({path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()})
    assert made[0] == made[1]
    assert {path.suffix for path in made[0]} == {".md", ".html", ".tex", ".jsonl", ".json", ".png", ".svg"}


def test_verdicts_say_where_it_rises_and_how_far(report):
    _, study = report
    lines = dict(line.split(": ", 1) for line in study.verdicts)
    assert list(lines) == [
        f"{axis}, {m}" for axis in ("r", "label_noise", "training steps") for m in ("LoRA", "GGPO (relative rule)")
    ]
    assert re.fullmatch(
        r"double descent: test (error|loss) with label_noise=0\.3 rises by \S+( points)? from r=4 to r=16 "
        r"\(p [<=] 0\.0\d\d\), test (error|loss) with .*",
        lines["r, LoRA"],
    )
    assert "test error with label_noise=0.3 rises by 12.00 points from r=4 to r=16" in lines["r, LoRA"]
    assert lines["r, GGPO (relative rule)"] == "no double descent found"
    assert lines["label_noise, LoRA"] == "too few points: a double descent takes four or more"
    assert "then settles" in lines["training steps, LoRA"]
    assert ", and 12 more" in lines["training steps, LoRA"]  # three quantities of five ranks with label noise
    assert lines["training steps, GGPO (relative rule)"].startswith("no double descent found")


def test_one_seed_cannot_tell(tmp_path, undrawn):
    study = write_study_report(write_study(tmp_path, methods=("lora",), noises=(0.3,), seeds=1, tested=False))
    assert study.verdicts[0] == (
        "r, LoRA: no double descent found; 2 of 2 mean curves rise between two descents, "
        "untested: three different seeds or more can tell"
    )


def test_what_the_command_prints(report):
    _, study = report
    console = Console(width=160)
    with console.capture() as capture:
        console.print(study.table)
    assert re.search(r"r=64, label_noise=0\.3 +LoRA +69\.60 ± 0\.39 +0\.6080 ± 0\.0079", capture.get())
    assert "test accuracy, % ↑" in capture.get()


def test_the_table_is_of_the_validation_set_where_the_test_set_was_left_alone(tmp_path, undrawn):
    study = write_study_report(write_study(tmp_path, ranks=(1, 4), seeds=2, tested=False))
    assert [column.header for column in study.table.columns][2:] == [
        "validation accuracy, % ↑",
        "validation log-loss ↓",
    ]
    assert "training accuracy" not in (tmp_path / "report.md").read_text()


def test_markdown_and_latex_have_the_numbers(report):
    folder, _ = report
    markdown, latex = (folder / "report.md").read_text(), (folder / "table.tex").read_text()
    assert r"| r=64, label\_noise=0.3 | LoRA | 5 | 69.60 ± 0.39 | 0.6080 ± 0.0079 | 85.00 ± 0.00 |" in markdown
    row = next(
        line for line in markdown.splitlines() if line.startswith(r"| r | LoRA | test error with label\_noise=0.3 |")
    )
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:6] == ["5", "5", "12.00 points"]
    assert cells[9:] == ["4 to 16", "256", "double descent"]
    assert all(f"(figures/{name}.svg)" in markdown for name in FIGURES)
    assert latex.count(r"\begin{tabular}") == 2


def test_records_can_be_scored_again(report):
    folder, _ = report
    rows = [json.loads(line) for line in (folder / "descent.jsonl").read_text().splitlines()]
    (row,) = [
        row
        for row in rows
        if (row["axis"], row["method"], row["others"], row["set"], row["quantity"])
        == ("adapter.r", "LoRA", "label_noise=0.3", "test", "error")
    ]
    means = dict(zip(row["places"], np.mean(row["values"], axis=0), strict=True))
    h, i, j, k = row["positions"]
    assert row["score"] == pytest.approx(min(means[h] - means[i], means[j] - means[i], means[j] - means[k]))
    assert (i, j, row["fitted_at"]) == (4, 16, 256)
    assert 0 < row["p"] <= row["p_adjusted"] < 0.05
    train = [row for row in rows if row["set"] == "train" and row["axis"] == "adapter.r"]
    assert {row["score"] for row in train} == {None}


def test_page_is_whole_and_asks_nothing_of_the_network(report):
    folder, _ = report
    text = (folder / "report.html").read_text()
    asks_nothing_of_the_network(text)
    page = Page(text)
    words = " ".join(" ".join(page.words).split())
    for said in ("Study of r, label_noise, training steps", "r, LoRA double descent", "at most 1 %", "Holm"):
        assert said in words
    assert [tag for tag, _ in page.tags].count("svg") == len(FIGURES)


def test_figures_are_drawn_and_marked(report):
    folder, _ = report
    figures = study_figures(study_results(read_results(folder)))
    for name in figures:
        assert np.ptp(imread(folder / "figures" / f"{name}.png")[..., :3]) > 0.9
    panel = next(axes for axes in figures["axis-r"].axes if axes.get_title("left") == "test error, %")
    lines = {line.get_label(): line for line in panel.get_lines()}
    lora = lines["LoRA, label_noise=0.3"]
    assert lora.get_ydata() == pytest.approx(100 * (0.304 + np.array([0.15, 0, 0.12, 0, -0.08])), abs=0.1)
    vertical = {(line.get_xdata()[0], line.get_linestyle()) for line in panel.get_lines() if len(line.get_xdata()) == 2}
    assert vertical == {(64, "--"), (256, "--"), (4, ":"), (16, ":")}
    assert panel.get_xscale() == "log"
    training = [axes.get_title("left") for axes in figures["steps"].axes]
    assert training[:3] == [
        f"{shown}, LoRA, label_noise=0" for shown in ("training loss", "validation error, %", "validation loss")
    ]


def test_heat_maps_have_the_means_and_mark_what_is_fitted(report):
    folder, _ = report
    figure = study_figures(study_results(read_results(folder)))["heat-axes"]
    (panel,) = [axes for axes in figure.axes if axes.get_title("left") == "LoRA"]
    (mesh,) = panel.collections
    assert mesh.get_array().filled()[:, 1] == pytest.approx(
        100 * (0.304 + np.array([0.15, 0, 0.12, 0, -0.08])), abs=0.1
    )
    (dots,) = panel.get_lines()
    assert set(zip(dots.get_xdata(), dots.get_ydata(), strict=True)) == {(0.5, 3.5), (0.5, 4.5), (1.5, 4.5)}


@pytest.mark.parametrize(
    ("ranks", "methods", "labels"),
    [
        (
            (1, 4),
            ("lora", "ggpo"),
            ["LoRA, r=1", "GGPO (relative rule), r=1", "LoRA, r=4", "GGPO (relative rule), r=4"],
        ),
        ((1, 2, 4, 8, 16), ("lora", "ggpo"), ["r=1", "r=2", "r=4", "r=8", "r=16"]),
        (tuple(range(1, 10)), ("lora", "ggpo"), ["LoRA", "GGPO (relative rule)"]),
        ((1,), ("lora",), ["LoRA"]),
    ],
)
def test_many_lines_are_spread_over_panels_by_what_tells_most_of_them_apart(tmp_path, ranks, methods, labels):
    write_study(tmp_path, methods=methods, noises=(0,), ranks=ranks, seeds=1)
    figure = study_figures(study_results(read_results(tmp_path)))["steps"]
    assert [line.get_label() for line in figure.axes[0].get_lines() if line.get_label()[0] != "_"] == labels


def test_hostile_names_stay_text(tmp_path):
    runs = [run(HOSTILE, seed, {"accuracy": 0.5, "log_loss": 0.5}, HOSTILE, ("test", HOSTILE)) for seed in (0, 1)]
    runs.append(run(HOSTILE, 2, {}, HOSTILE, failed=HOSTILE))
    write_results(tmp_path, runs, baseline=HOSTILE, command=HOSTILE)
    facts = json.loads((tmp_path / "facts.json").read_text())
    (tmp_path / "facts.json").write_text(json.dumps(facts | {"settings": {HOSTILE: {"data.source": HOSTILE}}}))
    study = write_study_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == []
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert HOSTILE in page.words
    assert "<script>" not in (tmp_path / "report.md").read_text()
    assert r"\$x\_\$" in (tmp_path / "table.tex").read_text()
    console = Console(width=400)
    with console.capture() as capture:
        console.print(study.table)
    assert "[bold]" in capture.get()


def test_a_study_of_which_every_run_failed_is_a_report(tmp_path):
    write_results(tmp_path, [run("lora", 0, {}, "r=1", failed="The loss is nan at step 1")])
    facts = json.loads((tmp_path / "facts.json").read_text())
    (tmp_path / "facts.json").write_text(json.dumps(facts | {"settings": {"r=1": {"adapter.r": 1}}}))
    assert write_study_report(tmp_path).verdicts == []
    assert "The loss is nan at step 1" in (tmp_path / "report.html").read_text()


def test_no_results(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        write_study_report(tmp_path)
