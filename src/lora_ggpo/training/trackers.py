"""Trackers that a run reports to: transformers' own callbacks, with a place and a name for each run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, get_available_reporting_integrations

from lora_ggpo.errors import UserError

_PROJECTS = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}
"""Where these look for what `training.project` says; trackio takes it from the arguments."""


def check_trackers(args: TrainingArguments) -> None:
    """Raise a UserError if a tracker is not installed."""
    available = get_available_reporting_integrations() if args.report_to else []
    for name in args.report_to or ():
        if name not in available:
            raise UserError(f"training.report_to {name} needs its package; install it with: pip install {name}")


@contextmanager
def tracking(trainer: Trainer, project: str | None) -> Iterator[None]:
    """Give the trackers of `trainer` their places, and end what they have begun: runs of one process are not one."""
    args, wandb = trainer.args, sys.modules.get("wandb")
    mine = "wandb" in (args.report_to or ()) and getattr(wandb, "run", None) is None
    for name, variable in _PROJECTS.items():
        if project and name in (args.report_to or ()):
            os.environ.setdefault(variable, project)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(str(args.output_dir)).with_name("tensorboard"))
    try:
        yield
    finally:
        if mine and wandb:
            wandb.finish()


def tracked(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a validation under the names that transformers' callbacks group by."""
    names = {key: key.removeprefix("validation/").replace("/", "_") for key in measured if "/" in key}
    return {f"eval_{name}": measured[key] for key, name in names.items()}
