"""Readers of local files against files that other tools wrote, and against files that nobody should have written."""

import contextlib
import csv
import gzip
import json

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_ggpo.data.files import parse_csv, parse_json, parse_jsonl, parse_tsv, read_file, read_folder
from lora_ggpo.data.labels import read_label_names
from lora_ggpo.errors import UserError

TEXTS = ["plain", 'with "quotes", commas', "two\nlines", "tab\there", "naïve – ½ 字 😀", " NA ", "null", "  spaced"]
LABELS = [0, 1, 0, 1, 0, 1, 0, 1]
FRAME = pandas.DataFrame({"text": TEXTS, "label": LABELS})


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("a.csv", lambda path: FRAME.to_csv(path, index=False)),
        ("a.CSV", lambda path: FRAME.to_csv(path, index=False, lineterminator="\r\n", encoding="utf-8-sig")),
        ("a.tsv", lambda path: FRAME.to_csv(path, index=False, sep="\t", quoting=csv.QUOTE_ALL)),
        ("a.csv.gz", lambda path: FRAME.to_csv(path, index=False)),
        ("a.jsonl", lambda path: FRAME.to_json(path, orient="records", lines=True)),
        ("a.jsonl.gz", lambda path: FRAME.to_json(path, orient="records", lines=True)),
        ("a.json", lambda path: FRAME.to_json(path, orient="records", indent=2)),
        ("lines.json", lambda path: FRAME.to_json(path, orient="records", lines=True)),
        ("a.parquet", lambda path: FRAME.to_parquet(path)),
    ],
)
def test_rows_come_back_as_written(name, save, tmp_path):
    save(tmp_path / name)
    table = read_file(tmp_path / name)
    assert table.texts("text", "text") == TEXTS
    assert [int(label) for label in table.column("label", "label")] == LABELS


def test_class_names_come_from_parquet_that_datasets_wrote(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS}, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    assert read_file(tmp_path / "a.parquet").label_names == {"label": ["no", "yes"]}


def test_a_text_of_any_length_is_read_from_csv(tmp_path):
    text = "word, " * 50_000
    FRAME.assign(text=text).to_csv(tmp_path / "a.csv", index=False)
    assert read_file(tmp_path / "a.csv").texts("text", "text") == [text] * len(FRAME)


def test_rows_know_their_lines(tmp_path):
    table = read_file(write(tmp_path / "a.csv", 'text,label\n"two\nlines",0\n\nlast,1\n'))
    assert table.where(0).endswith("a.csv, line 2")
    assert table.where(1).endswith("a.csv, line 5")
    table = read_file(write(tmp_path / "a.jsonl", '\n{"text": "a"}\n\n{"text": "b"}'))
    assert [table.where(row).rpartition(" ")[2] for row in range(2)] == ["2", "4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: malformed JSON \(Expecting value at column"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a\.jsonl, line 2: a JSON object like"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl, line 1: JSON that cannot be read"),
        ("a.jsonl", '{"n": ' + "1" * 5000 + "}", r"a\.jsonl, line 1: JSON that cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl, line 2: the text is not UTF-8; save"),
        ("a.jsonl", "\n\n", r"a\.jsonl has no rows"),
        ("a.json", "[1, 2]", r"a\.json, row 1: a JSON object like"),
        ("a.json", '"text"', r"a\.json must hold a list of objects, but it holds a str\."),
        ("a.json", '[\n{"text": 1},\n{"text" 2}]', r"a\.json: malformed JSON \(.* at line 3, column 9\)"),
        ("a.json", "", r"a\.json has no rows"),
        ("a.csv", "", r"a\.csv has no rows"),
        ("a.csv", "text,label\n", r"a\.csv has no rows"),
        ("a.csv", "text,label\nx,1\ny\n", r"a\.csv, line 3: 1 field, but the header has 2\."),
        ("a.csv", 'text,label\nx,1\n"y,1\n', r"a\.csv, line 3: malformed CSV \(unexpected end of data\); check"),
        ("a.csv", "text,text\nx,1\n", r"a\.csv has more than one column named 'text'"),
        ("a.csv", "text,label\nx,1\n".encode("utf-16"), r"a\.csv, line 1: the text is not UTF-8"),
        (
            "a.csv.gz",
            gzip.compress(b"text,label\n" + b"x,1\n" * 50, mtime=0)[:-12],
            r"a\.csv\.gz is truncated or no gzip file",
        ),
        ("a.csv.gz", b"text,label\n", r"a\.csv\.gz is truncated or no gzip file"),
        ("a.parquet", b"PAR1", r"a\.parquet is not a readable parquet file"),
        ("a.txt", "text", r"a\.txt is of an unknown type; give a \.jsonl, \.json, \.csv, \.tsv, \.parquet file\."),
        ("a", "text", r"a is of an unknown type"),
    ],
)
def test_malformed_files_are_reported_with_their_place(name, content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_file(write(tmp_path / name, content))


def test_truncated_parquet(tmp_path):
    FRAME.to_parquet(tmp_path / "whole.parquet")
    cut = write(tmp_path / "cut.parquet", (tmp_path / "whole.parquet").read_bytes()[:-40])
    with pytest.raises(UserError, match=r"cut\.parquet is not a readable parquet file \(.+\); write it again\."):
        read_file(cut)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv does not exist; check the path\."):
        read_file(tmp_path / "none.csv")


def test_folder_of_splits(tmp_path):
    write(tmp_path / "train.csv", "text,label\na,0\n")
    write(tmp_path / "dev.jsonl", '{"text": "b", "label": 0}')
    write(tmp_path / "README.md", "words")
    assert set(read_folder(tmp_path)) == {"train", "validation"}
    write(tmp_path / "validation.csv", "text,label\na,0\n")
    with pytest.raises(UserError, match=r"has two files for validation, dev\.jsonl and validation\.csv; keep one\."):
        read_folder(tmp_path)


def test_folder_without_splits(tmp_path):
    write(tmp_path / "reviews.csv", "text,label\na,0\n")
    with pytest.raises(UserError, match=r"has no train, validation or test file"):
        read_folder(tmp_path)


NEARLY_CSV = st.text(alphabet='ab",\t\r\n\0é\ud800 1.', max_size=60).map(lambda text: text.encode(errors="replace"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "label", "x"]), inner),
    max_leaves=8,
)
NEARLY_JSONL = st.lists(st.builds(json.dumps, VALUES) | st.text(max_size=8), max_size=4).map(
    lambda lines: "\n".join(lines).encode(errors="surrogatepass")
)


