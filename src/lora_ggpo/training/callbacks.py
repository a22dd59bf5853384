"""What a run does at each step: log, progress, validation, whole checkpoints, a clean stop."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from lora_ggpo.perturbation.fuse import fuse_lora
from lora_ggpo.training.checkpoints import seal
from lora_ggpo.training.forgetting import Forgetting
from lora_ggpo.training.memory import peak, reset_peak
from lora_ggpo.training.sharding import PROCESSES, piece, processes
from lora_ggpo.training.trackers import tracked
from lora_ggpo.training.trainer import NonFiniteLossError
from lora_ggpo.training.validation import Validation
from lora_ggpo.workspace.files import flush_to_disk, read_json_lines, write_json, write_json_lines
from lora_ggpo.workspace.interrupt import StopRequest
from lora_ggpo.workspace.progress import Task
from lora_ggpo.workspace.ranks import any_of, is_first, wait_for_all


class FuseCallback(TrainerCallback):
    """Trains layers of plain LoRA by the forward pass that GGPO takes, so that methods differ in what they are."""

    def __init__(self) -> None:
        self._detach: Callable[[], None] = lambda: None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with suppress(ValueError):  # there is no such layer
            self._detach = fuse_lora(kwargs["model"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._detach()


@dataclass(eq=False)
class RunCallback(TrainerCallback):
    """Keeps the log and the checkpoints of a run. Add it after all other callbacks: it logs and seals what they write.

    Attributes:
        log: The log file. Lines past the step that training starts from are dropped: they are about to be made again.
        first_step: That step.
        task: Shows progress.
        stop: Asks for a clean stop.
        validation: Measures the model now and then, and says when training has gone on enough.
        forgetting: Measures it before the first step; None does not.
        checkpoints: Number of checkpoints to keep; None is all.
        track: Hands what was measured to the trackers, if there are any.
    """

    log: Path
    first_step: int
    task: Task
    stop: StopRequest
    validation: Validation
    forgetting: Forgetting | None
    checkpoints: int | None
    track: Callable[[dict[str, Any]], None]

    def __post_init__(self) -> None:
        kept = [row for row in read_json_lines(self.log) if row["step"] <= self.first_step]
        if is_first():
            write_json_lines(self.log, kept)
        self._seconds = max((row["seconds"] for row in kept), default=0.0)
        self._step_start = 0.0
        self._note = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.forgetting:
            self.forgetting.look_before(kwargs["model"])
        self.task.begin(state.global_step)
        reset_peak(args.device)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._step_start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._seconds += time.perf_counter() - self._step_start
        self.task.update(state.global_step, state.max_steps, self._note)
        self.stop.made = any_of(self.stop.made)  # another process may have got the signal
        if self.stop.made:
            control.should_training_stop = True
            control.should_save = args.save_strategy != SaveStrategy.NO
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True  # the log must not average over a checkpoint, or a resumed run logs other means
            _check_finite(kwargs["model"], state.global_step)
        if self.validation.is_due(state.global_step, state.max_steps):
            measured = self.validation.measure(state.global_step, state.epoch)
            self._write(measured)
            if args.report_to:
                logs = control.should_log
                self.track(tracked(measured))
                control.should_log = logs  # which the Trainer takes as done
            control.should_training_stop |= self.validation.is_over()
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        # With fp16 the loss scaler skips a step whose gradient overflows; elsewhere the step is lost.
        if not args.fp16 and not math.isfinite(logs.get("grad_norm", 0.0)):
            raise NonFiniteLossError(f"The gradient is not finite at step {state.global_step}")
        self._note = f"loss {logs['loss']:.4f}"
        self._write({"step": state.global_step, **logs, "peak_memory_bytes": peak(args.device)})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        wait_for_all()  # each process writes a file of its own into it
        if is_first():
            flush_to_disk(self.log)  # a power cut must not take lines that a resumed run does not write again
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            shutil.copyfile(self.log.with_name("recipe.yaml"), checkpoint / "recipe.yaml")  # says whose it is
            self.validation.save(checkpoint)
            write_json(checkpoint / PROCESSES, processes(args))
            seal(checkpoint, self.checkpoints)

    def _write(self, row: dict[str, Any]) -> None:
        if not is_first():
            return
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "seconds": round(self._seconds, 3)}) + "\n")


def _check_finite(model: nn.Module, step: int) -> None:
    """Keep weights that are not finite out of checkpoints: without clipping, nobody looks at the gradient's norm."""
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    broken = next((name for name, parameter in trained if not torch.isfinite(piece(parameter)).all()), None)
    if any_of(broken is not None):
        raise NonFiniteLossError(f"The weights of {broken or 'another process'} are not finite after step {step}")
