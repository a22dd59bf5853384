"""The bundled reviews are what the README beside them says, and nothing leaks between their splits."""

import gzip
import hashlib
import re
import shutil
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

import lora_ggpo.data.bundled as bundled
from lora_ggpo.data import BUNDLED, DataConfig, LabelReader, digest
from lora_ggpo.data.bundled import read_bundled
from lora_ggpo.errors import UserError

FOLDER = Path(bundled.__file__).parent / "bundled"
CONTENT_SHA256 = {
    "movie-reviews": "60a147f589b939e75f526f1cebd0a06144a7824d06b07b8a1cb51b40e2772617",
    "amazon-reviews": "83358dc157ba319d8a5e9d38e046ad4804564b66afa4dabecde0b99e6c0218c3",
}
COUNTS = {  # split: negative, positive
    "movie-reviews": {"train": (3722, 3648), "validation": (448, 452), "test": (905, 895)},
    "amazon-reviews": {"train": (686, 909), "validation": (128, 227), "test": (416, 601)},
}
DIGESTS = {  # of the loaded splits: train, validation, test
    "movie-reviews": [
        "af762c4ee88bdae5b9e94a00f315c66c188b183bb88544367af8177e9aadd472",
        "b3de900175844d4772799384c9ea3b0abfcf331d0c5dd418fa23d8429f4720af",
        "216272a288f8578f653d62b8d9d47eb6309bd6deb2adb47ce51e51f22ce0db1b",
    ],
    "amazon-reviews": [
        "f00a9bd3724dd7f362f9989046c9276b3cf3181c650176550deb69bbca8eacbc",
        "4c05d5ea22b34baaeb635b930f37878034ec2b5b66620632bcc9f7531b18a5b7",
        "69cb2da6f3902663b5d614c7486dd7ca5e88e0b34977d86acb5c45d0cb4c08cc",
    ],
}


def words(text):
    return tuple(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("name", CONTENT_SHA256)
def test_the_files_are_the_ones_described(name):
    content = gzip.decompress((FOLDER / f"{name}.jsonl.gz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == CONTENT_SHA256[name] == BUNDLED[name]
    assert CONTENT_SHA256[name] in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_splits_and_classes(name):
    splits = LabelReader.load(DataConfig(source=name))
    assert splits.labels == ["negative", "positive"]
    for split, counts in COUNTS[name].items():
        found = Counter(getattr(splits, split)["label"])
        assert (found[0], found[1]) == counts


@pytest.mark.parametrize("name", DIGESTS)
def test_loaded_splits_are_the_same_everywhere(name):
    splits = LabelReader.load(DataConfig(source=name))
    assert [digest(data) for data in (splits.train, splits.validation, splits.test)] == DIGESTS[name]


def test_no_text_occurs_twice_in_any_split_or_set():
    texts = [words(text) for name in BUNDLED for table in read_bundled(name).values() for text in table.columns["text"]]
    assert len(texts) == len(set(texts))


def test_sentences_of_one_review_stay_in_one_split():
    reviews = [
        {identifier.partition("_")[0] for identifier in table.columns["id"]}
        for table in read_bundled("amazon-reviews").values()
    ]
    assert len(set.union(*reviews)) > 250
    for one, other in combinations(reviews, 2):
        assert not one & other


@pytest.mark.parametrize("name", BUNDLED)
def test_labels_follow_ratings_outside_the_neutral_band(name):
    for table in read_bundled(name).values():
        for rating, label in zip(table.columns["rating"], table.columns["label"], strict=True):
            assert 0.5 <= abs(rating) <= 4
            assert label == (rating > 0)


@pytest.mark.parametrize("name", BUNDLED)
def test_texts_are_clean(name):
    for table in read_bundled(name).values():
        for text in table.columns["text"]:
            assert text == " ".join(text.split())
            assert not re.search(r"&\w+;|''|\ufffd|Ã|<br", text)


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_a_damaged_installation_is_reported(damage, tmp_path, monkeypatch):
    copy = tmp_path / "bundled"
    shutil.copytree(FOLDER, copy)
    file = copy / "movie-reviews.jsonl.gz"
    content = file.read_bytes()
    if damage == "altered":
        file.write_bytes(gzip.compress(gzip.decompress(content).replace(b'"label": 1', b'"label": 0', 1)))
    elif damage == "truncated":
        file.write_bytes(content[:1000])
    else:
        file.unlink()
    monkeypatch.setattr(bundled.resources, "files", lambda package: tmp_path)
    with pytest.raises(UserError, match=r"movie-reviews\.jsonl\.gz is missing or altered; install lora-ggpo again\."):
        read_bundled("movie-reviews")
