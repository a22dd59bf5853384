from rich.console import Console

from lora_ggpo.report.tables import (
    TextTable,
    escape_latex,
    escape_markdown,
    format_interval,
    metrics_table,
    sparkline,
)
from lora_ggpo.statistics.intervals import mean_interval


def _text(table):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_one_run_shows_standard_errors():
    text = _text(metrics_table([{"test": {"accuracy": {"value": 0.9, "se": 0.01, "n": 50}}}]))
    assert "0.9000 ± 0.0100" in text
    assert "50" in text
    assert "standard error" in text


def test_several_runs_show_the_mean_and_its_interval():
    runs = [{"test": {"accuracy": {"value": value, "se": 0.01, "n": 50}}} for value in (0.8, 0.9)]
    text = _text(metrics_table(runs))
    assert format_interval(mean_interval([0.8, 0.9])) in text
    assert "mean of 2 seeds" in text


def test_names_are_shown_as_they_are():
    text = _text(metrics_table([{"[/b]": {"how [/x]": {"value": 1.0, "se": None, "n": 2}}}]))
    assert "[/b]" in text
    assert "how [/x]" in text


def test_a_set_that_lacks_a_metric():
    evaluation = {"a": {"loss": {"value": 1.0, "se": None, "n": 2}}, "b": {"mcc": {"value": None, "se": None, "n": 2}}}
    assert "–" in _text(metrics_table([evaluation]))


def test_markdown():
    table = TextTable("of_x", ("", "x"), (("a", "1"),))
    assert table.markdown("###") == "### of\\_x\n\n|  | x |\n| --- | ---: |\n| a | 1 |\n\n"


def test_markdown_columns_of_words_are_on_the_left():
    assert TextTable("", ("a", "b", "verdict"), ()).words == (0, 2)


def test_markdown_escapes():
    assert escape_markdown("a|b\n<script> x_1 &") == r"a\|b &lt;script&gt; x\_1 &amp;"


def test_latex():
    assert TextTable("50 % of {it}", ("method", "x, %"), (("a_b", "1 ± 2"),)).latex() == (
        "\\begin{table}\n\\centering\n\\caption{50 \\% of \\{it\\}}\n\\begin{tabular}{lr}\n\\toprule\n"
        "method & x, \\% \\\\\n\\midrule\na\\_b & 1 \\ensuremath{\\pm} 2 \\\\\n\\bottomrule\n"
        "\\end{tabular}\n\\end{table}\n"
    )


def test_latex_escapes():
    assert escape_latex("\\input{x}~$^&#%_") == (
        r"\textbackslash{}input\{x\}\textasciitilde{}\$\textasciicircum{}\&\#\%\_"
    )
    assert escape_latex("[1] *\n<") == r"{[}1{]} {*} \textless{}"


def test_sparkline():
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([]) == sparkline([float("nan")]) == ""
    assert len(sparkline(range(1000))) == 60
