"""From files and bundled sets to splits: what comes out, and what is said when nothing can."""

import hashlib
import json
import os
from collections import Counter

import datasets
import pandas
import pytest

from lora_ggpo.data import CompletionReader, DataConfig, LabelReader, digest, sources
from lora_ggpo.errors import UserError

ROWS = [{"text": f"text {n}", "label": ["bad", "good"][n % 2]} for n in range(40)]


@pytest.fixture
def save(tmp_path):
    """Write rows as JSON lines and return the path as text."""

    def write(rows, name="reviews.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return str(path)

    return write


def classify(source, **settings):
    return LabelReader.load(DataConfig(source=source, **settings))


def sets(splits):
    return [splits.train, splits.validation, splits.test]


def with_row(row, number=4):
    return [*ROWS[: number - 1], row, *ROWS[number - 1 :]]


def test_a_file_without_splits_is_split(save):
    splits = classify(save(ROWS), validation_fraction=0.2, test_fraction=0.3)
    assert [len(data) for data in sets(splits)] == [20, 8, 12]
    assert splits.labels == ["bad", "good"]
    assert splits.train.column_names == ["id", "text", "label", "noisy"]
    assert splits.test.column_names == ["id", "text", "label"]
    assert sorted(text for data in sets(splits) for text in data["text"]) == sorted(row["text"] for row in ROWS)
    for data in sets(splits):
        assert Counter(data["label"])[0] == len(data) / 2
        for row in data:
            line = int(row["id"].removeprefix("reviews.jsonl:"))
            assert ROWS[line - 1] == {"text": row["text"], "label": splits.labels[row["label"]]}


def test_splits_depend_on_the_seed_alone(save):
    path = save(ROWS)
    first, same, other = classify(path), classify(path), classify(path, split_seed=1)
    assert [digest(data) for data in sets(first)] == [digest(data) for data in sets(same)]
    assert digest(first.test) != digest(other.test)


def test_a_folder_keeps_its_splits_and_a_missing_one_comes_from_train(save, tmp_path):
    save(ROWS, "set/train.jsonl")
    pandas.DataFrame(ROWS[:6]).to_csv(tmp_path / "set" / "test.csv", index=False)
    splits = classify(str(tmp_path / "set"))
    assert [len(data) for data in sets(splits)] == [36, 4, 6]
    assert splits.test["text"][:] == [row["text"] for row in ROWS[:6]]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([10, 9, 2], ["2", "9", "10"]),
        (["10", "9", "2"], ["2", "9", "10"]),
        ([1.0, 2.0, -1.0], ["-1", "1", "2"]),
        (["1.0", "0.0", "1"], ["0", "1"]),
        ([True, False, True], ["false", "true"]),
        (["b", "a", " c "], ["a", "b", "c"]),
    ],
)
def test_labels_of_any_kind_become_sorted_classes(values, labels, save):
    rows = [{"text": f"text {n}", "label": values[n % 3]} for n in range(30)]
    splits = classify(save(rows))
    assert splits.labels == labels
    expected = {row["text"]: row["label"] for row in rows}
    for row in splits.train:
        given = expected[row["text"]]
        name = splits.labels[row["label"]]
        assert name == str(given).strip().lower() or float(name) == float(given)


