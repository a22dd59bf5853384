import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.image import imread
from scipy import stats

from lora_ggpo.report.plots import (
    COLOURS,
    Line,
    Tradeoff,
    draw_forest,
    draw_heat_maps,
    draw_learning_curves,
    draw_lines,
    draw_planes,
    draw_tradeoffs,
    inline_svg,
    render,
    save_training_plot,
)
from lora_ggpo.statistics.intervals import Interval

LOG = [
    {"step": 1, "loss": 1.0, "ggpo/gradient_share": 0.0},
    {"step": 2, "loss": 0.5, "ggpo/gradient_share": 0.4},
    {"step": 2, "validation/log_loss": 0.7},
]


def test_figures_are_drawn(tmp_path):
    save_training_plot(LOG, tmp_path / "a.png")
    save_training_plot([], tmp_path / "b.png")
    for name in "ab":
        pixels = imread(tmp_path / f"{name}.png")
        assert pixels.shape[0] > 300
        assert np.ptp(pixels) > 0.9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


HOSTILE = "a $x_$ <b> & \\frac"
METHODS = ["LoRA", HOSTILE, *(f"m{i}" for i in range(6))]


def _forest():
    differences = {method: {"test": Interval(0.1, 0.2, 3), "x": Interval(-0.1, np.nan, 1)} for method in METHODS}
    return draw_forest({"noise=0": differences, "noise=1": {}}, "difference")


def _curves():
    return draw_learning_curves({HOSTILE: {method: [LOG, LOG] for method in METHODS}, "none": {}}, METHODS[:6])


def _tradeoffs(memory=2.0):
    points = {m: Tradeoff(Interval(0.5 + i / 100, 0.1, 3), 1.0 + i, memory) for i, m in enumerate(METHODS)}
    points["unmeasured"] = Tradeoff(Interval(0.9, np.nan, 1), None, None)
    return draw_tradeoffs({"a": points, "b": {}}, METHODS[:6], "accuracy", higher_is_better=True)


@pytest.mark.parametrize("draw", [_forest, _curves, _tradeoffs])
def test_comparison_figures(draw):
    png = render(draw(), "png")
    assert np.ptp(imread(io.BytesIO(png))[..., :3]) > 0.9
    svg = render(draw(), "svg")
    assert HOSTILE in "".join(ElementTree.fromstring(svg).itertext())
    assert svg == render(draw(), "svg")
    assert png == render(draw(), "png")
    assert b"<dc:date>" not in svg


def test_inline_svg_is_one_element_without_ids_that_clash():
    first, second = (inline_svg(render(draw(), "svg")) for draw in (_forest, _curves))
    assert first.startswith("<svg")
    ElementTree.fromstring(second)
    assert "figure_1" not in first + second
    assert first == inline_svg(render(_forest(), "svg"))


def test_highlighted_methods_have_their_colours_and_others_are_grey():
    training = _curves().axes[0]
    colours = {line.get_label(): line.get_color() for line in training.get_lines()}
    assert colours == {**dict(zip(METHODS[:6], COLOURS, strict=True)), "other methods": "#9a9a9a"}


def test_intervals_of_the_forest():
    (bar,) = [c for c in _forest().axes[0].containers if c.get_label() == "test"]
    segments = bar.lines[2][0].get_segments()
    assert [list(segment[:, 0]) for segment in segments] == [pytest.approx([-0.1, 0.3])] * len(METHODS)


def test_pareto_front_is_drawn():
    (front,) = [line for line in _tradeoffs().axes[0].get_lines() if line.get_label() == "Pareto front"]
    assert front.get_xdata().tolist() == [1.0 + i for i in range(len(METHODS))]


def test_memory_that_was_not_measured_has_no_panel():
    assert len(_tradeoffs().axes) == 2 * len(_tradeoffs(memory=None).axes)


