"""Regression: its metrics against hand computations, its loss against the definition, and whole runs on MiniLM."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import stats

from lora_ggpo.comparison.grid import plan_comparison
from lora_ggpo.data import DataConfig
from lora_ggpo.errors import UserError
from lora_ggpo.models.architecture import HEADED
from lora_ggpo.models.load import load_model
from lora_ggpo.recipe.recipe import load_recipe
from lora_ggpo.recipe.source import read_source
from lora_ggpo.report.comparison import write_report
from lora_ggpo.report.study import write_study_report
from lora_ggpo.tasks.regression import TargetReader, regression_metrics
from lora_ggpo.training.forecast import forecast
from lora_ggpo.training.merge import merge_run
from lora_ggpo.training.reuse import evaluate_run
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import recipe_text
from tests.report import grids
from tests.tasks.make import evaluate, task

QUIET = Reporter(quiet=True)
NOUNS = ("film", "script", "cast", "plot", "score")


# --- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    found = regression_metrics(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 5.0]))
    assert found["pearson"].value == pytest.approx(5.5 / math.sqrt(5 * 8.75))  # sums of products about the means
    assert found["spearman"].value == pytest.approx(1 - 6 * (0 + 1 + 1 + 0) / (4 * 15))
    assert found["mse"].value == pytest.approx((0 + 1 + 1 + 1) / 4)
    assert found["mse"].se == pytest.approx(0.5 / math.sqrt(4))
    assert {metric.n for metric in found.values()} == {4}


def test_correlations_are_those_of_scipy_with_ties():
    rng = np.random.default_rng(1)
    targets = np.round(rng.uniform(0, 5, 200) * 4) / 4
    predicted = np.round(targets + rng.normal(size=200), 1)
    found = regression_metrics(predicted, targets)
    assert found["pearson"].value == pytest.approx(stats.pearsonr(predicted, targets).statistic)
    assert found["spearman"].value == pytest.approx(stats.spearmanr(predicted, targets).statistic)


def test_standard_errors_of_normal_data_are_those_of_theory():
    rng = np.random.default_rng(0)
    n, rho = 3000, 0.6
    one = rng.normal(size=n)
    other = rho * one + math.sqrt(1 - rho**2) * rng.normal(size=n)
    found = regression_metrics(one, other)
    theory = (1 - rho**2) / math.sqrt(n)
    assert found["pearson"].se == pytest.approx(theory, rel=0.1)
    assert theory < found["spearman"].se < 1.3 * theory  # ranks of normal data lose about a tenth


@pytest.mark.parametrize("predicted", [[2.0, 2.0, 2.0], [0.1, 0.1, 0.1]])
def test_what_does_not_vary_has_no_correlation(predicted):
    found = regression_metrics(np.array(predicted), np.array([1.0, 2.0, 4.0]))
    assert found["pearson"].to_dict() == {"value": None, "se": None, "n": 3}
    assert found["spearman"].to_dict()["value"] is None
    assert found["mse"].value > 0


# --- data ----------------------------------------------------------------------------------------------------------


def write(path, scores, name="score"):
    rows = [
        {"text": f"The {NOUNS[n % 5]} is number {n}.", "other": f"A {NOUNS[n // 5 % 5]} of {n}.", name: score}
        for n, score in enumerate(scores)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "settings"), [("score", {}), ("label", {}), ("rating", {"label": "rating"})])
def test_targets_are_the_numbers_of_the_column(name, settings, tmp_path):
    given = [n / 4 if n % 2 else str(n / 4) for n in range(20)]
    config = DataConfig(source=str(write(tmp_path / "a.jsonl", given, name)), text_pair="other", **settings)
    splits = TargetReader.load(config)
    rows = [row for split in (splits.train, splits.validation, splits.test) for row in split]
    assert {row["id"]: row["target"] for row in rows} == {f"a.jsonl:{n + 1}": n / 4 for n in range(20)}
    assert splits.labels is None
    assert len(TargetReader.load(config.model_copy(update={"train_size": 7})).train) == 7


def test_the_sts_benchmark_as_it_is_distributed(tmp_path):
    for split, rows in (("train", 30), ("dev", 9), ("test", 5)):
        lines = [
            f'main-news\tmade-up\t2016\t{n:04}\t{n % 6 if n % 2 else f"{n % 5}.250"}\t"One {split} {n}.\tTwo {n}."'
            + "\tsource\tsource" * (n % 3 == 0)
            for n in range(rows)
        ]
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    splits = TargetReader.load(DataConfig(source=str(tmp_path), text="sentence1", text_pair="sentence2"))
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [30, 9, 5]
    assert splits.test["target"][:] == [0.25, 1.0, 2.25, 3.0, 4.25]
    assert splits.test["text"][0] == '"One test 0.'


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1, 2, "good", 3], r"a\.jsonl, line 3: 'good' in column 'score' is no finite number\."),
        ([1, None, 2, 3], r"line 2: None in column 'score'"),
        ([1, 2, True, 3], r"line 3: True in column 'score'"),
        ([1, 2, "nan", 3], r"line 3: 'nan' in column 'score'"),
        ([2.5] * 4, r"a\.jsonl: every row has 2\.5 in column 'score'; there is no target"),
    ],
)
def test_what_is_no_target_is_named(scores, message, tmp_path):
    with pytest.raises(UserError, match=message):
        TargetReader.load(DataConfig(source=str(write(tmp_path / "a.jsonl", scores))))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.label_noise=0.2", "data sets label_noise, which task regression does not look at"),
        ("task.template='Rate: {text}'", "sets template, which kind regression does not look at"),
        ("task.label_words=[a, b]", "sets label_words, which kind regression does not look at"),
    ],
)
def test_settings_for_classes_are_refused(setting, message, recipe):
    with pytest.raises(UserError, match=message):
        load_recipe(recipe, [setting])


# --- the loss and the scores ---------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_squared_error_and_scores_are_the_outputs(tmp_path):
    splits = TargetReader.load(DataConfig(source=str(write(tmp_path / "a.jsonl", range(30))), text_pair="other"))
    torch.manual_seed(0)
    model, tokenizer = load_model("minilm", HEADED, {"num_labels": 1, "problem_type": "regression"})
    assert model.config.num_labels == 1
    encoded = task(kind="regression", max_length=24).encode(splits.train, tokenizer)
    batch = task(kind="regression").collator(tokenizer)(encoded.to_list())
    targets = torch.tensor(splits.train["target"][:])
    with torch.no_grad():
        output = model(**batch)
        texts = zip(splits.train["text"], splits.train["text_pair"], strict=True)
        alone = torch.cat([model(**tokenizer(*pair, return_tensors="pt")).logits[0] for pair in texts]).double()
    assert output.loss.item() == pytest.approx(((alone - targets) ** 2).mean().item(), rel=1e-5)
    found = evaluate(task(kind="regression", max_length=24), model, encoded, tokenizer)
    assert found["mse"].value == pytest.approx(output.loss.item(), rel=1e-5)
    assert found["pearson"].value == pytest.approx(stats.pearsonr(alone, targets).statistic, abs=1e-4)


def test_training_starts_at_the_mean_of_the_targets():
    torch.manual_seed(0)
    model, tokenizer = load_model("minilm", HEADED, {"num_labels": 1, "problem_type": "regression"})
    batch = tokenizer(["The first.", "The second."], return_tensors="pt")
    with torch.no_grad():
        before = model(**batch).logits
        task(kind="regression").begin(model, Dataset.from_dict({"labels": [1.0, 2.0, 6.0]}))
        assert torch.allclose(model(**batch).logits, before + 3.0, atol=1e-6)


# --- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    return _recipe(tmp_path)


def _recipe(folder):
    source = write(folder / "rows.jsonl", [n % 5 + 0.25 * (n // 5 % 5) for n in range(60)])
    file = folder / "recipe.yaml"
    text = recipe_text(
        "minilm",  # predictions are kept in few digits, in which those of a random model are hardly told apart
        source,
        folder / "runs",
        task={"kind": "regression", "max_length": 24},
        data={"text_pair": "other"},
        adapter={"r": 4, "target_modules": ["query", "value"]},
        ggpo={"sigma": 0.03},
        training={"max_steps": 6, "per_device_train_batch_size": 8, "save_steps": 3},
        validate_every=3,
    )
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    file = _recipe(tmp_path_factory.mktemp("regression"))
    return file, train(load_recipe(file), QUIET)[0]


def test_a_run_keeps_predictions_that_give_its_scores(trained):
    _, run = trained
    kept = [json.loads(line) for line in (run.folder / "predictions" / "test.jsonl").read_text().splitlines()]
    predicted, targets = (np.array([row[name] for row in kept]) for name in ("predicted", "target"))
    scores = run.metrics["evaluation"]["test"]
    assert set(scores) == {"pearson", "spearman", "mse"}
    assert scores["mse"]["value"] == pytest.approx(np.mean((predicted - targets) ** 2), abs=1e-5)
    assert scores["pearson"]["value"] == pytest.approx(np.corrcoef(predicted, targets)[0, 1], abs=1e-5)
    assert set(run.metrics["evaluation"]) == {"validation", "test", "train"}
    assert [row["step"] for row in run.log if "validation/mse" in row] == [3, 6]
    assert run.log[0]["loss"] < 4  # the targets have a mean of 2.5 and a variance of 2.1


def test_a_run_is_evaluated_on_other_data_and_merged(trained, tmp_path):
    _, run = trained
    scores = evaluate_run(run.folder, reporter=QUIET)
    assert scores["test"]["mse"]["value"] == pytest.approx(run.metrics["evaluation"]["test"]["mse"]["value"], abs=1e-5)
    other = write(tmp_path / "other.jsonl", [1, 2, 3.5, 4], "label")
    (scores,) = evaluate_run(run.folder, str(other), reporter=QUIET).values()
    assert scores["mse"]["n"] == 4
    assert merge_run(run.folder, tmp_path / "merged").difference < 1e-4


def test_a_run_resumes(trained, recipe, monkeypatch):
    _, whole = trained

    def stop(callback, args, state, control, **_):
        if state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lora_ggpo.training.callbacks.RunCallback.on_step_begin", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(load_recipe(recipe), QUIET)
    resumed = train(load_recipe(recipe), QUIET)[0]
    assert resumed.metrics["evaluation"] == whole.metrics["evaluation"]


def test_a_run_is_planned(recipe):
    assert forecast(load_recipe(recipe), 1, QUIET).rows == 36


def test_trials_are_chosen_by_pearson_unless_told(recipe, tmp_path):
    arguments = (["lora", "ggpo"], 1, 1, [])
    assert plan_comparison(read_source(recipe), *arguments, None, tmp_path).metric == "pearson"
    assert plan_comparison(read_source(recipe), *arguments, "mse", tmp_path).metric == "mse"
    with pytest.raises(
        UserError, match=r"accuracy is not measured for task regression; choose one of pearson, spearman"
    ):
        plan_comparison(read_source(recipe), *arguments, "accuracy", tmp_path)


def _runs(setting=""):
    scores = {"lora": 0.80, "ggpo": 0.84}
    return [
        grids.run(
            method,
            seed,
            {"pearson": r + seed**place / 1000, "spearman": r, "mse": 1 - r},
            setting,
            ("validation", "test"),
        )
        for place, (method, r) in enumerate(scores.items(), 1)
        for seed in range(3)
    ]


def test_reports_speak_of_correlation_and_not_of_classes(tmp_path):
    compared = write_report(grids.write_results(tmp_path / "compare", _runs(), metric="pearson"))
    table = (tmp_path / "compare" / "table.md").read_text()
    assert "100 × Pearson ↑" in table
    assert "mean squared error ↓" in table
    assert "80.10" in table
    assert compared.verdicts[0].startswith("test: better than LoRA: GGPO (relative rule) (+4.07 points)")
    settings = {f"r={r}": {"adapter.r": r} for r in (1, 4)}
    folder = grids.write_results(
        tmp_path / "study", [run for name in settings for run in _runs(name)], metric="pearson"
    )
    facts = json.loads((folder / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps(facts | {"settings": settings}))
    write_study_report(folder)
    pages = [(tmp_path / "compare" / "report.html").read_text(), (folder / "report.html").read_text()]
    for page in [*pages, table, (folder / "report.md").read_text()]:
        assert not any(word in page.lower() for word in ("accuracy", "log-loss", "labels as given", "mcc"))
    assert "mean squared error" in pages[1]
