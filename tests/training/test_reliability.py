"""What a run promises when it is killed, when the disk fills up, and when somebody has been at its files."""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from typer.testing import CliRunner

from lora_ggpo.cli import app
from lora_ggpo.errors import DivergedError, UserError
from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.training import checkpoints
from lora_ggpo.training.callbacks import RunCallback
from lora_ggpo.training.run import train
from lora_ggpo.training.scorer import Scorer
from lora_ggpo.training.trainer import RunTrainer
from lora_ggpo.workspace.interrupt import Interrupted
from lora_ggpo.workspace.progress import Reporter
from tests.training import kills

RECIPE = """\
model: {model}
task: {{kind: sft, max_length: 32}}
data: {{source: {data}, validation_fraction: 0.2, test_fraction: 0.2}}
adapter: {{r: 2, lora_dropout: 0.1, target_modules: [q_proj, v_proj]}}
ggpo: {{sigma: 0.05, rule: relative, beta: 0.5}}
training: {{max_steps: 4, per_device_train_batch_size: 4, learning_rate: 5e-3, logging_steps: 1, save_steps: 1}}
output: {output}
"""
USES = {
    "show": lambda run, out: ["show", run],
    "eval": lambda run, out: ["eval", run],
    "merge": lambda run, out: ["merge", run, out],
    "chat": lambda run, out: ["chat", run],
    "sharpness": lambda run, out: ["sharpness", run, "--rows", 2, "--output", out],
}


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory):
    """(recipe file, folder) of a finished run."""
    folder = tmp_path_factory.mktemp("whole")
    data = folder / "data.jsonl"
    rows = [{"prompt": f"the {'film ' * (n % 5)}{n}", "completion": f"is {'good ' * (n % 7)}."} for n in range(24)]
    data.write_text("\n".join(map(json.dumps, rows)))
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_llama, data=data, output=folder / "runs"))
    return recipe, _train(recipe)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of that run."""
    return _copied(whole[1], tmp_path)


@pytest.fixture
def unfinished(copy):
    """A copy of that run as if it had been killed behind its last checkpoint."""
    (copy / "metrics.json").unlink()
    shutil.rmtree(copy / "adapter")
    return copy


def _copied(run, folder):
    shutil.copytree(run, folder / "runs" / "seed-0")
    return folder / "runs" / "seed-0"


def _train(recipe_file, *overrides):
    return train(parse_recipe(recipe_file.read_text(), "r.yaml", overrides), Reporter(quiet=True))[0].folder


def _run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input="hello\n")


def _refused(result, message):
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        result.stderr.splitlines()[-1]
    ]


def _model_in(folder, run, tiny_llama):
    """Give `run` a copy of its base model, and return that folder."""
    model = shutil.copytree(tiny_llama, folder / "base")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(tiny_llama), str(model)))
    return model


def _assert_same(run, other):
    def log(folder):
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [
            {key: value for key, value in row.items() if key not in ("seconds", "peak_memory_bytes")} for row in rows
        ]

    def weights(folder):
        return (folder / "adapter" / "adapter_model.safetensors").read_bytes()

    assert log(run) == log(other)
    assert weights(run) == weights(other)


def _flip(file):
    """Change one bit in the middle of `file`: its length stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# --- killed ----------------------------------------------------------------------------------------------------------


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tiny_llama, tmp_path):
    """SIGKILL 50 times, and further times the kernel's end of a write in its middle."""
    command = [sys.executable, "-m", "tests.training.kills", str(tmp_path), tiny_llama]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["different"] == []
    assert set(found["kills"]) == {"delay", "torn write", *kills.PHASES}
    assert sum(found["kills"].values()) - found["kills"]["torn write"] == kills.KILLS


# --- a full disk -----------------------------------------------------------------------------------------------------


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
            _train(recipe, output)
    left = sorted((tmp_path / "seed-0" / "checkpoints").iterdir())
    assert [path.name for path in left] == ["checkpoint-1", "checkpoint-2"]
    assert all(map(checkpoints.is_whole, left))
    _assert_same(_train(recipe, output), run)


# --- two at a time ---------------------------------------------------------------------------------------------------


