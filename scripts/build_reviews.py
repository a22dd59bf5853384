"""Make the bundled review data from the source distribution of vaderSentiment 3.3.2.

    python scripts/build_reviews.py [vaderSentiment-3.3.2.tar.gz]

Without a path the sdist is fetched with pip. It holds hutto_ICWSM_2014.tar.gz, in which each review sentence has the
mean of the sentiment ratings, from -4 to 4, that 15 to 29 people (20 for the Amazon sentences) gave it.

A sentence is kept if its mean rating is at least THRESHOLD away from 0: its sign is the label. The median standard
error of a mean rating is 0.2, so the label of a kept sentence is 2.5 such errors away from the other one.
Texts that differ in case and punctuation only count as one. Whole reviews go to one split, in the order of a hash.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SDIST_NAME = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
LICENSE = "vaderSentiment-3.3.2/LICENSE.txt"
OUT = Path(__file__).resolve().parents[1] / "src" / "lora_ggpo" / "data" / "bundled"
THRESHOLD = 0.5

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One rated file: its member in the archive, the prefix of its ids, and the least sizes of two splits."""

    name: str
    member: str
    prefix: str
    test: int
    validation: int


SOURCES = (
    Source("movie-reviews", "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", "movie", 1800, 900),
    Source("amazon-reviews", "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt", "amazon", 1000, 350),
)


def clean(text: str) -> str:
    """Undo the escapes of the source: HTML entities, '' for a double quote, and runs of spaces (once dashes)."""
    return " ".join(html.unescape(text).replace("''", '"').split())


def comparable(text: str) -> str:
    """Return the text in lower case, words only: texts equal in this form count as duplicates."""
    return " ".join(re.findall(r"\w+", text.lower()))


def group_of(identifier: str) -> str:
    """Return the review that a sentence belongs to: Amazon ids are review_sentence; movie snippets stand alone."""
    return identifier.partition("_")[0]


def read_rows(source: Source, content: bytes) -> Iterable[Row]:
    """Yield the clearly rated sentences with words in them: id, text, rating, label, and their review as "group"."""
    for line in content.decode("utf-8-sig").splitlines():
        identifier, rating_text, text = line.split("\t")
        rating, text = float(rating_text), clean(text)
        if abs(rating) >= THRESHOLD and re.search("[A-Za-z]", text):
            yield {
                "id": f"{source.prefix}-{identifier}",
                "text": text,
                "rating": round(rating, 4),
                "label": int(rating > 0),
                "group": f"{source.name}/{group_of(identifier)}",
            }


def without_duplicates(rows: Iterable[Row]) -> list[Row]:
    """Keep the first of the rows with one text, or none of them where their labels disagree."""
    first: dict[str, Row] = {}
    contradicted = set()
    for row in rows:
        key = comparable(row["text"])
        if first.setdefault(key, row)["label"] != row["label"]:
            contradicted.add(key)
    return [row for key, row in first.items() if key not in contradicted]


def add_splits(rows: list[Row], source: Source) -> list[Row]:
    """Give whole groups to test, then to validation, until each has its size; the rest is train."""
    sizes = Counter(row["group"] for row in rows)
    split_of = {}
    filled: Counter[str] = Counter()
    for group in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        split = "train"
        for name, size in (("test", source.test), ("validation", source.validation)):
            if filled[name] < size:
                split = name
                break
        split_of[group] = split
        filled[split] += sizes[group]
    return [
        {key: value for key, value in row.items() if key != "group"} | {"split": split_of[row["group"]]} for row in rows
    ]


def build(sdist: Path) -> dict[str, list[Row]]:
    """Return the rows of each bundled set, by name."""
    with tarfile.open(sdist) as outer:
        archive = io.BytesIO(_member(outer, ARCHIVE))
    with tarfile.open(fileobj=archive) as inner:
        rows = without_duplicates(row for source in SOURCES for row in read_rows(source, _member(inner, source.member)))
    return {
        source.name: add_splits([row for row in rows if row["group"].startswith(f"{source.name}/")], source)
        for source in SOURCES
    }


def write(name: str, rows: list[Row]) -> str:
    """Write the compressed JSONL file and return the sha256 of its content before compression.

    The digest is of the content because the compressed bytes depend on the zlib that made them.
    """
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (OUT / f"{name}.jsonl.gz").write_bytes(gzip.compress(content, compresslevel=9, mtime=0))
    return hashlib.sha256(content).hexdigest()


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        sys.exit(f"{name} is not a file in the archive")
    return file.read()


def _download(folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", folder]
    subprocess.run([*command, "vaderSentiment==3.3.2"], check=True)
    return Path(folder) / SDIST_NAME


def _checked(sdist: Path) -> Path:
    found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if found != SDIST_SHA256:
        sys.exit(f"{sdist} has sha256 {found}, not {SDIST_SHA256}: it is not the sdist of vaderSentiment 3.3.2")
    return sdist


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the bundled review data.")
    parser.add_argument("sdist", nargs="?", type=Path, help=f"path to {SDIST_NAME}; fetched with pip if left out")
    given = parser.parse_args().sdist
    with tempfile.TemporaryDirectory() as folder:
        sdist = _checked(given or _download(folder))
        sets = build(sdist)
        with tarfile.open(sdist) as outer:
            (OUT / "LICENSE.vaderSentiment.txt").write_bytes(_member(outer, LICENSE).replace(b"\r\n", b"\n") + b"\n")
    for name, rows in sets.items():
        digest = write(name, rows)
        print(f"{name}: {len(rows)} rows, sha256 of the content {digest}")
        for split in ("train", "validation", "test"):
            labels = Counter(row["label"] for row in rows if row["split"] == split)
            print(f"  {split:10} negative {labels[0]:5}  positive {labels[1]:5}  all {labels.total():5}")


if __name__ == "__main__":
    main()
