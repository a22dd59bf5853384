import numpy as np
from matplotlib.image import imread

from lora_ggpo.report.plots import curve, save_comparison_plot, save_training_plot

LOG = [
    {"step": 1, "loss": 1.0, "ggpo/gradient_share": 0.0},
    {"step": 2, "loss": 0.5, "ggpo/gradient_share": 0.4},
    {"step": 2, "validation/log_loss": 0.7},
]


def test_curve():
    assert curve(LOG, "loss") == ([1, 2], [1.0, 0.5])
    assert curve(LOG, "validation/log_loss") == ([2], [0.7])


def test_figures_are_drawn(tmp_path):
    save_training_plot(LOG, tmp_path / "a.png")
    save_training_plot([], tmp_path / "b.png")
    save_comparison_plot(
        {"x": [LOG, LOG], "y": [LOG]}, {"x": {"test": [0.8, 0.9]}, "y": {"test": [0.7]}}, tmp_path / "c.png"
    )
    for name in "abc":
        pixels = imread(tmp_path / f"{name}.png")
        assert pixels.shape[0] > 300
        assert np.ptp(pixels) > 0.9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]
