"""Whatever a data file holds, it becomes splits, or one sentence says what is wrong with it."""

import gzip
import io
import json
import warnings

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_ggpo.data import CompletionReader, DataConfig, LabelReader
from lora_ggpo.errors import UserError

PLAIN = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5)
PLAIN |= st.sampled_from(["user", "assistant", "good", "\ud800", " "])
KEYS = ["role", "content", "from", "value", "x", "tool_calls", "function", "name", "arguments", "weight", "train"]
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
COLUMNS = ["id", "text", "label", "prompt", "completion", "messages", "conversations", "instruction", "input", "output"]
COLUMNS += ["query", "response", "answer", "x", "", "system", "history", "tools", "chat_template_kwargs", "images"]
ROW = st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=5)
TEXT = st.text(min_size=1, max_size=4)
EXTRA = {"id": VALUES, "x": VALUES}
LABELLED = st.fixed_dictionaries(
    {"text": TEXT, "label": st.sampled_from([0, 1, "a", True, -1, 1.0, None])}, optional=EXTRA
)
MORE = dict.fromkeys(("tool_calls", "weight", "train", "name", "reasoning_content", "x"), VALUES)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT | VALUES}, optional=MORE)
EXTRA |= dict.fromkeys(("system", "history", "tools", "chat_template_kwargs", "rejected"), VALUES)
CHAT = st.fixed_dictionaries({"messages": st.lists(TURN, min_size=1, max_size=3)}, optional=EXTRA)
PAIR = st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}, optional=EXTRA)
ROWS = st.one_of(*(st.lists(row, max_size=10) for row in (ROW, LABELLED, CHAT, PAIR, LABELLED | ROW)))

GOOD = [{"text": f"t {n}", "label": n % 2, "messages": [{"role": "assistant", "content": "x"}]} for n in range(12)]
JSONL = "\n".join(map(json.dumps, GOOD)).encode()
CSV = b"text,label\n" + b"\n".join(b'"t %d",%d' % (n, n % 2) for n in range(12))
FILES = {".jsonl": JSONL, ".json": json.dumps(GOOD).encode(), ".csv": CSV, ".jsonl.gz": gzip.compress(JSONL, mtime=0)}


def parquet(table):
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


def parquet_of_datasets():
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    rows = [{"text": row["text"], "label": row["label"]} for row in GOOD]
    return parquet(datasets.Dataset.from_list(rows, features=datasets.Features(features)).data.table)


PARQUET = [parquet(pyarrow.Table.from_pylist(GOOD)), parquet_of_datasets()]


@pytest.fixture
def check(tmp_path):
    """Reads `content` as a file for each kind of task."""

    def check(suffix, content):
        path = tmp_path / f"data{suffix}"
        path.write_bytes(content)
        config = DataConfig(source=str(path), validation_fraction=0.3, test_fraction=0.3)
        read, messages = 0, []
        for load in (LabelReader.load, CompletionReader.load):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read += len(load(config).train) > 0
            except UserError as error:
                messages.append(str(error))
        assert all(message.isprintable() for message in messages)
        return read

    return check


def test_the_files_that_are_changed_below_can_be_read(check):
    assert all(check(suffix, content) for suffix, content in FILES.items())
    assert all(check(".parquet", content) for content in PARQUET)


@given(st.sampled_from([*FILES, ".tsv", ".parquet", ".csv.gz"]), st.binary(max_size=60))
def test_bytes(check, suffix, content):
    check(suffix, content)


@given(ROWS, st.booleans())
def test_json_values(check, rows, lines):
    if lines:
        check(".jsonl", "\n".join(map(json.dumps, rows)).encode())
    else:
        check(".json", json.dumps(rows).encode())


@given(st.text(alphabet='ab",\t\r\n\0é 1.-', max_size=60), st.sampled_from([".csv", ".tsv"]), st.booleans())
def test_separated_values(check, text, suffix, header):
    head = "text,label\n" if suffix == ".csv" else "text\tlabel\n"
    check(suffix, (head * header + text).encode())


SCRAPS = st.binary(max_size=2) | st.sampled_from(
    [b'"', b"{", b"[", b"null", b"1e999", b"-", b"\\ud800", b"\x00", b"\n"]
)
EDITS = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 3), SCRAPS), min_size=1, max_size=3)


@given(st.sampled_from(list(FILES)), EDITS)
def test_edits_of_a_file(check, suffix, edits):
    content = FILES[suffix]
    for at, cut, new in edits:
        at %= len(content) + 1
        content = content[:at] + new + content[at + cut :]
    check(suffix, content)


@given(ROWS.filter(bool))
def test_parquet_values(check, rows):
    try:
        content = parquet(pyarrow.Table.from_pylist(rows))
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError):
        return  # parquet holds one type a column, and no empty objects
    check(".parquet", content)


BYTES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)


@given(st.sampled_from(PARQUET), BYTES, st.integers(0, 3))
def test_damaged_parquet(check, content, changes, cut):
    """Half of the changes are to the metadata at the end, where there is more to go wrong."""
    damaged = bytearray(content)
    for at, value in changes:
        damaged[-1 - at % 1200 if at % 2 else at % len(damaged)] = value
    check(".parquet", bytes(damaged[: len(damaged) - cut]))


@pytest.mark.parametrize("column", ["text", "label", "id"])
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pyarrow.date32(), 2**30),  # the year 2941764, which Python has no date for
        (pyarrow.timestamp("s", tz="Nowhere/Town"), 5),
        (pyarrow.timestamp("ns"), 10**9 + 1),
        (pyarrow.duration("ns"), 5),
        (pyarrow.binary(), b"\xff"),
        (pyarrow.uint64(), 2**64 - 1),
        (pyarrow.map_(pyarrow.string(), pyarrow.int8()), [("a", 1)]),
        (pyarrow.null(), None),
    ],
)
def test_parquet_types(check, column, kind, value):
    values = pyarrow.array([value] * 12, pyarrow.int32()).cast(kind) if kind == pyarrow.date32() else None
    columns = {"text": pyarrow.array([f"t {n}" for n in range(12)]), "label": pyarrow.array([0, 1] * 6)}
    columns[column] = values or pyarrow.array([value] * 12, kind)
    check(".parquet", parquet(pyarrow.table(columns)))


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl", b'{"text": ' + b"[" * 100_000),
        (".json", b"[" * 100_000),
        (".jsonl", b'{"text": "a", "label": ' + b"9" * 5000 + b"}"),
        (".csv", b'text,label\n"' + b"a" * 200_000 + b'",1\nb,0'),
        (".csv", b'"te\nxt",label\na,1\nb,0'),
    ],
)
def test_extremes(check, suffix, content):
    assert not check(suffix, content)
