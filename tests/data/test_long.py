"""Long files are read piece by piece and kept in files: the same rows, splits, warnings and errors."""

import gzip
import json
import tempfile
import warnings

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from lora_ggpo.data import DataConfig, files, long, parquet, spool, table
from lora_ggpo.data.completion import CompletionReader
from lora_ggpo.data.files import read_file
from lora_ggpo.data.labels import LabelReader
from lora_ggpo.data.load import digest
from lora_ggpo.data.long import LongTable
from lora_ggpo.data.preference import PreferenceReader
from lora_ggpo.data.spool import numbers, spooled, taken
from lora_ggpo.data.table import Table
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
def pieces(monkeypatch, tmp_path_factory):
    """All files are long, pieces have 7 rows, and 500 bytes are held; returns where the rest goes."""
    folder = tmp_path_factory.mktemp("mapped")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(long, "LONG", 0)
    monkeypatch.setattr(spool, "HELD", 500)
    for module in (long, parquet, spool, table):
        monkeypatch.setattr(module, "PIECE", 7)
    return folder


def write_lines(rows, path):
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")


def packed(kind):
    """A writer of files of that kind in a .gz."""

    def write(rows, path):
        plain = path.with_name("unpacked")
        WRITERS[kind](rows, plain)
        path.write_bytes(gzip.compress(plain.read_bytes()))

    return write


WRITERS = {
    "jsonl": write_lines,
    "csv": lambda rows, path: pandas.DataFrame(rows).to_csv(path, index=False, lineterminator="\r\n"),
    "tsv": lambda rows, path: pandas.DataFrame(rows).to_csv(path, index=False, sep="\t"),
    "parquet": lambda rows, path: pyarrow.parquet.write_table(
        pyarrow.Table.from_struct_array(pyarrow.array(rows)), path, row_group_size=20
    ),
}
PACKED = ("jsonl", "csv", "tsv")
CASES = [("plain", f"{kind}.gz") for kind in PACKED]
CASES += [
    (name, kind)
    for name, (_, rows, _) in SOURCES.items()
    for kind in WRITERS
    if kind in ("jsonl", "parquet") or not any(isinstance(value, list) for value in rows[0].values())
]


def loaded(name, path):
    reader, _, settings = SOURCES[name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        splits = reader.load(DataConfig(source=str(path), **settings))
    return splits, sorted(str(one.message) for one in said)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_long_file_gives_what_a_short_one_does(name, kind, tmp_path, request, monkeypatch):
    path = tmp_path / f"rows.{kind}"
    write = packed(kind.removesuffix(".gz")) if kind.endswith(".gz") else WRITERS[kind]
    write(SOURCES[name][1], path)
    short, warned = loaded(name, path)
    folder = request.getfixturevalue("pieces")
    monkeypatch.setattr(files, "_content", None)  # no file is read whole
    long, also_warned = loaded(name, path)
    for split in ("train", "validation", "test"):
        one, other = getattr(short, split), getattr(long, split)
        assert one.to_list() == other.to_list()
        assert one.features == other.features
        assert digest(one) == digest(other)
    assert warned == also_warned
    if name in ("few system prompts", "single turns", "preferences"):
        assert len(warned) == 1
    assert not list(folder.iterdir())


@pytest.mark.parametrize("kind", PACKED)
def test_a_long_file_that_is_cut_off_is_one_sentence(kind, pieces, tmp_path):
    path = tmp_path / f"rows.{kind}.gz"
    packed(kind)(PLAIN, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"rows\.{kind}\.gz is truncated or no gzip file .*; fetch or compress it"):
        read_file(path)


BROKEN = {
    "JSON": (b'{"prompt": ', "line 41: malformed JSON"),
    "a list": (b"[1]", "line 41: a JSON object"),
    "bytes": (b'{"prompt": "\xff", "completion": "x"}', "line 41: the text is not UTF-8"),
    "blank": (b'{"prompt": " ", "completion": "x"}', "line 41: column 'prompt' is empty"),
    "no text": (b'{"prompt": "p", "completion": 7}', "line 41: column 'completion' must hold text"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_errors_name_the_line(name, pieces, tmp_path):
    line, message = BROKEN[name]
    rows = [json.dumps(row).encode() for row in PLAIN]
    (tmp_path / "rows.jsonl").write_bytes(b"\r\n".join([*rows[:40], line, *rows[40:]]))
    with pytest.raises(UserError, match=rf"rows\.jsonl, {message}"):
        CompletionReader.load(DataConfig(source=str(tmp_path / "rows.jsonl")))


BROKEN_TEXT = {
    "a field less": (b"p", "line 42: 1 field, but the header has 2"),
    "bytes": (b"\xff,x", "line 42: the text is not UTF-8"),
    "blank": (b" ,x", "line 42: column 'prompt' is empty"),
    "a quote that is not closed": (b'"p,x', "line 42: malformed CSV"),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in BROKEN_TEXT for kind in ("csv", "tsv") if "quote" not in name or kind == "csv"],
)
def test_errors_name_the_line_of_separated_text(name, kind, pieces, tmp_path):
    line, message = BROKEN_TEXT[name]
    mark = {"csv": b",", "tsv": b"\t"}[kind]
    rows = [b"prompt,completion", *(b"%s,%s" % (row["prompt"].encode(), row["completion"].encode()) for row in PLAIN)]
    content = b"\r\n".join([*rows[:41], line, *rows[41:]]).replace(b",", mark)
    (tmp_path / f"rows.{kind}").write_bytes(content)
    with pytest.raises(UserError, match=rf"rows\.{kind}, {message}"):
        CompletionReader.load(DataConfig(source=str(tmp_path / f"rows.{kind}")))


def test_tables_of_arrow_are_read_in_pieces(pieces):
    rows = Table.of_arrow(pyarrow.table({"id": [*map(str, range(20))], "text": ["t"] * 20}), "origin")
    assert [len(piece) for piece in rows.pieces()] == [7, 7, 6]
    assert [piece.where(0) for piece in rows.pieces()] == ["origin, row 1", "origin, row 8", "origin, row 15"]
    assert [name for piece in rows.pieces() for name in piece.ids()] == [*map(str, range(20))]
    some = Table.of_arrow(pyarrow.table({"id": [*map(str, range(19)), None], "text": ["t"] * 20}), "origin")
    assert [name for piece in some.pieces() for name in piece.ids()] == some.ids()


def test_long_files_name_their_columns_as_short_ones_do(pieces, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,0\nb,1\n", encoding="utf-8-sig")
    assert read_file(path, ["text", "label"]).values("text") == ["a", "b"]
    path.write_text("text,text\na,0\n")
    with pytest.raises(UserError, match="more than one column named 'text'; rename one; if the file has no header"):
        read_file(path)


def test_what_is_no_json_lines_is_read_whole(pieces, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(PLAIN, indent=1))
    assert not isinstance(read_file(path), LongTable)
    assert len(read_file(path)) == 50


def test_rows_are_held_or_mapped(pieces):
    tables = [pyarrow.table({"n": range(begin, begin + 10), "text": ["word"] * 10}) for begin in range(0, 1000, 10)]
    before = pyarrow.total_allocated_bytes()
    mapped = spooled(iter(tables))
    assert mapped["n"][:] == list(range(1000))
    assert pyarrow.total_allocated_bytes() - before < 2000
    chosen = np.array([0, 3, 7, 500, 999])
    assert taken(mapped, chosen)["n"][:] == chosen.tolist()
    assert numbers(mapped.select([5, 2]), "n").tolist() == [5, 2]
    assert Dataset.from_list(mapped.to_list()).to_list() == mapped.to_list()