def test_lines_show_means_on_the_axes_asked_for():
    lines = {"lora": Line([0.1, 1.0], np.array([[1.0, 2.0], [3.0, 4.0]])), "ggpo": Line([0.1, 1.0], np.ones((1, 2)))}
    figure = draw_lines({"one": lines, "two": lines}, "sigma", "rise", log_x=True, log_y=True)
    first = figure.axes[0]
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    assert first.get_ylim() == pytest.approx((4e-6, 8))
    assert (first.get_xlabel(), first.get_ylabel()) == ("sigma", "rise")
    assert list(first.lines[0].get_ydata()) == [2.0, 3.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["lora", "ggpo"]


def test_a_label_has_one_style_in_all_panels_and_one_place_in_the_legend():
    names = [f"method {i}" for i in range(20)]  # more than there are styles
    line = Line((1, 2), np.ones((2, 2)))
    figure = draw_lines({"a": dict.fromkeys(names[1:], line), "b": dict.fromkeys(names, line)}, "r", columns=2)
    styles = [{one.get_label(): (one.get_color(), one.get_linestyle()) for one in axes.lines} for axes in figure.axes]
    assert [len(of_panel) for of_panel in styles] == [19, 20]
    assert styles[0].items() <= styles[1].items()
    assert len(set(styles[1].values())) == 18
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == sorted(names)


def test_the_step_that_was_kept_is_marked_on_the_validation_loss():
    """The last of those that were the best so far; the median of the seeds."""

    def log(*best):
        return [{"step": step, "loss": 1.0, "validation/loss": 0.5, "best": step in best} for step in range(1, 9)]

    logs = {"lora": [log()], "kept": [log(1, 3), log(1, 2, 5), log(8)], "grey": [log(4)]}
    training, validation = draw_learning_curves({"": logs}, ["lora", "kept"]).axes
    assert not [line for line in training.lines if line.get_linestyle() == "--"]
    (mark,) = [line for line in validation.lines if line.get_linestyle() == "--"]
    assert mark.get_xdata() == [5.0, 5.0]
    assert mark.get_color() == COLOURS[1]


def test_planes_of_zero_or_constant_loss_are_drawn():
    for losses in ([[0.0, 0.0], [0.0, 0.0]], [[2.0, 2.0], [2.0, 2.0]], [[0.0, 1.0], [1.0, 1.0]]):
        assert np.ptp(imread(io.BytesIO(render(draw_planes({"a": {"at": [-1, 1], "loss": losses}}), "png")))) > 0.9


def test_planes_share_one_scale():
    planes = {
        name: {"at": [-1, 0, 1], "loss": (scale * (1 + np.eye(3))).tolist()} for name, scale in (("a", 1), ("b", 5))
    }
    figure = draw_planes(planes)
    filled = [axes.collections[0] for axes in figure.axes[:2]]
    assert all(one.norm.vmin == pytest.approx(1) and one.norm.vmax == pytest.approx(10) for one in filled)


def test_bands_are_t_intervals_on_the_axis_asked_for():
    values = np.array([[1.0, 4.0, 2.0], [2.0, 4.5, 2.0], [1.2, 3.8, 2.3]])
    lines = {
        "LoRA": Line((1, 16, 256), values, dashed=(16,), dotted=(1, 256)),
        "one seed": Line((1, 16), values[:1, :2]),
    }
    figure = draw_lines({"loss": lines, "error": {}}, "r", columns=1, ticks=(1, 16, 256))
    panel = figure.axes[0]
    (band,) = panel.collections
    low, high = stats.t.interval(0.95, 2, loc=values.mean(axis=0), scale=stats.sem(values))
    corners = band.get_paths()[0].vertices
    for place, bottom, top in zip((1, 16, 256), low, high, strict=True):
        at = corners[corners[:, 0] == place, 1]
        assert (at.min(), at.max()) == pytest.approx((bottom, top))
    assert panel.get_xscale() == "log"
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["1", "16", "256"]
    near = draw_lines({"loss": lines}, "train size", columns=1, ticks=(0, 256))
    assert near.axes[0].get_xscale() == "linear"
    ranks = draw_lines({"loss": lines}, "r", columns=1, ticks=(0, 1, 64)).axes[0]
    across = ranks.transData.transform([(place, 0) for place in (0, 1, 64)])[:, 0]
    assert ranks.get_xscale() == "symlog"
    assert across[1] - across[0] > 0.05 * (across[2] - across[0])


def test_heat_maps_leave_out_what_is_missing_and_need_no_image():
    cells = {(4, 10): (3.0, True), (1, 10): (1.0, False), (4, 20): (2.0, False)}
    figure = draw_heat_maps({HOSTILE: cells, "b": cells}, "step", "r", "error, %")
    (mesh,) = figure.axes[0].collections
    assert mesh.get_array().mask.tolist() == [[False, True], [False, False]]
    assert mesh.get_clim() == (1, 3)
    (dots,) = figure.axes[0].get_lines()
    assert (dots.get_xdata().tolist(), dots.get_ydata().tolist()) == ([0.5], [1.5])
    assert b"<image" not in render(figure, "svg")
