"""The frozen prefix: its states against transformers' own, runs upon it against plain ones, and where there is none."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.tasks.base import CHUNK
from lora_ggpo.training import prefix
from lora_ggpo.training.build import build_model, training_arguments
from lora_ggpo.training.forecast import forecast
from lora_ggpo.training.prefix import find_cut, find_prefix
from lora_ggpo.training.run import train
from lora_ggpo.workspace import cache
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import GUIDED, recipe_text
from tests.training.runs import assert_same

QUIET = Reporter(quiet=True)
TOP = {"adapter": {"r": 4, "lora_dropout": 0.1, "target_modules": ["query"], "layers_to_transform": [1]}}
POOLER = {"adapter": {"r": 4, "target_modules": ["pooler.dense"]}, "freeze_head": True, "ggpo": GUIDED}
HEAD = {"adapter": None, "freeze_body": True}
DECODER = {"adapter": {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}, "ggpo": GUIDED}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def recipe(tiny_bert, reviews, tmp_path):
    """A recipe of six steps of 8 rows without dropout; `changes` as those of `recipe_text`."""

    def make(length=24, training=(), model=tiny_bert, **changes):
        text = recipe_text(
            model,
            reviews,
            tmp_path / f"runs-{changes.get('frozen_prefix', True)}",
            task={"kind": "classification", "max_length": length},
            data={"validation_fraction": 0.167, "test_fraction": 0.167},
            **{"model_dropout": 0, "validate_every": 3, **changes},
            training={"max_steps": 6, "per_device_train_batch_size": 8, "save_steps": 6, **dict(training)},
        )
        return parse_recipe(text, "r.yaml")

    return make


def _built(recipe, folder):
    """(prefix, what is said, model, encoded rows)."""
    args = training_arguments(recipe, folder, 0)
    model, tokenizer, rows = build_model(recipe, args, recipe.task.type.load(recipe.data))
    found, told = find_prefix(recipe, args, model, recipe.task.type.collator(tokenizer), rows, QUIET)
    return found, told, model, rows


@pytest.mark.parametrize(("changes", "layer", "tokens"), [(TOP, 1, None), (POOLER, 2, 1), (HEAD, 2, 1)])
def test_states_are_those_of_each_row_alone(recipe, tmp_path, changes, layer, tokens):
    found, told, model, rows = _built(recipe(**changes), tmp_path)
    assert told.startswith(f"the embeddings and {layer} of 2 layers are frozen, and their outputs are computed once")
    batch = found.batches(rows)([5, 0, 9])
    body = find_cut(model).body.double().eval()
    for row, states, mask in zip([5, 0, 9], batch["states"], batch["attention_mask"], strict=True):
        ids = torch.tensor([rows[row]["input_ids"]])
        alone = body(input_ids=ids, output_hidden_states=True).hidden_states[layer][0, :tokens]
        assert mask.sum() == len(alone)
        torch.testing.assert_close(states[mask.bool()].double(), alone, rtol=1e-5, atol=1e-5)
    assert batch["labels"].tolist() == rows["labels"][[5, 0, 9]]


@pytest.mark.parametrize("changes", [TOP, POOLER], ids=["top", "pooler"])
def test_a_run_is_the_plain_one_bit_by_bit_where_rows_have_one_length(recipe, changes):
    """Every review has more than six tokens; the log holds losses, gradient norms, noise sizes and validations."""
    cut, plain = (train(recipe(6, frozen_prefix=on, **changes), QUIET)[0] for on in (True, False))
    assert_same(cut.folder, plain.folder)
    assert cut.metrics["evaluation"] == plain.metrics["evaluation"]
    assert os.listdir(os.environ["XDG_CACHE_HOME"] + "/lora-ggpo/files")


@pytest.mark.parametrize(
    ("model", "changes"),
    [("tiny_bert", TOP), ("tiny_bert", HEAD), ("tiny_llama", DECODER), ("tiny_llama", HEAD)],
    ids=["top", "head", "decoder", "decoder-head"],
)
def test_a_run_is_the_plain_one_within_rounding(recipe, model, changes, request):
    folder = request.getfixturevalue(model)
    cut, plain = (train(recipe(frozen_prefix=on, model=folder, **changes), QUIET)[0] for on in (True, False))
    assert os.listdir(os.environ["XDG_CACHE_HOME"] + "/lora-ggpo/files")
    for key in ("loss", "grad_norm", "validation/log_loss"):
        values = [[row[key] for row in run.log if key in row] for run in (cut, plain)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    file = "model/model.safetensors" if changes is HEAD else "adapter/adapter_model.safetensors"
    one, other = (load_file(run.folder / file) for run in (cut, plain))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)


def test_a_decoders_run_is_the_plain_one_bit_by_bit_where_rows_have_one_length(recipe, tiny_llama):
    cut, plain = (train(recipe(6, frozen_prefix=on, model=tiny_llama, **DECODER), QUIET)[0] for on in (True, False))
    assert_same(cut.folder, plain.folder)
    assert cut.metrics["evaluation"] == plain.metrics["evaluation"]
    assert os.listdir(os.environ["XDG_CACHE_HOME"] + "/lora-ggpo/files")


def test_a_decoder_pads_as_in_one_piece(recipe, tiny_llama, tmp_path):
    found, told, model, rows = _built(recipe(model=tiny_llama, **DECODER), tmp_path)
    assert told.startswith("the embeddings and 1 of 2 layers are frozen, and their outputs are computed once")
    lengths = np.array(rows["length"])
    chosen = [int(lengths.argmin()), int(lengths.argmax())]
    assert lengths.min() < lengths.max()
    model.eval()
    whole = [model(input_ids=torch.tensor([rows[row]["input_ids"]])).logits[0] for row in chosen]
    batch = found.batches(rows)(chosen)
    assert batch["states"].shape[1] == lengths.max()
    torch.testing.assert_close(model(**batch).logits, torch.stack(whole), rtol=1e-4, atol=1e-6)


def test_a_decoder_that_numbers_its_layers_is_not_cut(recipe, tiny_llama, tmp_path):
    """Qwen2, for one, looks up by a layer's number whether it has a sliding window."""
    *_, model, _ = _built(recipe(model=tiny_llama, **DECODER), tmp_path)
    assert find_cut(model).count == 1
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert find_cut(model) is None