def test_class_names_of_parquet_are_kept_in_their_order(tmp_path):
    features = datasets.Features({"body": datasets.Value("string"), "y": datasets.ClassLabel(names=["z", "a", "q"])})
    data = datasets.Dataset.from_dict({"body": [str(n) for n in range(20)], "y": [0, 1] * 10}, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    splits = classify(str(tmp_path / "a.parquet"), text="body", label="y")
    assert splits.labels == ["z", "a", "q"]
    assert {int(row["text"]) % 2 == row["label"] for row in splits.train} == {True}


def test_train_size_is_stratified_and_nested():
    small = classify("movie-reviews", train_size=500)
    large = classify("movie-reviews", train_size=1000)
    assert (len(small.train), len(large.train)) == (500, 1000)
    assert set(small.train["id"]) < set(large.train["id"])
    assert Counter(small.train["label"])[1] == pytest.approx(500 * 3648 / 7370, abs=1)
    assert digest(small.test) == digest(large.test)


def test_label_noise_touches_train_alone_and_is_marked():
    clean = classify("movie-reviews", train_size=501)
    noisy = classify("movie-reviews", train_size=501, label_noise=0.2, noise_seed=3)
    more = classify("movie-reviews", train_size=501, label_noise=0.4, noise_seed=3)
    assert not any(clean.train["noisy"])
    changed = [a != b for a, b in zip(clean.train["label"], noisy.train["label"], strict=True)]
    assert changed == noisy.train["noisy"][:]
    assert sum(changed) == 100
    other = classify("movie-reviews", train_size=501, label_noise=0.2, noise_seed=4)
    assert other.train["id"][:] == noisy.train["id"][:]
    assert other.train["noisy"][:] != changed
    assert all(b for a, b in zip(noisy.train["noisy"], more.train["noisy"], strict=True) if a)
    assert digest(clean.test) == digest(noisy.test)
    assert digest(clean.validation) == digest(noisy.validation)


def test_digest_is_the_sha256_of_the_rows():
    data = datasets.Dataset.from_dict({"text": ["é", "b"], "label": [0, 1]})
    lines = '{"label":0,"text":"é"}\n{"label":1,"text":"b"}\n'
    assert digest(data) == hashlib.sha256(lines.encode()).hexdigest()


def test_out_of_domain_takes_the_test_split_or_the_whole_file(save):
    rows = [{"text": row["text"], "label": {"bad": "negative", "good": "positive"}[row["label"]]} for row in ROWS]
    path = save(rows)
    name = os.path.basename(path)
    splits = classify("movie-reviews", out_of_domain=["amazon-reviews", path])
    assert {name: len(data) for name, data in splits.out_of_domain.items()} == {"amazon-reviews": 1017, name: 40}
    assert splits.out_of_domain[name]["label"][:] == [0, 1] * 20


def test_nothing_is_written_beside_the_data(save, tmp_path, monkeypatch):
    path = save(ROWS)
    monkeypatch.chdir(tmp_path)
    classify(path)
    assert [file.name for file in tmp_path.iterdir()] == ["reviews.jsonl"]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            ROWS,
            {"text": "txet"},
            r"has no column 'txet', its columns are text, label; did you mean 'text'\? Name.*data",
        ),
        (ROWS, {"label": "y"}, r"has no column 'y', its columns are text, label\. Name the column with data\.label\."),
        ([], {}, r"reviews\.jsonl has no rows"),
        ([{"text": f"{n}", "label": "a"} for n in range(9)], {}, r"every row has the label 'a'.*at least two classes"),
        (ROWS[:2], {}, r"has 2 different texts, too few to split into train, validation and test\."),
        (with_row({"text": "", "label": "bad"}), {}, r"reviews\.jsonl, line 4: column 'text' is empty"),
        (with_row({"text": float("nan"), "label": "bad"}), {}, r"reviews\.jsonl, line 4: column 'text' has no value"),
        (with_row({"label": "bad"}), {}, r"reviews\.jsonl, line 4: column 'text' has no value"),
        (with_row({"text": 5, "label": "bad"}), {}, r"line 4: column 'text' must hold text, but here it holds int 5\."),
        (with_row({"text": "\ud800", "label": "bad"}), {}, r"line 4: column 'text' holds half of a surrogate pair"),
        (with_row({"text": "x", "label": None}), {}, r"reviews\.jsonl, line 4: column 'label' has no value"),
        (with_row({"text": "x", "label": " "}), {}, r"reviews\.jsonl, line 4: column 'label' is empty"),
        (with_row({"text": "x", "label": 0.5}), {}, r"line 4: label 0\.5 in column 'label' is a fraction, not a class"),
        (with_row({"text": "x", "label": "0.5"}), {}, r"line 4: label 0\.5 in column 'label' is a fraction"),
        (with_row({"text": "x", "label": float("inf")}), {}, r"line 4: label inf in column 'label' is a fraction"),
        (with_row({"text": "x", "label": ["bad"]}), {}, r"line 4: column 'label' must hold text, but .* list"),
        (ROWS, {"train_size": 33}, r"data\.train_size is 33, but .* gives 32 rows to train on; ask for at most 32\."),
        (
            ROWS,
            {"out_of_domain": ["amazon-reviews"]},
            r"amazon-reviews.jsonl, line \d+: the label '\w+' is not among .*, bad, good\.",
        ),
    ],
)
def test_unusable_rows_are_reported_in_one_sentence(rows, settings, message, save):
    with pytest.raises(UserError, match=message) as raised:
        classify(save(rows), **settings)
    assert "\n" not in str(raised.value)


def test_a_label_that_train_does_not_have(save, tmp_path):
    save(ROWS, "set/train.jsonl")
    save([*ROWS[:3], {"text": "new", "label": "odd"}], "set/test.jsonl")
    with pytest.raises(UserError, match=r"test\.jsonl, line 4: the label 'odd' is not among .*, bad, good\."):
        classify(str(tmp_path / "set"))


def test_a_folder_without_train(save, tmp_path):
    save(ROWS, "set/test.jsonl")
    with pytest.raises(UserError, match=r"set has no train split, only test\."):
        classify(str(tmp_path / "set"))


def test_a_label_outside_the_declared_classes(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": list("abcdefgh"), "label": [0, 1] * 3 + [0, -1]}, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"a\.parquet, row 8: label -1 in column 'label' is outside 0 to 1 \(no, yes\)"):
        classify(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/reviews.csv", r"nowhere/reviews\.csv does not exist"),
        ("./reviews", r"reviews does not exist"),
        ("movie_reviews", r"no bundled data 'movie_reviews'; did you mean 'movie-reviews'\?"),
    ],
)
def test_sources_that_do_not_exist(source, message):
    with pytest.raises(UserError, match=message):
        classify(source)


