"""Runs of task sft: packing, gradient checkpointing and torch.compile change nothing but memory and speed."""

import json
import warnings

import pytest
import torch
import yaml

from lora_ggpo.data import long, spool
from lora_ggpo.errors import UserError
from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.tasks import sft as sft_task
from lora_ggpo.tasks.completions import TEMPERATURES
from lora_ggpo.training import build, trainer
from lora_ggpo.training.forecast import forecast
from lora_ggpo.training.reuse import evaluate_run
from lora_ggpo.training.run import train
from lora_ggpo.training.scorer import Scorer
from lora_ggpo.workspace.files import read_json
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import recipe_text, write_pairs
from tests.training.runs import assert_same

QUIET = Reporter(quiet=True)
METHODS = {
    "full": ["adapter=null"],
    "lora": [],
    "ggpo": ["ggpo={sigma: 0.1, rule: relative, beta: 0.5, redraw: optimizer-step}"],
}
COMPILED = ["training.torch_compile=true", "training.torch_compile_backend=eager"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "data.jsonl", 40)


def sft(model, data, output):
    """A recipe of which a batch holds all 32 rows to train on."""
    return recipe_text(
        model,
        data,
        output,
        task={"max_length": 64},
        data={"validation_fraction": 0.1, "test_fraction": 0.1},
        adapter={"lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": False},
        training={"max_steps": 3, "per_device_train_batch_size": 32, "learning_rate": 1e-2},
    )


@pytest.fixture
def run(tiny_llama, data, tmp_path):
    def run(name, *overrides):
        text = sft(tiny_llama, data, tmp_path / name)
        return train(parse_recipe(text, "r.yaml", overrides), QUIET)[0]

    return run


def losses(run):
    return [(row["loss"], row["grad_norm"]) for row in run.log if "loss" in row]


@pytest.mark.parametrize("method", METHODS)
def test_packing_and_gradient_checkpointing(run, method):
    """A batch holds all the training rows, so it is the same batch packed or padded."""
    plain = run("plain", *METHODS[method])
    assert len(losses(plain)) == 3
    for name, settings in {
        "packed": ["task.packing=true"],
        "checkpointed": ["training.gradient_checkpointing=true"],
        "both": ["task.packing=true", "training.gradient_checkpointing=true"],
    }.items():
        other = run(name, *METHODS[method], *settings)
        assert losses(other) == [pytest.approx(row, rel=1e-3) for row in losses(plain)], name
        for split, scores in plain.metrics["evaluation"].items():
            assert other.metrics["evaluation"][split]["loss"]["value"] == pytest.approx(
                scores["loss"]["value"], rel=1e-3
            )


def test_on_a_processor_nothing_is_padded_and_logits_are_not_all_taken(run, monkeypatch):
    seen = []
    for module, name in ((build, "flatten"), (trainer, "HeadLoss")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *of, own=own, name=name: seen.append(name) or own(*of))
    run("plain")
    assert seen == ["HeadLoss", "flatten", "flatten", "flatten"]


@pytest.mark.parametrize("method", ["lora", pytest.param("ggpo", marks=pytest.mark.thorough)])
def test_a_compiled_run_is_the_eager_one(run, method):
    plain, compiled = (
        run(name, *METHODS[method], "adapter.target_modules=[q_proj]", *settings)
        for name, settings in (("plain", []), ("compiled", COMPILED))
    )
    assert losses(compiled) == [pytest.approx(row, rel=1e-5) for row in losses(plain)]
    assert compiled.recipe["training"]["torch_compile"] is True


@pytest.mark.parametrize("packing", [False, True])
def test_rows_in_files_change_nothing(run, packing, monkeypatch):
    """A file that is read piece by piece, of which text and tokens are mapped."""
    settings = ["training.per_device_train_batch_size=4", "validate_every=2", f"task.packing={packing}"]
    held = run("held", *settings)
    monkeypatch.setattr(long, "LONG", 0)
    monkeypatch.setattr(long, "PIECE", 7)
    monkeypatch.setattr(spool, "PIECE", 7)
    monkeypatch.setattr(spool, "HELD", 100)
    monkeypatch.setattr(sft_task, "CHUNK", 3)
    mapped = run("mapped", *settings)
    assert_same(mapped.folder, held.folder)
    assert mapped.metrics["evaluation"] == held.metrics["evaluation"]
    assert read_json(mapped.folder / "data.json") == read_json(held.folder / "data.json")