def test_a_run_that_another_process_is_at_is_refused(whole, unfinished):
    code = (
        "import sys\nfrom pathlib import Path\nfrom lora_ggpo.workspace.files import locked\n"
        f"with locked(Path({str(unfinished)!r})): print('mine', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"mine\n"
        before = (unfinished / "log.jsonl").read_bytes()
        _refused(_run("train", whole[0], f"output={unfinished.parent}"), "is in use by another process; wait for it")
        assert (unfinished / "log.jsonl").read_bytes() == before
        other.stdin.close()
    _assert_same(_train(whole[0], f"output={unfinished.parent}"), whole[1])


# --- not finite ------------------------------------------------------------------------------------------------------


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
        _train(whole[0], f"output={tmp_path}", *settings)
    assert message.format(good) in str(error.value)
    assert f"the last good checkpoint is {good}. Try a lower" in str(error.value)
    assert checkpoints.last_whole(good.parent) == good
    assert all(torch.isfinite(tensor).all() for tensor in load_file(good / "adapter_model.safetensors").values())
    assert not (tmp_path / "seed-0" / "adapter").exists()


# --- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [_flip, _cut])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", checkpoints.SEAL])
def test_a_damaged_checkpoint_is_passed_over(whole, unfinished, file, damage):
    damage(unfinished / "checkpoints" / "checkpoint-4" / file)
    result = _run("train", whole[0], f"output={unfinished.parent}")
    assert result.exit_code == 0, result.stderr
    assert "going on from step 3" in result.stderr
    _assert_same(unfinished, whole[1])


@pytest.mark.parametrize("damage", [_flip, _cut])
@pytest.mark.parametrize("use", ["eval", "merge", "chat", "sharpness"])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_refused(copy, file, use, damage, tmp_path):
    damage(copy / "adapter" / file)
    _refused(_run(*USES[use](copy, tmp_path / "out")), f"{file} is damaged: it is not what the run ended with.")


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"{}", b'{"weight": 3}'])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_of_a_run_without_metrics_is_refused(whole, copy, file, content):
    """Killed in scoring, then damaged: there are no digests yet."""
    (copy / "metrics.json").unlink()
    (copy / "adapter" / file).write_bytes(content)
    _refused(_run("train", whole[0], f"output={copy.parent}"), f"Adapter '{copy / 'adapter'}' cannot be loaded: ")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\xff", b"model: [", b"model: minilm\n", b"- 1", b"task: 3", b"data: 2001-99-99"),
        b"{model: minilm, task: sft, data: null, adapter: null, ggpo: null, training: {}}",
    ],
)
@pytest.mark.parametrize("use", ["show", "eval", "merge", "train"])
def test_a_damaged_recipe_of_a_run_is_refused(whole, copy, use, content, tmp_path):
    (copy / "recipe.yaml").write_bytes(content)
    (copy / "metrics.json").unlink(missing_ok=use == "train")
    command = ["train", whole[0], f"output={copy.parent}"] if use == "train" else USES[use](copy, tmp_path / "out")
    _refused(_run(*command), "recipe.yaml")


def test_a_run_whose_log_lacks_a_loss_is_shown(copy):
    log = copy / "log.jsonl"
    first, *others = map(json.loads, log.read_text().splitlines())
    log.write_text("\n".join(map(json.dumps, [first | {"loss": None}, *others])))
    result = _run("show", copy)
    assert result.exit_code == 0, result.output
    assert f" {others[0]['loss']:.3f} to {others[-1]['loss']:.3f}\n" in result.stdout


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("file", ["data.json", "metrics.json"])
def test_damaged_records_of_a_run_are_refused(copy, file, content):
    (copy / file).write_bytes(content)
    _refused(_run("eval", copy), f"{file} is damaged: ")


def test_data_that_changed_under_an_unfinished_run_is_refused(whole, unfinished, tmp_path):
    recipe, changed = whole[0].read_text(), tmp_path / "data.jsonl"
    data = whole[0].with_name("data.jsonl").read_text()
    for text, message in [(data.replace("good", "bad", 1), "The data has changed since"), (data[:-5], "line 24: malf")]:
        changed.write_text(text)
        for file in (unfinished / "recipe.yaml", tmp_path / "recipe.yaml"):
            file.write_text(recipe.replace(str(whole[0].with_name("data.jsonl")), str(changed)))
        _refused(_run("train", tmp_path / "recipe.yaml", f"output={unfinished.parent}"), message)


@pytest.mark.parametrize("use", ["eval", "merge", "chat", "sharpness"])
def test_a_base_model_that_changed_after_the_run_is_refused(copy, tiny_llama, use, tmp_path):
    _flip(_model_in(tmp_path, copy, tiny_llama) / "model.safetensors")
    _refused(_run(*USES[use](copy, tmp_path / "out")), f"is not what {copy} was trained on: its files have changed")


