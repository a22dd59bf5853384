"""Long files of JSON lines are read piece by piece and kept in files: the same rows, splits, warnings and errors."""

import json
import tempfile
import warnings

import numpy as np
import pyarrow
import pytest
from datasets import Dataset

from lora_ggpo.data import DataConfig, files, spool
from lora_ggpo.data.completion import CompletionReader
from lora_ggpo.data.files import LongTable, read_file
from lora_ggpo.data.labels import LabelReader
from lora_ggpo.data.load import digest
from lora_ggpo.data.preference import PreferenceReader
from lora_ggpo.data.spool import numbers, spooled, taken
from lora_ggpo.errors import UserError


def said(*turns):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


PLAIN = [{"prompt": f"p{n % 30}", "completion": f"c{n}"} for n in range(50)]
CHATS = [{"messages": said(f"q{n}", f"a{n}") + said("more", "said") * (n == 33)} for n in range(50)]
PAIRS = [{"prompt": f"p{n}", "chosen": "a", "rejected": "ab"[n > 2]} for n in range(50)]
SOURCES = {
    "plain": (CompletionReader, PLAIN, {}),
    "ids": (CompletionReader, [{"id": n, **row} for n, row in enumerate(PLAIN)], {}),
    "one without id": (CompletionReader, [{**row, "id": None if n == 40 else n} for n, row in enumerate(PLAIN)], {}),
    "few system prompts": (
        CompletionReader,
        [{**row, **({"system": "Be brief.", "rejected": "no"} if n in (3, 41) else {})} for n, row in enumerate(PLAIN)],
        {},
    ),
    "a weight": (CompletionReader, [*CHATS, {"messages": [*said("q", "a"), {**said("", "y")[1], "weight": 0}]}], {}),
    "tools": (CompletionReader, [*CHATS, {"messages": said("q", "a"), "tools": '[{"name": "f"}]'}], {}),
    "single turns": (CompletionReader, CHATS, {"single_turn": True}),
    "ignored": (CompletionReader, [{**row, "system": "x"} for row in PLAIN], {"ignore": ["system"], "train_size": 20}),
    "preferences": (PreferenceReader, PAIRS, {}),
    "labels": (LabelReader, [{"text": f"t{n}", "label": "ab"[n % 3 % 2]} for n in range(50)], {"label_noise": 0.2}),
}  # fmt: skip


@pytest.fixture
def long(monkeypatch, tmp_path_factory):
    """All files of JSON lines are long, pieces have 7 rows, and 500 bytes are held; returns where the rest goes."""
    folder = tmp_path_factory.mktemp("mapped")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(files, "LONG", 0)
    monkeypatch.setattr(files, "PIECE", 7)
    monkeypatch.setattr(spool, "PIECE", 7)
    monkeypatch.setattr(spool, "HELD", 500)
    return folder


def loaded(name, path):
    reader, rows, settings = SOURCES[name]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        splits = reader.load(DataConfig(source=str(path), **settings))
    return splits, sorted(str(one.message) for one in said)


@pytest.mark.parametrize("name", SOURCES)
def test_a_long_file_gives_what_a_short_one_does(name, tmp_path, request):
    short, warned = loaded(name, tmp_path / "rows.jsonl")
    folder = request.getfixturevalue("long")
    assert isinstance(read_file(tmp_path / "rows.jsonl"), LongTable)
    long, also_warned = loaded(name, tmp_path / "rows.jsonl")
    for split in ("train", "validation", "test"):
        one, other = getattr(short, split), getattr(long, split)
        assert one.to_list() == other.to_list()
        assert one.features == other.features
        assert digest(one) == digest(other)
    assert warned == also_warned
    if name in ("few system prompts", "single turns", "preferences"):
        assert len(warned) == 1
    assert not list(folder.iterdir())


BROKEN = {
    "JSON": (b'{"prompt": ', "line 41: malformed JSON"),
    "a list": (b"[1]", "line 41: a JSON object"),
    "bytes": (b'{"prompt": "\xff", "completion": "x"}', "line 41: the text is not UTF-8"),
    "blank": (b'{"prompt": " ", "completion": "x"}', "line 41: column 'prompt' is empty"),
    "no text": (b'{"prompt": "p", "completion": 7}', "line 41: column 'completion' must hold text"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_errors_name_the_line(name, long, tmp_path):
    line, message = BROKEN[name]
    rows = [json.dumps(row).encode() for row in PLAIN]
    (tmp_path / "rows.jsonl").write_bytes(b"\r\n".join([*rows[:40], line, *rows[40:]]))
    with pytest.raises(UserError, match=rf"rows\.jsonl, {message}"):
        CompletionReader.load(DataConfig(source=str(tmp_path / "rows.jsonl")))


def test_what_is_no_json_lines_is_read_whole(long, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PLAIN, indent=1))
    assert not isinstance(read_file(path), LongTable)
    assert len(read_file(path)) == 50


def test_rows_are_held_or_mapped(long):
    pieces = [pyarrow.table({"n": range(begin, begin + 10), "text": ["word"] * 10}) for begin in range(0, 1000, 10)]
    before = pyarrow.total_allocated_bytes()
    mapped = spooled(iter(pieces))
    assert mapped["n"][:] == list(range(1000))
    assert pyarrow.total_allocated_bytes() - before < 2000
    chosen = np.array([0, 3, 7, 500, 999])
    assert taken(mapped, chosen)["n"][:] == chosen.tolist()
    assert numbers(mapped.select([5, 2]), "n").tolist() == [5, 2]
    assert Dataset.from_list(mapped.to_list()).to_list() == mapped.to_list()