def test_token_probabilities_are_scaled_by_what_the_validation_set_tells(run, data, tmp_path, monkeypatch):
    scored, own = [], Scorer._scores
    monkeypatch.setattr(Scorer, "_scores", lambda *of, **how: scored.append(len(of[2])) or own(*of, **how))
    trained = run("run", "validate_every=3")
    assert scored == [4, 4, 32]  # the last validation, whose scores tell the temperature, and the two other sets
    found = trained.metrics["evaluation"]
    assert list(found) == ["validation", "test", "train"]
    assert "temperature" not in found["validation"]
    temperature = found["test"]["temperature"]["value"]
    assert found["train"]["temperature"]["value"] == temperature
    assert temperature == pytest.approx(TEMPERATURES[-1])  # it has hardly begun to learn, and is far too unsure
    assert found["test"]["scaled_loss"]["value"] < found["test"]["loss"]["value"]
    again = evaluate_run(trained.folder)
    for name, metrics in found.items():
        for metric, of in metrics.items():
            assert again[name][metric]["value"] == pytest.approx(of["value"], rel=1e-4), (name, metric)
    (tmp_path / "other.jsonl").write_text(data.read_text())
    (other,) = evaluate_run(trained.folder, str(tmp_path / "other.jsonl")).values()
    assert other["temperature"]["value"] == temperature
    assert "scaled" not in (trained.folder / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("start", ["init_lora_weights=eva", "init_lora_weights=corda", "layers_by_gradient=0.5"])
def test_a_start_from_packed_rows_reads_examples_that_do_not_see_one_another(run, start, monkeypatch):
    own, apart = build.add_adapter, []

    def add(model, *arguments, batches, **options):
        batch = next(iter(batches()))
        ids, positions = batch["input_ids"], batch["position_ids"]
        row = next(row for row in range(len(ids)) if (positions[row] == 0).sum() > 1)
        begin = int((positions[row] == 0).nonzero()[1])
        end = begin + int((positions[row, begin:].diff() == 1).cumprod(0).sum()) + 1
        with torch.no_grad():
            seen = model(input_ids=ids, position_ids=positions).logits[row, begin:end]
            alone = model(input_ids=ids[row : row + 1, begin:end]).logits[0]
        apart.append(float((seen - alone).abs().max() / alone.abs().max()))
        return own(model, *arguments, batches=batches, **options)

    monkeypatch.setattr(build, "add_adapter", add)
    run("a", "task.packing=true", f"adapter.{start}", "adapter.r=1", "training.max_steps=1")
    assert apart == [pytest.approx(0, abs=1e-5)]


@pytest.mark.parametrize("packing", [False, True])
def test_any_attention_gives_the_same_losses(run, packing, monkeypatch):
    took, own = [], build._collator
    monkeypatch.setattr(build, "_collator", lambda *of: took.append(of[2].config._attn_implementation) or own(*of))
    plain = run("plain", f"task.packing={packing}")
    eager = run("eager", f"task.packing={packing}", "attn_implementation=eager")
    assert took == ["sdpa", "eager"]
    assert losses(eager) == [pytest.approx(row, rel=1e-4) for row in losses(plain)]


def test_packed_runs_have_fewer_steps_an_epoch(run):
    short = ["training.max_steps=-1", "training.num_train_epochs=1", "training.per_device_train_batch_size=1"]
    assert run("a", *short).metrics["training"]["steps"] == 32
    assert run("b", *short, "task.packing=true").metrics["training"]["steps"] < 16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.kind=classification", "task.packing=true"], "sets packing, which kind classification does not look at"),
        (["task.packing=true", "training.use_cache=true"], "task with packing needs training.use_cache: false"),
    ],
)
def test_packing_where_it_cannot_be(run, overrides, message):
    with pytest.raises(UserError, match=message):
        run("a", *overrides)


@pytest.mark.parametrize("command", ["plan", "train"])
def test_what_max_length_takes_is_said_before_training(run, command, tiny_llama, data, tmp_path):
    short = ["task.max_length=12", "training.max_steps=1", "training.per_device_train_batch_size=2"]

    def begin(name, *settings):
        if command == "train":
            return run(name, *settings)
        recipe = sft(tiny_llama, data, tmp_path / name)
        return forecast(parse_recipe(recipe, "r.yaml", settings), 1, QUIET)

    with pytest.warns(UserWarning, match=r"^train: [\d,]+ of 32 rows are cut at task\.max_length = 12 tokens, "):
        begin("cut", *short)
    with pytest.raises(UserError, match=r"^train: [\d,]+ of 32 rows are longer than task\.max_length = 12 tokens: "):
        begin("strict", *short, "task.too_long=refuse")
    assert not (tmp_path / "strict" / "seed-0" / "log.jsonl").exists()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*task.max_length")
        begin("whole", "training.max_steps=1", "training.per_device_train_batch_size=2")


def test_a_further_set_that_cannot_be_read_is_refused_before_training(run, tmp_path):
    turns = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "it"}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join([json.dumps({"messages": turns})] * 3))
    with pytest.raises(UserError, match=r"chats\.jsonl: The tokenizer has no chat template"):
        run("a", f"data.out_of_domain=[{chats}]")
    assert not (tmp_path / "a" / "seed-0" / "log.jsonl").exists()
    run("a")  # which may be corrected


@pytest.mark.parametrize(
    "setting", ["bias=all", "layer_replication=[[0,2],[1,2]]", "use_rslora=true adapter.rank_pattern={q_proj: 4}"]
)
def test_starting_values_that_cannot_be_saved_are_refused_before_training(run, setting):
    overrides = [f"adapter.{one}" for one in setting.split(" adapter.")]
    with pytest.raises(UserError, match="is saved as a difference of two adapters"):
        run("a", "adapter.init_lora_weights=pissa", *overrides)


def test_a_run_of_an_earlier_release_goes_on(run, tmp_path):
    """Its recipe.yaml does not know a setting that has come since: it had the default."""
    first = run("old")
    file = first.folder / "recipe.yaml"
    recipe = yaml.safe_load(file.read_text())
    del recipe["task"]["packing"], recipe["score_test"]
    file.write_text(yaml.safe_dump(recipe))
    assert run("old").metrics == first.metrics
    with pytest.raises(UserError, match=r"task.packing is False there and True here"):
        run("old", "task.packing=true")
