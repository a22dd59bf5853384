"""Encoded rows are kept in the user's cache folder: made once, and again whenever anything that shapes them changes."""

import copy
import os
import warnings

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_ggpo.data import kept as keeper
from lora_ggpo.data.kept import digest_of_rows, kept
from lora_ggpo.tasks import TaskConfig, base
from tests import processes
from tests.tasks.make import task

PAIRS = [{"prompt": f"Count to {n}.", "completion": "one more " * n} for n in range(1, 30)]
TEXTS = [{"id": str(n), "text": f"text {n}", "text_pair": f"and {n * n}", "label": n % 2} for n in range(30)]
QUESTIONS = [{"id": str(n), "text": f"q{n}", "choices": ["yes", f"no {n}"], "answer": n % 2} for n in range(9)]
SETS = {
    "sft": (PAIRS, {"max_length": 20}),
    "classification": (TEXTS, {}),
    "causal-classification": (TEXTS, {"label_words": ["bad", "good"], "template": "{text} {text_pair}:"}),
    "choice": (QUESTIONS, {}),
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder of encoded rows; sets of any size are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(base, "FEW", 0)
    return tmp_path / "lora-ggpo" / "encoded"


@pytest.fixture
def calls(monkeypatch):
    """The texts of each call of a tokenizer."""
    made, call = [], PreTrainedTokenizerBase.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerBase, "__call__", lambda self, *texts, **how: made.append(texts) or call(self, *texts, **how)
    )
    return made


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


def encoded(kind, tokenizer, rows=None, name="train", **settings):
    """What a task makes of rows, and what it warns of."""
    of_kind, own = SETS[kind]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = task(kind=kind, **own | settings).encode(Dataset.from_list(rows or of_kind), tokenizer, name)
    return found, [str(one.message) for one in told]


