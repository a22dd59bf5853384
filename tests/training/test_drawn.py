"""Of a long training set a run encodes what it draws, and is the run that it would be on all of it."""

import json
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from lora_ggpo.training import drawn
from lora_ggpo.training.drawn import Drawn, encode_drawn
from lora_ggpo.training.trainer import EpochSampler
from tests.recipes import recipe_text, write_pairs
from tests.training.runs import assert_same, trained, unfinish

ROWS = 400


@pytest.fixture
def short(monkeypatch):
    """No set is too short to be encoded in part."""
    monkeypatch.setattr(drawn, "WHOLE", 0)
    monkeypatch.setattr(drawn, "LEAST", 1)


def settings(steps, strategy="random", processes=1, accumulation=2):
    return SimpleNamespace(
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        world_size=processes,
        train_sampling_strategy=strategy,
        seed=5,
    )


def encoded(args, keep=lambda row: True, packed=1):
    """What becomes of `ROWS` rows of which those that `keep` are put `packed` to one; what was encoded, and told."""
    train, looked_at = Dataset.from_dict({"row": list(range(ROWS))}), []

    def encode(rows, name):
        looked_at.append((name, len(rows)))
        warnings.warn(f"{name}: {len(rows)}", stacklevel=2)
        kept = [row for row in rows["row"] if keep(row)]
        packs = [kept[begin : begin + packed] for begin in range(0, len(kept), packed)]
        return Dataset.from_dict({"row": [pack[0] if packed == 1 else pack for pack in packs]})

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rows = encode_drawn(train, args, encode, packed=packed > 1)
    assert [str(one.message) for one in told] == ["{}: {}".format(*looked_at[-1])], "and not of other tries"
    return rows, looked_at


@pytest.mark.parametrize("keep", [lambda row: True, lambda row: row % 3 == 0])
def test_rows_come_in_the_order_of_a_run_on_all_rows(short, keep):
    rows, looked_at = encoded(settings(10), keep)
    sampler = EpochSampler([1] * len(rows), 5, None, rows.epoch)
    ours = [rows[place]["row"] for place in sampler]
    theirs = [row for row in EpochSampler([1] * ROWS, 5, None) if keep(row)]
    assert len(ours) >= 80
    assert ours == theirs[: len(ours)]
    assert rows.epoch == len(sampler) == pytest.approx(len(theirs), rel=0.1)
    assert looked_at[0] == ("train, as drawn", 80)


def test_rows_of_like_length_come_in_the_order_of_a_run_on_all_rows(short):
    """Sections of the order are sorted as there; but for the longest row, which comes first of those that are drawn."""
    lengths = np.random.default_rng(0).permutation(ROWS)
    rows, _ = encoded(settings(20, "group_by_length"))
    chosen = rows["row"][:]
    assert len(rows) == 192, "two sections of twelve groups"
    lengths[chosen[150]] = ROWS
    ours = [chosen[place] for place in EpochSampler(lengths[chosen], 5, 8, rows.epoch)]
    assert ours == list(EpochSampler(lengths, 5, 8))[:192]


def test_processes_and_micro_batches_of_a_step_draw_together(short):
    found = [encoded(settings(5, processes=n, accumulation=4 // n))[0]["row"][:] for n in (1, 2, 4)]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 80


def test_packed_rows_are_as_many_as_are_drawn_and_mixed(short):
    rows, looked_at = encoded(settings(3), packed=4)
    firsts = [pack[0] for pack in rows["row"]]
    assert 24 <= len(rows) < 35
    assert rows.epoch == pytest.approx(ROWS / 4, rel=0.05)
    order = list(EpochSampler([1] * ROWS, 5, None))
    places = [order.index(row) for row in firsts]
    assert sorted(places) == list(range(0, 4 * len(rows), 4)), "packs of the first rows of the order"
    assert places != sorted(places)
    assert len(looked_at) == 2


def test_rows_in_their_own_order_are_the_first_ones(short):
    rows, _ = encoded(settings(2, "sequential"))
    assert rows["row"][:] == list(range(16))


@pytest.mark.parametrize(
    ("args", "keep"),
    [
        (settings(50), lambda row: True),  # as many as there are
        (settings(-1), lambda row: True),
        (settings(2, "batch_rebalance"), lambda row: True),
        (settings(20), lambda row: row < 100),  # 160 are wanted
    ],
)
def test_the_whole_set_is_encoded_where_it_is_needed(short, args, keep):
    rows, looked_at = encoded(args, keep)
    assert looked_at[-1] == ("train", ROWS)
    assert not isinstance(rows, Drawn)
    assert np.array_equal(rows["row"], [row for row in range(ROWS) if keep(row)])


def test_short_sets_are_encoded_whole():
    rows, _ = encoded(settings(1))
    assert not isinstance(rows, Drawn)


@pytest.fixture(scope="module")
def recipe(tiny_llama, tmp_path_factory):
    """Three steps of two micro-batches, 24 of 120 rows."""
    folder = tmp_path_factory.mktemp("drawn")
    training = {"max_steps": 3, "gradient_accumulation_steps": 2, "save_steps": 1, "train_sampling_strategy": "random"}
    data = write_pairs(folder / "data.jsonl", 200)
    changes = {"training": training, "validate_every": 2}
    (folder / "recipe.yaml").write_text(recipe_text(tiny_llama, data, folder / "whole", **changes))
    return folder / "recipe.yaml"


@pytest.mark.slow
def test_a_run_is_that_on_all_rows_and_resumes(recipe, short, monkeypatch, tmp_path):
    """Losses, epochs, validations, scores and weights are the same bits."""
    part = trained(recipe, f"output={tmp_path / 'part'}")
    left = shutil.copytree(part, tmp_path / "left" / "seed-0")
    unfinish(left)
    shutil.rmtree(max((left / "checkpoints").iterdir()))  # the last step of three
    trained(recipe, f"output={left.parent}")
    monkeypatch.setattr(drawn, "WHOLE", 10**6)
    whole = trained(recipe)
    assert_same(part, whole)
    assert_same(left, whole)
    scores = [json.loads((run / "metrics.json").read_text())["evaluation"] for run in (part, left, whole)]
    assert scores[0] == scores[1] == scores[2]
    log = [json.loads(line) for line in (part / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log if "epoch" in row][-1] < 0.25


@pytest.mark.thorough
def test_packed_rows_resume_in_their_order(recipe, short, tmp_path):
    """And those of like length."""
    changes = ("task.packing=true", "training.train_sampling_strategy=group_by_length")
    one = trained(recipe, f"output={tmp_path / 'one'}", *changes)
    other = shutil.copytree(one, tmp_path / "other" / "seed-0")
    unfinish(other)
    shutil.rmtree(max((other / "checkpoints").iterdir()))
    assert_same(trained(recipe, f"output={other.parent}", *changes), one)
