import math

import pytest
from scipy import stats

from lora_ggpo.comparison.results import read_results
from lora_ggpo.errors import UserError
from lora_ggpo.report.analysis import analyse, rank_methods
from lora_ggpo.statistics.intervals import detectable_difference
from tests.report.grids import curve, run, write_full_grid, write_results

LORA, DORA, SAM = [0.80, 0.81, 0.82], [0.90, 0.912, 0.921], [0.801, 0.79, 0.833]


def _runs(metric, **methods):
    return [run(name, seed, {metric: v}) for name, values in methods.items() for seed, v in enumerate(values)]


def _only(folder):
    (setting,) = analyse(read_results(folder))
    return setting, {method.name: method for method in setting.methods}


def test_scores_differences_and_adjusted_p_values(tmp_path):
    _, methods = _only(write_results(tmp_path, _runs("accuracy", lora=LORA, dora=DORA, sam=SAM)))
    key = ("test", "accuracy")
    score = methods["dora"].scores[key]
    assert score.mean.mean == pytest.approx(0.911)
    assert score.difference.mean == pytest.approx(0.101)
    low, high = stats.ttest_rel(DORA, LORA).confidence_interval(0.95)
    assert score.difference.half == pytest.approx((high - low) / 2)
    raw = [stats.ttest_rel(other, LORA).pvalue for other in (DORA, SAM)]
    assert raw[0] < raw[1]
    assert score.p == pytest.approx(2 * raw[0])
    assert methods["sam"].scores[key].p == pytest.approx(raw[1])
    assert methods["lora"].scores[key].difference is None
    assert {name: method.verdicts["test"] for name, method in methods.items()} == {
        "lora": "baseline",
        "dora": "better than LoRA",
        "sam": "no difference found",
    }


def test_a_verdict_needs_the_adjusted_p_value(tmp_path):
    # Found alone, but not as the best of five.
    values = [0.812, 0.824, 0.840]
    p = stats.ttest_rel(values, LORA).pvalue
    assert 0.05 / 5 < p < 0.05
    _, alone = _only(write_results(tmp_path / "alone", _runs("accuracy", lora=LORA, dora=values)))
    others = {f"m{i}": SAM for i in range(4)}
    _, many = _only(write_results(tmp_path / "many", _runs("accuracy", lora=LORA, dora=values, **others)))
    assert alone["dora"].verdicts["test"] == "better than LoRA"
    assert many["dora"].verdicts["test"] == "no difference found"


@pytest.mark.parametrize("metric", ["log_loss", "loss", "perplexity"])
def test_lower_is_better(tmp_path, metric):
    setting, methods = _only(write_results(tmp_path, _runs(metric, lora=LORA, dora=DORA, sam=SAM), metric=metric))
    assert methods["dora"].verdicts["test"] == "worse than LoRA"
    assert setting.verdicts["test"].startswith("worse than LoRA: DoRA (+0.101")
    assert list(rank_methods([setting], metric)) == ["SAM", "LoRA", "DoRA"]


def test_differences_use_the_common_seeds(tmp_path):
    runs = [run("lora", seed, {"accuracy": v}) for seed, v in ((0, 0.1), (1, 0.81), (2, 0.82))]
    runs += [run("dora", seed, {"accuracy": v}) for seed, v in ((1, 0.84), (2, 0.83), (3, 0.1))]
    _, methods = _only(write_results(tmp_path, runs))
    difference = methods["dora"].scores["test", "accuracy"].difference
    assert (difference.n, difference.mean) == (2, pytest.approx(0.02))


def test_failed_runs_are_told_and_left_out(tmp_path):
    runs = _runs("accuracy", lora=LORA, dora=[*DORA, 0])
    runs[-1] = run("dora", 3, {}, failed="The loss is nan at step 3")
    runs += [run("sam", seed, {}, failed="The loss is inf at step 9") for seed in range(3)]
    curves = [curve("dora", seed, [0.1]) for seed in range(4)]
    setting, methods = _only(write_results(tmp_path, runs, curves=curves))
    assert methods["dora"].verdicts["test"] == "better than LoRA; 1 of 4 runs failed"
    assert methods["dora"].failed == {3: "The loss is nan at step 3"}
    assert len(methods["dora"].logs) == 3
    assert methods["sam"].verdicts["test"] == "failed: The loss is inf at step 9"
    assert methods["sam"].trainable is methods["sam"].time_ratio is None
    assert methods["sam"].scores == {}
    assert setting.verdicts["test"].startswith("better than LoRA: DoRA (+10.10 points); no result of SAM; this grid")
    # An untested method is no part of the correction, and ranks last.
    assert methods["dora"].scores["test", "accuracy"].p == pytest.approx(stats.ttest_rel(DORA, LORA).pvalue)
    assert rank_methods([setting], "accuracy") == {"DoRA": 1, "LoRA": 2, "SAM": 3}


def test_a_failed_baseline_leaves_nothing_to_compare(tmp_path):
    runs = [run("lora", 0, {}, failed="no"), run("dora", 0, {"accuracy": 0.9})]
    setting, methods = _only(write_results(tmp_path, runs))
    assert setting.verdicts["test"] == "nothing can be compared: no method has a seed in common with LoRA"
    assert methods["dora"].verdicts["test"] == "no seed in common with LoRA"


def test_one_seed_cannot_tell(tmp_path):
    setting, methods = _only(write_results(tmp_path, _runs("accuracy", lora=[0.1], dora=[0.9])))
    assert methods["dora"].verdicts["test"] == setting.verdicts["test"] == "one seed cannot tell"
    assert math.isnan(methods["dora"].scores["test", "accuracy"].p)


