import re

import pytest
from rich.console import Console

from lora_ggpo.comparison.results import read_results
from lora_ggpo.errors import UserError
from lora_ggpo.report.analysis import analyse
from lora_ggpo.report.calibration import calibration_tables
from lora_ggpo.report.comparison import write_report
from tests.report.grids import curve, run, trial, write_full_grid, write_results
from tests.report.pages import HOSTILE, Page, asks_nothing_of_the_network

OUTPUTS = ["table.md", "table.tex", "report.html"] + [
    f"figures/{name}.{kind}"
    for name in ("differences", "curves", "tradeoffs", "reliability", "coverage")
    for kind in ("png", "svg")
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = write_full_grid(tmp_path_factory.mktemp("grid"))
    return folder, write_report(folder)


def test_all_files_are_written_and_nothing_else(report):
    folder, _ = report
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {*OUTPUTS, "runs.jsonl", "tuning.jsonl", "curves.jsonl", "facts.json"}


def test_a_second_report_is_the_same_to_the_byte(report, tmp_path):
    folder, _ = report
    write_report(write_full_grid(tmp_path))
    first = {name: (folder / name).read_bytes() for name in OUTPUTS}
    assert {name: (tmp_path / name).read_bytes() for name in OUTPUTS} == first


def test_what_the_command_prints(report):
    _, comparison = report
    console = Console(width=100)
    with console.capture() as capture:
        console.print(comparison.table)
    assert re.search(r"SAM +87\.60 ± 0\.75 +-2\.90 ± 1\.72 +worse than LoRA", capture.get())
    assert "label_noise=0.25" in capture.get()
    assert len(comparison.verdicts) == 4
    assert comparison.verdicts[0].startswith(
        "label_noise=0, test: worse than LoRA: SAM (-2.90 points); this grid could"
    )


def test_markdown_and_latex_have_the_numbers(report):
    folder, _ = report
    markdown, latex = (folder / "table.md").read_text(), (folder / "table.tex").read_text()
    row = "| SAM | 87.60 ± 0.75 | -2.90 ± 1.72 | 0.018 | worse than LoRA | 0.1240 ± 0.0075 | +0.0290 ± 0.0172 | 0.018 |"
    assert row in markdown  # the log-loss of this grid is 1 - accuracy, so its p is the same
    assert r"SAM & 87.60 \ensuremath{\pm} 0.75 & -2.90 \ensuremath{\pm} 1.72 & 0.018 & worse than LoRA &" in latex
    assert "| SAM | 1,000 | 1.30× |" in markdown
    assert "The loss is nan at step 3" in markdown
    assert "| SAM | 77.75 ± 1.91 | -2.70 ± 7.62 |" in markdown  # on the wrong labels
    assert "| method | calibration error, % ↓ | difference | p | calibration error, scaled, % ↓ |" in markdown
    assert latex.count(r"\begin{tabular}") == latex.count(r"\toprule") == 14


def test_page_is_whole_and_asks_nothing_of_the_network(report):
    folder, _ = report
    asks_nothing_of_the_network((folder / "report.html").read_text())


def test_page_says_what_it_should(report):
    folder, _ = report
    page = Page((folder / "report.html").read_text())
    text = " ".join(" ".join(page.words).split())
    for words in ("lora-ggpo compare", "The loss is nan at step 3", "Holm", "2.9", "0, 1, 2", "16 tuning runs"):
        assert words in text
    assert [tag for tag, _ in page.tags].count("svg") == 5
    assert text.index("worse than LoRA: SAM") < text.index("label_noise=0 test method")


@pytest.mark.parametrize("scaled", [True, False])
def test_calibration_of_tokens_stands_beside_that_after_scaling_where_a_run_has_it(tmp_path, scaled):
    values = {"loss": 1.5, "token_ece": 0.05, "token_brier": 0.6}
    values |= {"scaled_loss": 1.4, "scaled_token_ece": 0.02, "scaled_token_brier": 0.5} if scaled else {}
    runs = [run(method, seed, values) for method in ("lora", "ggpo") for seed in range(2)]
    (setting,) = analyse(read_results(write_results(tmp_path / "sft", runs, metric="loss")))
    (table,) = calibration_tables(setting)
    shown = [name for name in table.header if name not in ("method", "difference", "p")]
    named = ["token calibration error, % ↓", "token Brier score ↓", "loss ↓"]
    both = [
        "token calibration error, % ↓",
        "token calibration error, scaled, % ↓",
        "token Brier score ↓",
        "token Brier score, scaled ↓",
        "loss ↓",
        "loss, scaled ↓",
    ]
    assert shown == (both if scaled else named)
    assert {row[1] for row in table.rows} == {"5.00 ± 0.00"}


def test_hostile_names_stay_text(tmp_path):
    runs = [
        run(method, seed, {"accuracy": 0.5 + seed / 10 + (method == HOSTILE) * seed / 5}, HOSTILE, ("test", HOSTILE))
        for method in ("lora", HOSTILE)
        for seed in range(2)
    ]
    runs.append(run(HOSTILE, 2, {}, HOSTILE, failed=HOSTILE))
    curves = [curve(method, seed, [0.5, 0.4], HOSTILE) for method in ("lora", HOSTILE) for seed in range(2)]
    tuning = [trial(HOSTILE, 0, 0.5, HOSTILE, values={HOSTILE: HOSTILE}, failed=HOSTILE)]
    comparison = write_report(write_results(tmp_path, runs, tuning, curves, command=HOSTILE))
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert HOSTILE in page.words
    assert "49" not in re.sub(r"<svg.*?</svg>", "", html, flags=re.S)
    assert "<script>" not in (tmp_path / "table.md").read_text()
    assert r"\$x\_\$" in (tmp_path / "table.tex").read_text()
    console = Console(width=400)
    with console.capture() as capture:
        console.print(comparison.table)
    assert capture.get().count("[bold]") == 2  # the setting and the method


@pytest.mark.parametrize("failed", [None, "The loss is nan at step 1"])
def test_a_single_run_is_a_report(tmp_path, failed):
    comparison = write_report(write_results(tmp_path, [run("lora", 0, {"loss": 2.5}, failed=failed)], metric="loss"))
    assert comparison.verdicts == ["test: nothing can be compared: no method has a seed in common with LoRA"]
    assert ("failed: The loss is nan" if failed else "2.5000") in (tmp_path / "table.md").read_text()
    assert "no tuning run" in (tmp_path / "report.html").read_text()


def test_lower_is_better_is_marked(tmp_path):
    runs = [run(m, s, {"loss": v + s / 7}) for m, v in (("lora", 2.0), ("dora", 3.0)) for s in range(2)]
    write_report(write_results(tmp_path, runs, metric="loss"))
    assert "loss ↓" in (tmp_path / "table.md").read_text()
    assert "left is better" in (tmp_path / "figures" / "differences.svg").read_text()


def test_no_results(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        write_report(tmp_path)