@pytest.mark.parametrize("finished", [True, False])
def test_a_base_model_that_changed_before_the_command_is_given_again_is_refused(
    whole, copy, tiny_llama, finished, tmp_path
):
    if not finished:
        (copy / "metrics.json").unlink()
        shutil.rmtree(copy / "adapter")
    model = _model_in(tmp_path, copy, tiny_llama)
    command = ("train", whole[0], f"output={copy.parent}", f"model={model}")
    if finished:
        assert _run(*command).exit_code == 0  # the same files in another place
    _flip(model / "model.safetensors")
    _refused(_run(*command), f"The model has changed since {copy} was begun")


def test_data_that_changed_after_the_run_is_refused(whole, copy, tmp_path):
    data = whole[0].with_name("data.jsonl")
    changed = tmp_path / "data.jsonl"
    changed.write_text(data.read_text().replace("good", "bad", 1))
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(data), str(changed)))
    _refused(_run("eval", copy), f"The data has changed since {copy} was trained on it; name what to score with --on.")
    command = ("train", whole[0], f"output={copy.parent}", f"data.source={changed}")
    _refused(_run(*command), f"The data has changed since {copy} was begun")


# --- too little memory -----------------------------------------------------------------------------------------------


def test_too_little_memory_is_one_sentence_and_smaller_batches_go_on(whole, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    command = ["train", whole[0], f"output={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", full)
        _refused(_run(*command), "The memory is full with training.per_device_train_batch_size 4 and task.max_length")
    command.append("training.per_device_train_batch_size=2")
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", full)
        _refused(_run(*command), "The memory is full with training.per_device_eval_batch_size 2 and task.max_length 32")
    trained = (tmp_path / "seed-0" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    result = _run(*command, "training.per_device_eval_batch_size=1")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "seed-0" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == trained
    assert "per_device_eval_batch_size: 1" in (tmp_path / "seed-0" / "recipe.yaml").read_text()


# --- what is known only on the way ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.optim=galore_adamw"], "training is rejected by transformers: You need to install `galore_torch`"),
        (["training.lr_scheduler_kwargs={nope: 1}"], "training is rejected by transformers: get_linear_schedule_with"),
        (["training.optim_args='a=b,c'"], "training is rejected by transformers: not enough values to unpack"),
        (["training.optim_args='foo=1'"], "training.optim_args changes nothing with optim adamw_torch"),
        (
            ["training.gradient_checkpointing=true", "training.gradient_checkpointing_kwargs={nope: 1}"],
            "training.gradient_checkpointing_kwargs is rejected by torch: Unexpected keyword arguments: nope.",
        ),
        (["training.log_level=loud"], "training is rejected by transformers: 'loud' is none of its choices"),
        (["training.use_liger_kernel=true"], "training.use_liger_kernel is rejected by transformers: You have set"),
        (["adapter.modules_to_save=[nope]"], "adapter.modules_to_save names 'nope', which the model has not"),
        (
            ["stop_loss=0.1", "validate_every=5"],
            "validate_every is 5, but the run has 4 steps, in which stop_loss is never looked at; lower it.",
        ),
        (
            ["training.dataloader_drop_last=true", "training.per_device_train_batch_size=100"],
            "training rows do not fill one of 100, so there is no step to take",
        ),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_sentence(whole, settings, message, tmp_path):
    _refused(_run("train", whole[0], f"output={tmp_path}", *settings), message)


@pytest.mark.parametrize("name", ["validation", "test", "further.jsonl"])
@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_set_that_cannot_be_scored_is_named_before_training(whole, name, command, tmp_path):
    """All its prompts are too long."""
    short = [{"prompt": f"the {n}", "completion": "good."} for n in range(8)]
    long = [{"prompt": "film " * 100 + str(n), "completion": "good."} for n in range(8)]
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        rows = long if split == name else short
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "further.jsonl").write_text("\n".join(map(json.dumps, long)))
    settings = [f"data.source={tmp_path / 'data'}", f"output={tmp_path / 'runs'}"]
    if name == "further.jsonl":
        settings.append(f"data.out_of_domain=[{tmp_path / name}]")
    _refused(_run(command, whole[0], *settings), f"{name}: No row is left: every prompt fills task.max_length = 32")
    assert not list((tmp_path / "runs").rglob("log.jsonl"))


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


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
            _train(whole[0], *settings)
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
        result = _run("train", whole[0], f"output={tmp_path}")
    assert result.exit_code == 143
    assert "Stopped after step 2 of 4; give the same command again to go on from there." in result.stderr
    result = _run("train", whole[0], f"output={tmp_path}")
    assert "going on from step 2" in result.stderr
    _assert_same(tmp_path / "seed-0", whole[1])


def test_a_process_that_the_signal_did_not_come_to_stops_with_the_others(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_ggpo.training.callbacks.any_of", lambda made: True)
    with pytest.raises(Interrupted, match="Stopped after step 1 of 4"):
        _train(whole[0], f"output={tmp_path}")
    assert not (tmp_path / "seed-0" / "adapter").exists()


def test_ctrl_c_while_trained_weights_load_stops_at_once(whole, copy, monkeypatch):
    (copy / "metrics.json").unlink()
    monkeypatch.setattr("lora_ggpo.training.run._load_weights", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        _train(whole[0], f"output={copy.parent}")


@pytest.mark.parametrize(
    "settings",
    [
        ["adapter.init_lora_weights=pissa"],  # saved with factors of twice the rank
        ["adapter.type=adalora", "ggpo=null", "training.logging_steps=3"],
    ],
)
def test_a_run_killed_in_scoring_ends_with_the_same_metrics_and_a_log_to_the_last_step(whole, settings, tmp_path):
    run = _train(whole[0], f"output={tmp_path}", *settings)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["training"]["steps"] == 4
    (run / "metrics.json").unlink()
    _train(whole[0], f"output={tmp_path}", *settings)
    again = json.loads((run / "metrics.json").read_text())
    assert again["training"] == metrics["training"]


def test_two_test_sets_whose_predictions_would_be_one_file_are_refused(recipe_file, reviews):
    names = ("my reviews.jsonl", "my-reviews.jsonl")
    one, twin = (shutil.copy(reviews, recipe_file.with_name(name)) for name in names)
    with pytest.raises(UserError, match="would have one file name; rename one of them"):
        _train(recipe_file, f"data.out_of_domain=[{one}, {twin}]", "data.source=movie-reviews")
    assert not list(recipe_file.parent.rglob("log.jsonl"))


# --- pickles ---------------------------------------------------------------------------------------------------------


class Payload:
    """What touches `path` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(params=["torch", "pickle"])
def plant(request, tmp_path):
    """Writes a file that touches a marker where somebody unpickles it, and afterwards looks for the marker."""
    marker, planted = tmp_path / "marker", []

    def plant(file):
        if request.param == "torch":
            torch.save({"weight": torch.zeros(1), "more": Payload(marker)}, file)
        else:
            file.write_bytes(pickle.dumps(Payload(marker), protocol=2))
        planted.append(file)

    yield plant
    assert planted
    assert not marker.exists()
    for file in planted:
        if file.exists():  # and it would have worked
            with file.open("rb") as opened:
                torch.load(opened, weights_only=False) if request.param == "torch" else pickle.load(opened)
            assert marker.exists()


@pytest.mark.parametrize("use", ["eval", "merge", "chat", "sharpness"])
@pytest.mark.parametrize("instead", [True, False])
def test_no_pickle_in_an_adapter_is_read(copy, use, instead, plant, tmp_path):
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin"):
        plant(copy / "adapter" / name)
    if instead:
        shutil.move(copy / "adapter" / "adapter_model.safetensors", copy / "adapter" / "other.safetensors")
        _refused(_run(*USES[use](copy, tmp_path / "out")), "adapter_model.safetensors is missing")
    elif use != "sharpness":  # that takes a while, and reads the run as the others do
        result = _run(*USES[use](copy, tmp_path / "out"))
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("instead", [True, False])
def test_no_pickle_in_a_model_is_read(tiny_llama, whole, instead, plant, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "tokenizer.pkl"):
        plant(model / name)
    shutil.copy(whole[1] / "adapter" / "adapter_config.json", model)
    if instead:
        (model / "model.safetensors").unlink()
    for command in (["chat", model], ["train", whole[0], f"model={model}", f"output={tmp_path / 'runs'}"]):
        _refused(_run(*command), f"{model}")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin"])
@pytest.mark.parametrize("step", [3, 4])
def test_no_pickle_in_a_checkpoint_is_read(whole, unfinished, name, step, plant):
    """Whoever plants it can make the seal as well: it is the loading that has to be safe."""
    folder = unfinished / "checkpoints"
    if step == 3:
        shutil.rmtree(folder / "checkpoint-4")
    plant(folder / f"checkpoint-{step}" / name)
    if name == "adapter_model.bin":
        (folder / f"checkpoint-{step}" / "adapter_model.safetensors").unlink()
    checkpoints.seal(folder / f"checkpoint-{step}", None)
    result = _run("train", whole[0], f"output={unfinished.parent}")
    if step == 3 or name == "adapter_model.bin":  # all steps done, nothing but the weights is of use
        _refused(result, f"checkpoint-{step} holds more or less than tensors and is not read; delete it")
    else:
        assert result.exit_code == 0, result.output