def test_subset_of_a_bundled_set():
    with pytest.raises(UserError, match=r"data\.subset is for hub data, but movie-reviews is bundled"):
        classify("movie-reviews", subset="sst2")


def test_an_unreachable_hub_says_to_give_a_file(monkeypatch):
    def refuse(*arguments):
        raise ConnectionError("Couldn't reach 'some/data' on the Hub\nmore lines")

    monkeypatch.setattr(sources.datasets, "load_dataset", refuse)
    with pytest.raises(
        UserError, match=r"some/data \(small\) is no local file .* \(Couldn't reach [^\n]*; .* give a local file"
    ):
        classify("some/data", subset="small")


def test_a_mistyped_folder_is_told_from_the_one_beside_it(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise ConnectionError("no way out")

    (tmp_path / "glue" / "trec6").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"did you mean 'glue/trec6'\? Otherwise check the name"):
        classify("glue/trec7")
    with pytest.raises(UserError, match=r"\(no way out\); check the name"):
        classify("elsewhere/trec7")


def test_hub_data_keeps_class_names_and_replaces_a_withheld_test_split(monkeypatch):
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )

    def data(labels):
        columns = {"sentence": [f"{len(labels)} {n}" for n in range(len(labels))], "label": labels}
        return datasets.Dataset.from_dict(columns, features=features)

    served = datasets.DatasetDict(train=data([0, 1] * 20), validation=data([1, 0, 1]), test=data([-1] * 5))
    monkeypatch.setattr(sources.datasets, "load_dataset", lambda name, subset: served)
    with pytest.warns(UserWarning, match=r"glue \(sst2\) test has no labels"):
        splits = classify("glue", subset="sst2", text="sentence")
    assert splits.labels == ["negative", "positive"]
    assert [len(part) for part in sets(splits)] == [36, 4, 3]
    assert splits.test["id"][0] == "glue (sst2) validation:1"


def complete(path, **settings):
    return CompletionReader.load(DataConfig(source=path, **settings))


def test_prompts_and_completions(save):
    path = save([{"q": f"{n}+1?", "a": str(n + 1), "id": n} for n in range(20)])
    splits = complete(path, prompt="q", completion="a", train_size=10)
    assert splits.labels is None
    assert [len(data) for data in sets(splits)] == [10, 2, 2]
    assert splits.train.column_names == ["id", "prompt", "completion"]
    assert all(row["completion"] == str(int(row["id"]) + 1) for row in splits.train)


def test_alpaca_columns(save):
    rows = [{"instruction": f"Do {n}", "input": "with this" if n % 2 else "", "output": "done"} for n in range(10)]
    prompts = {row["id"]: row["prompt"] for data in sets(complete(save(rows))) for row in data}
    assert prompts["reviews.jsonl:1"] == "Do 0"
    assert prompts["reviews.jsonl:2"] == "Do 1\n\nwith this"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_chats_in_both_spellings(suffix, tmp_path):
    chats = [[{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": "ho"}] for n in range(10)]
    spelt = [[{"from": "human", "value": f"hi {n}"}, {"from": "gpt", "value": "ho"}] for n in range(10)]
    loaded = []
    for column, values in (("messages", chats), ("conversations", spelt)):
        frame, path = pandas.DataFrame({column: values}), tmp_path / f"{column}.{suffix}"
        frame.to_parquet(path) if suffix == "parquet" else frame.to_json(path, orient="records", lines=True)
        splits = complete(str(path))
        loaded.append(sorted((row["messages"] for data in sets(splits) for row in data), key=str))
    assert loaded[0] == loaded[1] == chats


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, r"line 1: column 'messages' must hold a list of messages"),
        ({"messages": ["hi"]}, r'line 1: each message in \'messages\' must have "role" and "content"'),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"line 1: the role 'bot' in 'messages' is none of system"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"line 1: the role \['user'\]"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"line 1: .* has no assistant message to learn from"),
        ({"messages": [{"role": "assistant", "content": ""}]}, r"line 1: column 'messages\.content' is empty"),
        ({"prompt": "x", "completion": ""}, r"line 1: column 'completion' is empty"),
        ({"prompt": "x", "answer": "y"}, r"has no column 'completion', its columns are prompt, answer"),
        ({"prompt": "x", "completion": "y"}, r"has 1 different texts, too few to split"),
    ],
)
def test_unusable_completions(row, message, save):
    with pytest.raises(UserError, match=message):
        complete(save([row]))


def test_a_second_text_is_read_where_the_source_has_one(save):
    source = save([{**row, "text_pair": f"and {row['text']}"} for row in ROWS])
    for settings in ({}, {"text_pair": "text_pair"}):
        train = classify(source, **settings).train
        assert train["text_pair"][:] == [f"and {text}" for text in train["text"]]
    assert "text_pair" not in classify(source, ignore=["text_pair"]).train.column_names
    with pytest.raises(UserError, match=r"has no column 'second', which data\.ignore names; leave it out\."):
        classify(source, ignore=["second"])
    assert classify(source, text_pair="text").train["text_pair"][:] == classify(source).train["text"][:]