@pytest.mark.parametrize("kind", SETS)
def test_the_second_time_nothing_is_tokenised_and_all_is_as_the_first_time(kind, tokenizer, home, calls, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(base, "FEW", 10**9)
        fresh, warned = encoded(kind, tokenizer)
    assert not home.exists()
    encoded(kind, tokenizer)
    calls.clear()
    again, warned_again = encoded(kind, copy.deepcopy(tokenizer))
    assert not calls
    assert again.to_list() == fresh.to_list()
    assert again.features == fresh.features
    assert warned_again == warned
    assert len(warned) == (kind == "sft")  # of rows that are cut


def with_token(tokenizer):
    tokenizer.add_tokens(["count"])


def with_template(tokenizer):
    tokenizer.chat_template = "{{ messages }}"


def with_other_end(tokenizer):
    tokenizer.eos_token = "<s>"


CHANGES = {
    "max_length": {"max_length": 19},
    "template": {"template": "{text} "},
    "too_long": {"too_long": "drop"},
    "the set's name": {"name": "test"},
    "a row": {"rows": [*PAIRS[:-1], {**PAIRS[-1], "completion": "none"}]},
    "the order": {"rows": PAIRS[::-1]},
    "a token": with_token,
    "the chat template": with_template,
    "the end of text": with_other_end,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_rows_are_encoded_again(change, tokenizer, home, calls):
    encoded("sft", tokenizer)
    calls.clear()
    how, other = CHANGES[change], copy.deepcopy(tokenizer)
    if callable(how):
        how(other)
    encoded("sft", other, **({} if callable(how) else how))
    assert calls


def test_another_version_encodes_again(tokenizer, home, calls, monkeypatch):
    encoded("sft", tokenizer)
    calls.clear()
    monkeypatch.setattr(keeper, "package_state", lambda: "another")
    encoded("sft", tokenizer)
    assert calls


def test_what_a_call_left_in_the_tokenizer_makes_no_difference(tokenizer, home, calls):
    encoded("sft", tokenizer)
    used = copy.deepcopy(tokenizer)
    used("a b c d", truncation=True, max_length=2)
    used.backend_tokenizer.enable_padding(length=9)
    calls.clear()
    encoded("sft", used)
    assert not calls


def test_tasks_and_tokenizers_that_others_wrote_are_not_kept(tokenizer, home):
    class Own(TaskConfig(kind="sft").type):
        pass

    class OwnTokenizer(type(tokenizer)):
        pass

    Own(TaskConfig(kind="sft")).encode(Dataset.from_list(PAIRS), tokenizer)
    other = copy.copy(tokenizer)
    other.__class__ = OwnTokenizer
    encoded("sft", other)
    assert not home.exists()


def cut(file):
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize("suffix", ["arrow", "json"])
@pytest.mark.parametrize("damage", [cut, lambda file: file.write_bytes(b""), os.unlink])
def test_a_torn_file_is_made_anew(suffix, damage, tokenizer, home, calls):
    whole = encoded("sft", tokenizer)[0].to_list()
    (file,) = home.glob(f"*.{suffix}")
    damage(file)
    calls.clear()
    assert encoded("sft", tokenizer)[0].to_list() == whole
    assert calls
    calls.clear()
    assert encoded("sft", tokenizer)[0].to_list() == whole
    assert not calls


def test_a_folder_that_cannot_be_written_is_passed_over(tokenizer, tmp_path, home, monkeypatch):
    whole, warned = encoded("sft", tokenizer)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    again, warned_again = encoded("sft", tokenizer)
    assert again.to_list() == whole.to_list()
    assert warned_again == warned


def test_a_disk_that_fills_up_leaves_nothing_behind(tokenizer, home, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert len(encoded("sft", tokenizer)[0]) == len(PAIRS)
    assert not list(home.iterdir())


def test_one_that_writes_what_another_has_just_written_does_no_harm(tokenizer, home):
    first = task(kind="sft").encode(Dataset.from_list(PAIRS), tokenizer)

    def make():
        kept("same", pieces)  # as another process might, once this one has found nothing
        yield from pieces()

    def pieces():
        yield first.data.table

    assert kept("same", make).to_list() == first.to_list() == kept("same", pieces).to_list()
    assert sorted(path.suffix for path in home.iterdir()) == [".arrow", ".arrow", ".json", ".json"]


def _encode(_, folder, count):
    base.FEW = 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for _ in range(count):
        rows, _ = encoded("sft", tokenizer, PAIRS)
        assert rows["length"][:] == encoded("sft", tokenizer, PAIRS, name="other")[0]["length"][:]


def test_two_processes_at_once_do_no_harm(tiny_llama, home):
    processes.spawn(_encode, (tiny_llama, 3), 2)
    assert sorted(path.suffix for path in home.iterdir()) == [".arrow", ".arrow", ".json", ".json"]


def test_what_was_not_used_for_long_goes_first(tokenizer, home, calls, monkeypatch):
    for name in ("old", "used", "new"):
        encoded("sft", tokenizer, name=name)
    for age, file in enumerate(sorted(home.iterdir(), key=lambda file: file.stat().st_mtime_ns)):
        os.utime(file, (age, age))
    encoded("sft", tokenizer, name="old")
    size = sum(file.stat().st_size for file in home.iterdir())
    monkeypatch.setattr(keeper, "LIMIT", size + 100)  # for the longer name
    encoded("sft", tokenizer, name="newest")
    calls.clear()
    for name in ("old", "new", "newest"):
        encoded("sft", tokenizer, name=name)
    assert not calls
    encoded("sft", tokenizer, name="used")
    assert calls


def test_the_digest_of_rows_is_that_of_their_values(tmp_path):
    rows = Dataset.from_list(TEXTS)
    shuffled = Dataset.from_list(TEXTS[::-1]).select(range(len(TEXTS))[::-1])
    assert digest_of_rows(rows) == digest_of_rows(shuffled)
    assert len({digest_of_rows(one) for one in (rows, rows.select(range(29)), rows.rename_column("id", "key"))}) == 3
