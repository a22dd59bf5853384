"""What ends a run before its time: Ctrl-C, SIGTERM, a full disk, a full memory, numbers that are not finite."""

import io
import os
import signal

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_ggpo.errors import DivergedError, UserError
from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.training import checkpoints
from lora_ggpo.training.callbacks import RunCallback
from lora_ggpo.training.run import train
from lora_ggpo.training.scorer import Scorer
from lora_ggpo.training.trainer import RunTrainer
from lora_ggpo.workspace.interrupt import Interrupted
from lora_ggpo.workspace.progress import Reporter
from tests.training.runs import assert_same, invoke, refused, trained


@pytest.mark.parametrize(
    ("step", "settings", "message"),
    [
        (2, [], "Stopped after step 2 of 4; give the same command again to go on from there."),
        (
            2,
            ["adapter.type=adalora", "ggpo=null"],
            "Stopped after step 2 of 4; give the same command again to begin anew",
        ),
        (4, [], "seed-0 is trained but not scored; give the same command again to score it."),
        (4, ["adapter.type=adalora", "ggpo=null"], "seed-0 is trained but not scored"),
    ],
)
def test_what_is_said_at_ctrl_c_is_what_happens(whole, step, settings, message, tmp_path, monkeypatch):
    step_end = RunCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return step_end(self, args, state, control, **kwargs)

    settings = [f"output={tmp_path}", *settings]
    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_step_end", interrupt)
        with pytest.raises(Interrupted, match=message):
            trained(whole[0], *settings)
    said = io.StringIO()
    reporter = Reporter(Console(file=said, width=200))
    train(parse_recipe(whole[0].read_text(), "r.yaml", settings), reporter)
    assert ("going on from step 2" in said.getvalue()) == message.endswith("from there.")
    assert ("train " in said.getvalue()) == (step == 2)


def test_sigterm_saves_a_checkpoint_and_ends_with_143(whole, tmp_path, monkeypatch):
    def terminate(self, args, state, control, step_end=RunCallback.on_step_end, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_step_end", terminate)
        result = invoke("train", whole[0], f"output={tmp_path}")
    assert result.exit_code == 143
    assert "Stopped after step 2 of 4; give the same command again to go on from there." in result.stderr
    result = invoke("train", whole[0], f"output={tmp_path}")
    assert "going on from step 2" in result.stderr
    assert_same(tmp_path / "seed-0", whole[1])


def test_a_process_that_the_signal_did_not_come_to_stops_with_the_others(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_ggpo.training.callbacks.any_of", lambda made: True)
    monkeypatch.setattr("lora_ggpo.training.callbacks._check_finite", lambda *_: None)  # it asks the others too
    with pytest.raises(Interrupted, match="Stopped after step 1 of 4"):
        trained(whole[0], f"output={tmp_path}")
    assert not (tmp_path / "seed-0" / "adapter").exists()


def test_ctrl_c_while_trained_weights_load_stops_at_once(whole, copy, monkeypatch):
    (copy / "metrics.json").unlink()
    monkeypatch.setattr("lora_ggpo.training.run.load_weights", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trained(whole[0], f"output={copy.parent}")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", checkpoints.SEAL])
def test_a_disk_that_fills_up_in_a_checkpoint_leaves_the_one_before(whole, file, tmp_path, monkeypatch):
    """/dev/full in place of one file: the system itself says that there is no space."""

    def full(*_, **__):  # as it says on a full disk; it replaces what stands in place of its file
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    recipe, run = whole
    output, save = f"output={tmp_path}", RunTrainer._save_checkpoint

    def fill(self, *arguments):
        if self.state.global_step == 3:
            folder = tmp_path / "seed-0" / "checkpoints" / "checkpoint-3"
            folder.mkdir(parents=True)
            name = f".{file}.partial" if file == checkpoints.SEAL else file
            (folder / name).symlink_to("/dev/full")
            if file == "adapter_model.safetensors":
                patch.setattr("peft.peft_model.safe_save_file", full)
        return save(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "_save_checkpoint", fill)
        with pytest.raises(UserError, match="is full; free some space and give the same command again"):
            trained(recipe, output)
    left = sorted((tmp_path / "seed-0" / "checkpoints").iterdir())
    assert [path.name for path in left] == ["checkpoint-1", "checkpoint-2"]
    assert all(map(checkpoints.is_whole, left))
    if file == "optimizer.pt":  # whatever the file, what is left is the same
        assert_same(trained(recipe, output), run)


def test_too_little_memory_is_one_sentence_and_smaller_batches_go_on(whole, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    command = ["train", whole[0], f"output={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", full)
        refused(invoke(*command), "The memory is full with training.per_device_train_batch_size 4 and task.max_length")
    command.append("training.per_device_train_batch_size=2")
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", full)
        refused(
            invoke(*command), "The memory is full with training.per_device_eval_batch_size 2 and task.max_length 32"
        )
    trained = (tmp_path / "seed-0" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    result = invoke(*command, "training.per_device_eval_batch_size=1")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "seed-0" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == trained
    assert "per_device_eval_batch_size: 1" in (tmp_path / "seed-0" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("what", "settings", "message"),
    [
        ("loss", [], "The loss is nan at step 3; the last good checkpoint is {}"),
        ("gradient", [], "are not finite after step 3; the last good checkpoint is {}"),
        ("gradient", ["training.save_steps=2"], "The gradient is not finite at step 3; the last good checkpoint is {}"),
        # Without clipping nobody measures the gradient, and the loss tells only at the next step, if there is one.
        ("gradient", ["training.max_grad_norm=0"], "are not finite after step 3; the last good checkpoint is {}"),
        (
            "gradient",
            ["training.max_grad_norm=0", "training.max_steps=3", "training.save_steps=2"],
            "after step 3; the",
        ),
    ],
)
def test_what_is_not_finite_ends_the_run_at_the_last_good_checkpoint(
    whole, what, settings, message, tmp_path, monkeypatch
):
    step_of_trainer = RunTrainer.training_step

    def spoil(self, model, *arguments, **options):
        loss = step_of_trainer(self, model, *arguments, **options)
        if self.state.global_step == 2 and what == "gradient":
            next(p for p in model.parameters() if p.grad is not None).grad[0] = torch.nan
        return loss

    def spoil_loss(self, model, *arguments, **options):
        loss = compute_loss(self, model, *arguments, **options)
        return loss * torch.nan if self.state.global_step == 2 and what == "loss" else loss

    compute_loss = RunTrainer.compute_loss
    monkeypatch.setattr(RunTrainer, "training_step", spoil)
    monkeypatch.setattr(RunTrainer, "compute_loss", spoil_loss)
    good = tmp_path / "seed-0" / "checkpoints" / "checkpoint-2"
    with pytest.raises(DivergedError) as error:
        trained(whole[0], f"output={tmp_path}", *settings)
    assert message.format(good) in str(error.value)
    assert f"the last good checkpoint is {good}. Try a lower" in str(error.value)
    assert checkpoints.last_whole(good.parent) == good
    assert all(torch.isfinite(tensor).all() for tensor in load_file(good / "adapter_model.safetensors").values())
    assert not (tmp_path / "seed-0" / "adapter").exists()
