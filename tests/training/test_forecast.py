"""`lora-ggpo plan`: MiniLM on real reviews, a few steps, against independent counts and against a real run."""

import tempfile
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from lora_ggpo.cli import app
from lora_ggpo.errors import UserError
from lora_ggpo.models.architecture import HEADED, label_head
from lora_ggpo.models.load import load_model
from lora_ggpo.recipe.recipe import load_recipe, parse_recipe
from lora_ggpo.training import forecast as module
from lora_ggpo.training import precision
from lora_ggpo.training.checkpoints import last_whole
from lora_ggpo.training.forecast import at_once, forecast, largest_batch, longest_rows, share_of_memory
from lora_ggpo.training.reuse import load_trained
from lora_ggpo.training.run import train
from lora_ggpo.training.scorer import Scorer
from lora_ggpo.training.trainer import RunTrainer
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import recipe_text, write_guided, write_pairs

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def planned(reviews, tmp_path_factory):
    """(forecast of a recipe for MiniLM, whose sizes are those of a real model; a run of half its steps)"""
    file = write_guided(tmp_path_factory.mktemp("planned"), "minilm", reviews)
    half = ["training.max_steps=6", "validate_every=null"]
    return forecast(load_recipe(file), 3, QUIET), train(load_recipe(file, half), QUIET)[0]


def _size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_parameters_are_those_that_peft_counts(planned):
    found, run = planned
    assert (found.trained, found.parameters) == load_trained(run.folder)[0].get_nb_trainable_parameters()
    assert found.perturbed == 12  # query and value of 6 layers


def test_processes_that_share_a_model_out_have_less_each():
    memory = {"frozen weights": 100, "trained parameters": 10, "gradients": 10, "optimizer state": 21, "the rest": 7}
    for shards, each in {
        "zero1": [100, 10, 10, 6, 7],
        "zero2": [100, 10, 3, 6, 7],
        "zero3": [25, 3, 3, 6, 7, 50],
        "fsdp2": [25, 3, 3, 6, 7, 50],
    }.items():
        assert [*share_of_memory(memory, shards, 4, 50).values()] == each
        assert share_of_memory(memory, shards, 1, 50) == memory


def test_two_blocks_and_what_is_in_none_are_put_together():
    blocks = torch.nn.ModuleList(torch.nn.Linear(width, 1, bias=False) for width in (3, 5, 4))
    assert at_once(torch.nn.Sequential(torch.nn.Embedding(7, 2), blocks)) == 4 * (5 + 4 + 7 * 2)


def test_plan_counts_the_shards(recipe_file):
    result = CliRunner().invoke(app, ["plan", str(recipe_file), "--steps=1", "--processes=4", "sharding=fsdp2"])
    assert result.exit_code == 0, result.output
    assert "memory of each of 4 processes" in result.output
    assert "weights put together" in result.output


def test_memory_is_counted_by_parts(planned):
    found, run = planned
    parts = found.memory
    model = load_trained(run.folder)[0]
    frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    assert parts["frozen weights"] == sum(t.numel() * t.element_size() for t in frozen)
    assert parts["trained parameters"] == parts["gradients"] == 4 * found.trained
    assert parts["optimizer state"] == 2 * 4 * found.trained
    assert parts["GGPO: factors"] == 4 * 12 * 8 * (384 + 384)
    assert parts["GGPO: block"] == 0  # which dense noise forms
    assert 0 < parts["GGPO: statistics"] < 12 * 384 * 4 * 20
    assert parts["activations and the rest"] > 0
    assert found.obtainable > sum(parts.values()) > 2**26


def test_time_covers_the_whole_run(planned):
    found, _ = planned
    assert (found.steps, found.rows, found.seeds) == (12, 64, 1)
    assert len(found.step_seconds) == 3
    assert found.training_seconds == pytest.approx(4 * sum(found.step_seconds))
    assert 8 * 3 * 3 < found.tokens_a_second * sum(found.step_seconds) <= 3 * 8 * 24
    assert found.validations == 2
    assert found.validation_seconds > 0
    assert found.scoring_seconds > 0


@pytest.mark.parametrize("changes", [["validate_every=2"], ["validate_every=3", "stop_loss=0.01"], ["keep=best"]])
def test_rows_that_are_scored_are_those_of_a_run(tiny_llama, tmp_path, monkeypatch, changes):
    """A validation behind the last step is not scored again; where the best is kept, it may be of other weights."""
    text = recipe_text(tiny_llama, write_pairs(tmp_path / "data.jsonl"), tmp_path / "runs", validate_every=2)
    recipe, scored = parse_recipe(text, "r.yaml", ["training.learning_rate=0", *changes]), []
    monkeypatch.setattr(module, "_row_seconds", lambda score: 1.0)
    found = forecast(recipe, 1, QUIET)
    plain = Scorer._scores
    watch = lambda self, task, rows, *shown: scored.append(len(rows)) or plain(self, task, rows)  # noqa: E731
    monkeypatch.setattr(Scorer, "_scores", watch)
    train(recipe, QUIET)
    assert found.validation_seconds + found.scoring_seconds == sum(scored)


