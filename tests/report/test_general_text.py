"""What is forgotten stands beside what is gained, tested in the same way."""

import pytest
from matplotlib.container import ErrorbarContainer
from scipy import stats

from lora_ggpo.comparison.results import read_results
from lora_ggpo.data.bundled import GENERAL_TEXT
from lora_ggpo.report.analysis import analyse
from lora_ggpo.report.comparison import write_report
from lora_ggpo.report.forgetting import draw_forgetting
from tests.report.grids import run, write_results

RISES = {"lora": (0.30, 0.34, 0.29), "ggpo": (0.21, 0.20, 0.22), "sam": (None, None, None)}


@pytest.fixture
def folder(tmp_path):
    rows = []
    for method, rises in RISES.items():
        for seed, rise in enumerate(rises):
            rows.append(run(method, seed, {"accuracy": 0.8 + seed / 100}))
            if rise is not None:
                found = {"forgetting": rise, "loss": 2.5 + rise, "base_loss": 2.5}
                general = {name: {"value": value, "se": 0.01, "n": 100} for name, value in found.items()}
                rows[-1]["evaluation"] = {**rows[-1]["evaluation"], GENERAL_TEXT: general}
    return write_results(tmp_path, rows)


def test_the_table_has_the_rise_its_difference_and_both_losses(folder):
    write_report(folder)
    text = (folder / "table.md").read_text()
    p = stats.ttest_rel(RISES["ggpo"], RISES["lora"]).pvalue
    assert "| LoRA | 0.3100 ± 0.0657 | – | – | baseline | 2.5000 ± 0.0000 | 2.8100 ± 0.0657 |" in text
    row = f"| GGPO (relative rule) | 0.2100 ± 0.0248 | -0.1000 ± 0.0896 | {p:.3f} | better than LoRA | 2.5000"
    assert row in text
    assert "| SAM | – | – | – | not measured | – | – |" in text
    assert (folder / "figures" / "forgetting.svg").is_file()


def test_general_text_is_no_set_that_methods_are_compared_on(folder):
    (setting,) = analyse(read_results(folder))
    assert setting.sets == ("test",)


def test_the_figure_has_a_point_with_both_intervals_for_each_method(folder):
    settings = analyse(read_results(folder))
    axes = draw_forgetting(settings, "accuracy", ["LoRA"])["forgetting"].axes[0]
    points = [one for one in axes.containers if isinstance(one, ErrorbarContainer)]
    assert [one.lines[0].get_xydata()[0].tolist() for one in points] == [
        pytest.approx([0.31, 81.0]),
        pytest.approx([0.21, 81.0]),
    ]
    assert all(one.has_xerr and one.has_yerr for one in points)
    assert draw_forgetting(settings, "loss", []) == {}