@given(content=st.binary(max_size=60) | NEARLY_CSV | NEARLY_JSONL)
@pytest.mark.parametrize("parse", [parse_csv, parse_tsv, parse_jsonl, parse_json])
def test_whatever_a_file_holds_the_reader_gives_rows_or_a_user_error(parse, content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    with contextlib.suppress(UserError):
        table = parse(path, content)
        assert all(len(values) == len(table) for values in table.columns.values())
        assert len(table.ids()) == len(table)
        assert all(text.strip() for text in table.texts("text", "text"))
        assert all(name.strip() for name in read_label_names(table, "label"))


@given(rows=st.lists(st.fixed_dictionaries({"text": st.text(), "label": st.text()}), min_size=1, max_size=5))
def test_json_lines_round_trip(rows, tmp_path_factory):
    content = "\n".join(json.dumps(row) for row in rows).encode()
    table = parse_jsonl(tmp_path_factory.getbasetemp() / "rows.jsonl", content)
    assert table.columns == {"text": [row["text"] for row in rows], "label": [row["label"] for row in rows]}


# --- what is meant is clear, or said -------------------------------------------------------------------------------

ROWS = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps({"data": ROWS}, indent=2)),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.jsonl", json.dumps(ROWS, indent=2)),
        ("a.jsonl", json.dumps({"rows": ROWS}, indent=2)),
        ("a.json", "\n".join(map(json.dumps, ROWS))),
        ("a.jsonl", gzip.compress("\n".join(map(json.dumps, ROWS)).encode(), mtime=0)),  # without the suffix
        ("a.csv", gzip.compress(b"text,label\na,0\nb,1\n", mtime=0)),
    ],
)
def test_files_whose_form_is_clear_are_read(name, content, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    table = read_file(tmp_path / name)
    assert [(text, int(label)) for text, label in zip(table.values("text"), table.values("label"), strict=True)] == [
        ("a", 0),
        ("b", 1),
    ]


def test_one_object_is_one_row(tmp_path):
    row = {"prompt": "a", "items": ["x"], "messages": [{"role": "user"}]}
    (tmp_path / "a.json").write_text(json.dumps(row, indent=2))
    table = read_file(tmp_path / "a.json")
    assert len(table) == 1
    assert table.values("items") == [["x"]]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", '{\n"data": [\n{"text" 1}]}', r"a\.json: malformed JSON \(.* at line 3, column 9\)"),
        ("a.csv", b"PAR1\xff\xfe", r"a\.csv is a parquet file, not what its name says"),
        ("a.jsonl", b"PK\x03\x04\xff\xff", r"a\.jsonl is a zip archive, not what its name says; unpack it"),
    ],
)
def test_files_that_are_something_else_are_named(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=sentence):
        read_file(tmp_path / name)


def test_columns_that_cannot_be_read_matter_only_if_they_are_used(tmp_path):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.int8())
    columns = {
        "text": pyarrow.array(["a", "b"]),
        "map": pyarrow.array([[("k", 1)], []], kind),
        "nested": pyarrow.array([{"m": [("k", 1)]}] * 2, pyarrow.struct({"m": kind})),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    table = read_file(tmp_path / "a.parquet")
    assert len(table) == 2
    assert table.texts("text", "text") == ["a", "b"]
    assert table.values("map") == [[("k", 1)], []]
    with pytest.raises(UserError, match=r"a\.parquet, row 1: column 'map' must hold text, but here it holds list"):
        table.texts("map", "text")


def test_parquet_columns_have_names_of_their_own(tmp_path):
    whole = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], ["twice", "twice"])
    pyarrow.parquet.write_table(whole, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has more than one column named 'twice'; rename one\."):
        read_file(tmp_path / "a.parquet")