@pytest.mark.parametrize(
    "changes",
    [
        {**TOP, "frozen_prefix": False},
        {"adapter": {"r": 4, "target_modules": ["query"]}},
        {"adapter": {"r": 4, "target_modules": ["pooler.dense"], "trainable_token_indices": [5]}},
        {"adapter": None},
        {**TOP, "training": {"neftune_noise_alpha": 5}},
        {**TOP, "training": {"gradient_checkpointing": True}},
    ],
)
def test_not_cut_off(recipe, tmp_path, changes):
    found, told, *_ = _built(recipe(**changes), tmp_path)
    assert (found, told) == (None, "")


def test_dropout_is_in_the_way(recipe, tmp_path):
    found, told, *_ = _built(recipe(**HEAD, model_dropout=None), tmp_path)
    assert found is None
    assert "without dropout (model_dropout: 0) their outputs would be computed once" in told


def test_a_head_that_looks_at_all_tokens(recipe, tmp_path, monkeypatch):
    class Mean(nn.Module):
        def forward(self, hidden):
            return hidden.mean(dim=1)

    monkeypatch.setattr("transformers.models.bert.modeling_bert.BertPooler", lambda config: Mean())
    found, _, model, rows = _built(recipe(**HEAD, model_dropout=0), tmp_path)
    batch = found.batches(rows)([1, 2])
    assert batch["states"].shape[:2] == batch["attention_mask"].shape
    assert batch["attention_mask"].shape[1] == max(rows["length"][1:3])
    chosen = rows.select([1])
    whole = model(input_ids=torch.tensor([chosen[0]["input_ids"]])).logits
    one = found.batches(chosen)([0])
    del one["labels"]
    torch.testing.assert_close(model(**one).logits, whole)


def test_the_model_is_whole_for_whom_brings_no_states(recipe, tmp_path):
    found, _, model, rows = _built(recipe(**POOLER), tmp_path)
    ids = torch.tensor([rows[0]["input_ids"]])
    modules, before = len(list(model.modules())), model.eval()(input_ids=ids).logits
    with found.cut_off():
        assert len(list(model.modules())) < modules
        assert torch.equal(model(input_ids=ids).logits, before)
    assert len(list(model.modules())) == modules


def test_what_is_kept_is_of_these_rows_and_these_weights(recipe, tmp_path, monkeypatch):
    found, _, model, rows = _built(recipe(**TOP), tmp_path)
    monkeypatch.setattr(prefix, "CHUNK", CHUNK // 100)  # a digest over several pieces
    name = found._name(rows)
    assert found._name(rows.select(range(len(rows)))) == name
    assert found._name(rows.select([1, 0, *range(2, len(rows))])) != name
    again = _built(recipe(**TOP), tmp_path)[0]
    assert again._name(rows) == name
    with torch.no_grad():
        find_cut(model).layers[0].output.dense.bias[3] += 1e-6
    args = training_arguments(recipe(**TOP), tmp_path, 0)
    other, _ = find_prefix(recipe(**TOP), args, model, found._collate, rows, QUIET)
    assert other._name(rows) != name


def test_where_nothing_can_be_kept(recipe, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found, told, model, _ = _built(recipe(**TOP), tmp_path)
    assert (found, told) == (None, "")
    assert "forward" not in vars(model.get_base_model())


def test_files_of_the_cache(monkeypatch):
    def write(file):
        file.write(b"12345678")

    first = cache.kept_file("first", write)
    os.utime(first, (1, 1))
    assert cache.kept_file("first", pytest.fail).read_bytes() == b"12345678"
    os.utime(first, (1, 1))
    monkeypatch.setattr(cache, "ALL", 16)
    second = cache.kept_file("second", write)
    assert first.exists()
    assert second.exists()
    cache.kept_file("third", write)
    assert not first.exists()
    with pytest.raises(ZeroDivisionError):
        cache.kept_file("fourth", lambda file: 1 / 0)
    assert sorted(os.listdir(second.parent)) == ["second", "third"]
    assert cache.fits(8)
    monkeypatch.setattr(cache, "LARGEST", 7)
    assert not cache.fits(8)


def test_batches_pad_with_what_no_token_looks_at():
    states, begins, tokens = torch.arange(12.0).view(6, 2), np.array([3, 0]), np.array([3, 2])
    batch = prefix._batch(states, np.arange(10, 16), 2, begins, tokens, torch.tensor([7, 8]), [1, 0])
    assert batch["input_ids"].tolist() == [[10, 11, 2], [13, 14, 15]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [8, 7]
    assert batch["states"][0, :2].tolist() == [[0, 1], [2, 3]]
    assert batch["states"][1].tolist() == [[6, 7], [8, 9], [10, 11]]


@pytest.mark.parametrize("kept", [True, False])
def test_a_plan_says_that_it_runs_all_layers(recipe, capsys, kept):
    forecast(recipe(frozen_prefix=kept, **TOP), 1, Reporter())
    said = "the embeddings and 1 of 2 layers are computed once for each row; the steps here compute them"
    assert (said in capsys.readouterr().err) == kept
