from rich.console import Console

from lora_ggpo.report.statistics import mean_interval
from lora_ggpo.report.tables import format_interval, markdown_table, metrics_table, sparkline


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


def test_a_set_that_lacks_a_metric():
    evaluation = {"a": {"loss": {"value": 1.0, "se": None, "n": 2}}, "b": {"mcc": {"value": None, "se": None, "n": 2}}}
    assert "–" in _text(metrics_table([evaluation]))


def test_markdown():
    assert markdown_table(["", "x"], [["a", "1"]]) == "|  | x |\n| --- | ---: |\n| a | 1 |\n"


def test_sparkline():
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([]) == sparkline([float("nan")]) == ""
    assert len(sparkline(range(1000))) == 60
