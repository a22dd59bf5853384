"""GLUE: two columns of text, class names, and test sets whose labels are withheld."""

import json
import warnings
from collections import Counter

import pytest

from lora_ggpo.data import DataConfig, LabelReader, digest, sources
from lora_ggpo.errors import UserError
from lora_ggpo.training.scorer import evaluation_sets
from tests.data import glue


def load(source, task="sst2", **settings):
    columns = dict(zip(("text", "text_pair"), glue.TASKS[task][0], strict=False))
    return LabelReader.load(DataConfig(source=str(source), **columns | settings))


def write(folder, **splits):
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("subset", glue.TASKS)
def test_the_validation_split_is_the_test_set_and_validation_comes_from_train(subset, form, tmp_path):
    source = glue.save(tmp_path / subset, subset, form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(source, subset, test_split="validation")
    columns, names = glue.TASKS[subset]
    assert loaded.labels == (names if form == "parquet" else [str(n) for n in range(len(names))])
    given = glue.splits(subset)
    held_out = given["validation_matched" if subset == "mnli" else "validation"]
    assert [len(loaded.train), len(loaded.validation), len(loaded.test)] == [54, 6, 9]
    for name, column in zip(("text", "text_pair"), columns, strict=False):
        assert loaded.test[name][:] == [row[column] for row in held_out]
        both = sorted([*loaded.train[name], *loaded.validation[name]])
        assert both == sorted(row[column] for row in given["train"])
    assert loaded.test["label"][:] == [row["label"] for row in held_out]
    assert ("text_pair" in loaded.train.column_names) == (len(columns) == 2)
    assert max(Counter(loaded.validation["label"]).values()) == 6 / len(names)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_test_split_with_withheld_labels_is_replaced_with_one_warning(form, tmp_path):
    source = glue.save(tmp_path / "sst2", "sst2", form)
    with pytest.warns(UserWarning, match=r"test[^ ]* has no labels and is left out: the validation split is") as caught:
        loaded = load(source)
    assert len(caught) == 1
    asked = load(source, test_split="validation")
    for split in ("train", "validation", "test"):
        assert digest(getattr(loaded, split)) == digest(getattr(asked, split))


def test_public_test_labels_are_used_unless_the_validation_split_is_asked_for(tmp_path):
    source = glue.save(tmp_path / "mrpc", "mrpc", "parquet")
    loaded = load(source, "mrpc")
    assert [len(loaded.train), len(loaded.validation), len(loaded.test)] == [60, 9, 5]
    assert len(load(source, "mrpc", test_split="validation").test) == 9


@pytest.mark.parametrize("nothing", [{}, {"label": None}, {"label": "-1"}, {"label": ""}])
def test_a_test_split_without_labels(nothing, tmp_path):
    unlabelled = [{"sentence": f"unknown {n}"} | nothing for n in range(3)]
    source = write(
        tmp_path, train=glue.rows("sst2", "train"), validation=glue.rows("sst2", "validation"), test=unlabelled
    )
    with pytest.warns(UserWarning, match=r"test\.jsonl has no labels"):
        assert len(load(source).test) == 9


def test_without_a_labelled_validation_split_the_test_set_comes_from_train(tmp_path):
    rows = glue.rows("sst2", "train")
    withheld = [row | {"label": -1} for row in glue.rows("sst2", "validation")]
    with pytest.warns(UserWarning, match=r"validation\.jsonl and .*test\.jsonl has no labels and is left out; what is"):
        loaded = load(write(tmp_path, train=rows, validation=withheld, test=withheld))
    assert [len(loaded.train), len(loaded.validation), len(loaded.test)] == [48, 6, 6]
    assert {row["sentence"] for row in withheld}.isdisjoint(loaded.test["text"])


def test_minus_one_is_a_label_where_the_training_data_has_it(tmp_path):
    rows = [{"sentence": f"text {n}", "label": (-1, 1)[n % 2]} for n in range(40)]
    negative = [{"sentence": f"bad {n}", "label": -1} for n in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(write(tmp_path, train=rows, validation=rows[:4], test=negative))
    assert loaded.labels == ["-1", "1"]
    assert loaded.test["label"][:] == [0, 0, 0, 0]


def test_labels_that_are_missing_in_places_are_errors_with_their_place(tmp_path):
    rows = glue.rows("sst2", "train")
    some = [*rows[:2], rows[2] | {"label": -1}]
    with pytest.raises(UserError, match=r"test\.jsonl, line 3: the label '-1' is not among .*, 0, 1\."):
        load(write(tmp_path, train=rows, test=some))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_mnli_mismatched_is_a_further_test_set_that_a_run_scores(form, tmp_path):
    loaded = load(glue.save(tmp_path / "mnli", "mnli", form), "mnli", test_split="validation")
    assert list(loaded.out_of_domain) == ["validation_mismatched"]
    mismatched = glue.rows("mnli", "validation_mismatched")
    assert loaded.out_of_domain["validation_mismatched"]["text_pair"][:] == [row["hypothesis"] for row in mismatched]
    assert {"test", "validation_mismatched"} <= set(evaluation_sets(loaded))


def test_the_hub_serves_the_same_rows_as_a_folder(tmp_path, monkeypatch):
    local = load(glue.save(tmp_path / "mnli", "mnli", "parquet"), "mnli", test_split="validation")
    monkeypatch.setattr(sources.datasets, "load_dataset", lambda name, subset: glue.as_datasets(subset))
    served = load("nyu-mll/glue", "mnli", subset="mnli", test_split="validation")
    assert served.test["id"][0] == "glue (mnli) validation_matched:1"
    for split in ("train", "validation", "test"):
        ours, theirs = (getattr(splits, split).remove_columns("id") for splits in (local, served))
        assert digest(ours) == digest(theirs)


def test_rows_of_one_premise_stay_on_one_side(tmp_path):
    rows = [
        {"premise": f"premise {n // 3}", "hypothesis": f"hypothesis {n}", "label": n % 3, "idx": n} for n in range(90)
    ]
    loaded = load(write(tmp_path, train=rows), "mnli")
    sides = [set(part["text"]) for part in (loaded.train, loaded.validation, loaded.test)]
    assert [len(side) for side in sides] == [24, 3, 3]
    assert len(set.union(*sides)) == 30
    assert len(loaded.train) == 72


def test_out_of_domain_pairs_take_the_labelled_split(tmp_path):
    source = write(tmp_path / "a", train=glue.rows("qnli", "train"))
    other = write(tmp_path / "b", validation=glue.rows("qnli", "validation"), test=glue.rows("qnli", "test"))
    extra = load(source, "qnli", out_of_domain=[str(other)]).out_of_domain["b"]
    assert extra["text_pair"][:] == [row["sentence"] for row in glue.rows("qnli", "validation")]


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"hypothesis": " "}, {}, r"train\.jsonl, line 1: column 'hypothesis' is empty"),
        ({}, {"text_pair": "hypotesis"}, r"did you mean 'hypothesis'\? Name the column with data\.text_pair\."),
        ({}, {"test_split": "validation"}, r"has no validation split to test on; leave out data\.test_split\."),
    ],
)
def test_what_does_not_fit_is_named(change, settings, message, tmp_path):
    first, *others = glue.rows("mnli", "train")
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, train=[first | change, *others]), "mnli", **settings)