def test_equal_differences_prove_nothing(tmp_path):
    setting, methods = _only(write_results(tmp_path, _runs("accuracy", lora=[0.81, 0.84], dora=[0.82, 0.85])))
    assert methods["dora"].verdicts["test"] == "cannot tell: every seed differs by the same amount"
    assert "better" not in setting.verdicts["test"]


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_value_that_is_not_there(tmp_path, value):
    _, methods = _only(write_results(tmp_path, _runs("accuracy", lora=LORA, dora=[value] * 3)))
    assert methods["dora"].verdicts["test"] == "not measured"


def test_the_set_verdict_says_what_could_have_been_detected(tmp_path):
    values, other = [0.801, 0.79, 0.833], [0.79, 0.82, 0.82]
    setting, _ = _only(write_results(tmp_path, _runs("accuracy", lora=LORA, dora=values, sam=other)))
    spread = math.sqrt((stats.tvar([0.001, -0.02, 0.013]) + stats.tvar([-0.01, 0.01, 0.0])) / 2)
    points = 100 * detectable_difference(spread, 3, level=0.025)
    assert setting.verdicts == {
        "test": f"no difference found; this grid could have detected {points:.2f} points (80 % power)"
    }


def test_sets_that_are_compared(tmp_path):
    settings = analyse(read_results(write_full_grid(tmp_path)))
    assert [setting.name for setting in settings] == ["label_noise=0", "label_noise=0.25"]
    assert [setting.sets for setting in settings] == [("test", "amazon-reviews")] * 2
    assert [setting.trained for setting in settings] == [("train-noisy",)] * 2
    assert set(settings[0].methods[0].scores) == {
        (name, metric)
        for name in ("test", "amazon-reviews", "train-noisy")
        for metric in ("accuracy", "log_loss", "ece", "scaled_ece")
    }


def test_ratios_are_medians_of_ratios_at_the_same_seed(tmp_path):
    seconds = {"lora": (1.0, 2.0, 4.0), "dora": (1.5, 2.2, 40.0)}
    runs = [
        run(method, seed, {"accuracy": 0.5}, seconds=s, memory=int(100 * s))
        for method, of_seeds in seconds.items()
        for seed, s in enumerate(of_seeds)
    ]
    _, methods = _only(write_results(tmp_path, runs))
    assert methods["lora"].time_ratio == 1
    assert methods["dora"].time_ratio == pytest.approx(1.5)  # of 1.5, 1.1 and 10
    assert methods["dora"].memory_ratio == pytest.approx(1.5)
    assert methods["dora"].trainable == 1000


def test_memory_that_was_not_measured(tmp_path):
    _, methods = _only(write_results(tmp_path, _runs("accuracy", lora=LORA, dora=DORA)))
    assert methods["dora"].memory_ratio is None


def test_steps_to_the_baselines_level_at_half_its_steps(tmp_path):
    # The baseline's mean at step 2 is 0.6.
    losses = {"lora": ([0.9, 0.5, 0.3, 0.2], [0.7, 0.7, 0.3, 0.2]), "dora": ([0.6, 0.9, 0.9, 0.9],) * 2}
    losses |= {"sam": ([0.9, 0.9, 0.9, 0.9], [0.1, 0.9, 0.31, 0.29]), "ggpo": ([0.7] * 4,) * 2}
    runs = _runs("accuracy", **{method: [0.5, 0.6] for method in losses})
    curves = [curve(method, seed, one) for method, of_seeds in losses.items() for seed, one in enumerate(of_seeds)]
    _, methods = _only(write_results(tmp_path, runs, curves=curves))
    assert {name: method.steps_to_level for name, method in methods.items()} == {
        "lora": 2,
        "dora": 1,
        "sam": 1,
        "ggpo": None,
    }


def test_mean_ranks_run_over_settings_and_sets(tmp_path):
    values = {"lora": 0.9, "dora": 0.8, "sam": 0.8}  # a tie shares its ranks
    runs = [run(name, 0, {"accuracy": value}, "a", ("test", "x")) for name, value in values.items()]
    runs += [run("lora", 0, {"accuracy": 0.1}, "b"), run("dora", 0, {"accuracy": 0.2}, "b")]
    settings = analyse(read_results(write_results(tmp_path, runs)))
    expected = {"LoRA": pytest.approx(4 / 3), "DoRA": 2, "SAM": pytest.approx(8 / 3)}
    assert rank_methods(settings, "accuracy") == expected


def test_a_name_with_a_line_separator(tmp_path):
    name = "a\u2028b"
    folder = write_results(tmp_path, [run("lora", 0, {"accuracy": 0.5}, name)])
    (folder / "runs.jsonl").write_text((folder / "runs.jsonl").read_text().replace(r"\u2028", "\u2028"))
    assert [setting.name for setting in analyse(read_results(folder))] == [name]


def test_missing_and_damaged_results(tmp_path):
    with pytest.raises(UserError, match=r"facts\.json cannot be read"):
        read_results(tmp_path)
    write_results(tmp_path, _runs("accuracy", lora=LORA))
    (tmp_path / "curves.jsonl").write_text('{"setting": \n')
    with pytest.raises(UserError, match=r"curves\.jsonl, line 1 is damaged"):
        read_results(tmp_path)
    with pytest.raises(UserError, match="no run"):
        read_results(write_results(tmp_path / "empty", []))
