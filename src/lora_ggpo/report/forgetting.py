"""What each method costs in other text, beside what it gains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from lora_ggpo.data.bundled import GENERAL_TEXT
from lora_ggpo.report.analysis import TEST, SettingResult
from lora_ggpo.report.calibration import score_cells
from lora_ggpo.report.plots import draw_prices
from lora_ggpo.report.tables import TextTable
from lora_ggpo.statistics.metrics import METRICS

FORGETTING_CAPTION = {
    "forgetting": (
        "Test score against the rise of the loss on general text by training, each with its 95 % t interval: the "
        "farther left, the less is forgotten. The Pareto front joins the methods that none beats in both means; it is "
        "not a test."
    ),
}
_RISE = (GENERAL_TEXT, "forgetting")
_LOSSES = tuple((GENERAL_TEXT, name) for name in ("base_loss", "loss"))


def forgetting_tables(setting: SettingResult) -> Iterator[TextTable]:
    """One, if it was measured: the rise of the loss, its difference to the baseline's, the losses before and after."""
    if any(_RISE in method.scores for method in setting.methods):
        rows = tuple(
            (
                method.title,
                *score_cells(method, _RISE),
                method.scores[_RISE].verdict if _RISE in method.scores else "not measured",
                *(score_cells(method, key)[0] for key in _LOSSES),
            )
            for method in setting.methods
        )
        header = ("method", METRICS["forgetting"].heading, "difference", "p", "verdict", "loss before", "loss after")
        yield TextTable("general text: forgetting", header, rows)


def draw_forgetting(settings: Sequence[SettingResult], name: str, highlighted: Sequence[str]) -> dict[str, Figure]:
    """The metric `name` on the test set over the rise of the loss; nothing where that was not measured."""
    metric, key = METRICS[name], (TEST, name)
    points = {
        setting.name: {
            method.title: (method.scores[_RISE].mean, metric.scaled(method.scores[key].mean))
            for method in setting.methods
            if _RISE in method.scores and key in method.scores
        }
        for setting in settings
    }
    if not any(points.values()):
        return {}
    labels = "rise of the loss on general text, nats a token", f"{TEST} {metric.shown_as}"
    return {"forgetting": draw_prices(points, highlighted, *labels, higher_is_better=metric.higher_is_better)}
