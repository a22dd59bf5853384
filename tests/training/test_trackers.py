"""Trackers: what a run reports to them, where, and under which name; and that it computes the same."""

import math
import sys
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from lora_ggpo.errors import DivergedError, UserError
from lora_ggpo.recipe.recipe import load_recipe
from lora_ggpo.training import trackers
from lora_ggpo.training.forecast import forecast
from lora_ggpo.training.run import train
from lora_ggpo.training.trackers import tracking
from lora_ggpo.workspace.progress import Reporter
from tests.training.runs import assert_same

QUIET = Reporter(quiet=True)


@pytest.fixture
def reports(monkeypatch):
    """What a stand-in for Weights & Biases is given: (name of the run, project, step, metrics) of each call."""
    found = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            names = integration_utils.rewrite_logs(logs)  # as all of transformers' trackers do
            found.append((args.run_name, args.project, state.global_step, names))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: ["wandb"])
    return found


def test_a_tracker_is_given_losses_diagnostics_and_validations_and_changes_nothing(
    finished, recipe_file, reports, monkeypatch
):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    settings = ["training.report_to=wandb", "training.run_name=reviews", "training.project=study"]
    (run,) = train(load_recipe(recipe_file, settings), QUIET)
    assert_same(run.folder, finished[1].folder)
    assert {(name, project) for name, project, *_ in reports} == {("reviews-seed-0", "study")}
    wanted = [
        (row["step"], f"train/{key}", row[key]) for row in run.log for key in row if key.startswith(("loss", "ggpo/"))
    ]
    wanted += [
        (row["step"], f"eval/{key.removeprefix('validation/')}", row[key])
        for row in run.log
        for key in row
        if key.startswith("validation/")
    ]
    assert len(wanted) > 12 * 9
    told = {(step, key): value for _, _, step, metrics in reports for key, value in metrics.items()}
    for step, key, value in wanted:
        assert told[step, key] == value


def test_a_run_goes_on_with_another_tracker_and_plan_uses_none(recipe_file, reports, monkeypatch):
    settings = ["training.max_steps=2", "ggpo=null", "validate_every=null"]
    (run,) = train(load_recipe(recipe_file, settings), QUIET)
    (run.folder / "metrics.json").unlink()
    train(load_recipe(recipe_file, [*settings, "training.report_to=[wandb]", "training.project=other"]), QUIET)
    forecast(load_recipe(recipe_file, [*settings, "training.report_to=wandb"]), 1, QUIET)
    assert reports == []
    output = f"output={recipe_file.parent / 'other'}"
    train(load_recipe(recipe_file, [*settings, "training.report_to=wandb", output]), QUIET)
    assert {name for name, *_ in reports} == {"other-seed-0"}


def test_a_tracker_that_is_not_installed_is_one_sentence(recipe_file, monkeypatch):
    monkeypatch.setattr("lora_ggpo.tasks.base.load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(UserError, match=r"training\.report_to mlflow needs its package; .*: pip install mlflow"):
        train(load_recipe(recipe_file, ["training.report_to=[tensorboard,mlflow]"]), QUIET)
    with pytest.raises(UserError, match=r"training\.report_to"):
        load_recipe(recipe_file, ["training.report_to=tensorbord"])


def test_a_run_of_weights_and_biases_ends_with_ours_but_not_one_that_was_there(monkeypatch):
    wandb, ended, environment = SimpleNamespace(run=None, finish=lambda: ended.append(True)), [], {}
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(trackers, "os", SimpleNamespace(environ=environment))
    args = SimpleNamespace(report_to=["wandb"], output_dir="o/checkpoints")
    trainer = SimpleNamespace(args=args, callback_handler=SimpleNamespace(callbacks=[]))
    with pytest.raises(DivergedError), tracking(trainer, "study"):
        raise DivergedError("a loss that is not finite")
    assert environment == {"WANDB_PROJECT": "study"}
    assert ended == [True]
    wandb.run = object()
    with tracking(trainer, None):
        pass
    assert ended == [True]


def test_the_event_file_of_tensorboard(recipe_file):
    """Read by TensorBoard itself, beside the run's other files; both seeds have one of their own."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = ["training.report_to=tensorboard", "training.max_steps=2", "validate_every=2", "seeds=[0,1]"]
    for run in train(load_recipe(recipe_file, settings), QUIET):
        (file,) = (run.folder / "tensorboard").iterdir()
        assert file.name.startswith("events.out.tfevents")
        events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
        read = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        logged = {row["step"]: row for row in run.log if "loss" in row}
        assert read["train/loss"] == pytest.approx({step: row["loss"] for step, row in logged.items()}, rel=1e-6)
        shares = {step: row["ggpo/gradient_share"] for step, row in logged.items()}
        assert read["train/ggpo/gradient_share"] == pytest.approx(shares, rel=1e-6)
        (validation,) = (row["validation/log_loss"] for row in run.log if "validation/log_loss" in row)
        assert read["eval/log_loss"] == {2: pytest.approx(validation, rel=1e-6)}
        assert all(math.isfinite(value) for of in read.values() for value in of.values())