def test_sizes_are_those_on_disk(planned):
    found, run = planned
    assert found.weights_size == pytest.approx(_size(run.folder / "adapter"), rel=0.03)
    # Beside what grows with the model a checkpoint holds the log, GGPO's row norms and the state of the generators.
    whole = _size(last_whole(run.folder / "checkpoints"))
    assert whole - 150_000 < found.checkpoint_size < whole
    assert found.checkpoints == len(list((run.folder / "checkpoints").iterdir())) == 2


def test_full_fine_tuning_on_few_rows_leaves_nothing_on_disk(recipe_file, monkeypatch, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = sorted(recipe_file.parent.rglob("*"))
    small = ["model=minilm", "adapter=null", "ggpo=null", "task.max_length=8", "data.train_size=16"]
    recipe = load_recipe(recipe_file, [*small, "training.gradient_accumulation_steps=8", "training.max_steps=-1"])
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.0)  # ends after one step that is timed
    found = forecast(recipe, 50, QUIET)
    assert len(found.step_seconds) == 1
    model, _ = load_model("minilm", HEADED, label_head(["negative", "positive"]))
    assert found.trained == found.parameters == sum(p.numel() for p in model.parameters())
    assert found.perturbed is None
    assert found.memory["optimizer state"] == 8 * found.trained
    assert found.memory["frozen weights"] == sum(buffer.nbytes for buffer in model.buffers())
    assert not any("GGPO" in name for name in found.memory)
    assert 4 * found.trained < found.weights_size < 4.1 * found.trained
    assert found.steps == 3  # one an epoch
    assert sorted(recipe_file.parent.rglob("*")) == before
    assert not list(temporary.rglob("*"))


def test_the_command_prints_tables_and_leaves_the_output_alone(recipe_file, monkeypatch):
    monkeypatch.setattr(precision, "is_fast_in_bf16", lambda on_cpu: True)
    overrides = ("ggpo=null", "mgpo.rho=0.05", "seeds=[0,1]", "training.per_device_train_batch_size=2")
    result = CliRunner().invoke(app, ["plan", str(recipe_file), *overrides, "precision=auto", "--steps", "1"])
    assert result.exit_code == 0, result.stderr
    for words in (
        "trained",
        "optimizer state",
        "peak, measured",
        "12 steps on 64 rows",
        "a checkpoint",
        "each of 2 seeds",
        "auto: bf16",
    ):
        assert words in result.stdout
    assert "free for the run, " in result.stdout
    assert "probe with 2 rows a batch: 3/3" in result.stderr
    assert not (recipe_file.parent / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.max_stps=1"], "training.max_stps is not a setting; did you mean max_steps?"),
        (["model=./absent"], "absent': there is no such folder."),
        (["--steps", "0"], "--steps"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(recipe_file, arguments, message):
    result = CliRunner().invoke(app, ["plan", str(recipe_file), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_too_little_memory_is_one_sentence(recipe_file, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(RunTrainer, "training_step", full)
    with pytest.raises(
        UserError, match=r"The memory is full with training\.per_device_train_batch_size 8 and task\.max_l"
    ):
        forecast(load_recipe(recipe_file), 1, QUIET)


def test_the_largest_batch_is_on_the_line_through_two_peaks():
    mib = 2**20
    assert largest_batch({8: 200 * mib, 4: 140 * mib}, 1000 * mib) == (900 - 80) // 15
    assert largest_batch({8: 200 * mib, 4: 140 * mib}, 90 * mib) == 0  # 81 MiB, and one row takes 95
    assert largest_batch({8: 200 * mib, 4: 200 * mib - 1000}, 1000 * mib) is None
    assert largest_batch({8: None, 4: None}, 1000 * mib) is None
    assert largest_batch({8: 200 * mib, 4: 140 * mib}, None) is None


def test_longest_rows_go_round():
    assert longest_rows([3, 9, 5], 2) == [1, 2]
    assert longest_rows([3, 9], 5) == [1, 0, 1, 0, 1]


@pytest.mark.parametrize(("save_steps", "made"), [(0, 1), (4, 3), (0.5, 2)])
def test_checkpoints_that_a_run_leaves(save_steps, made):
    recipe = SimpleNamespace(adalora=False, training_fields={"save_total_limit": None})
    assert module._checkpoints(recipe, SimpleNamespace(save_steps=save_steps), 10) == made
