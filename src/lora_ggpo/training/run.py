"""Carry out a recipe: claim a folder for each seed, build what the recipe asks for, train it, save it, score it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from lora_ggpo.data import Splits
from lora_ggpo.data.bundled import GENERAL_TEXT
from lora_ggpo.errors import DivergedError
from lora_ggpo.methods.initialise import save_difference, save_start
from lora_ggpo.models.adapters import count_parameters
from lora_ggpo.models.saving import save_ends, save_model, save_tokenizer
from lora_ggpo.recipe.recipe import Recipe
from lora_ggpo.statistics.measured import plain
from lora_ggpo.tasks import Task
from lora_ggpo.training.advice import warn_of
from lora_ggpo.training.build import (
    AnyModel,
    build_model,
    build_trainer,
    load_weights,
    scored_sets,
    training_arguments,
)
from lora_ggpo.training.callbacks import RunCallback
from lora_ggpo.training.card import write_card
from lora_ggpo.training.checkpoints import expect_tensors, last_whole, remove_broken, remove_unsealed, step_of
from lora_ggpo.training.folder import Run, check_checkpoint, claim_run, is_begun, read_run, weights_folder
from lora_ggpo.training.forgetting import Forgetting, forgetting_of
from lora_ggpo.training.identity import record, recorded_day, weight_digests
from lora_ggpo.training.memory import memory_errors
from lora_ggpo.training.precision import precision_of
from lora_ggpo.training.prefix import FrozenPrefix, find_prefix
from lora_ggpo.training.scorer import Scorer
from lora_ggpo.training.sharding import check_draws, check_launch, cuts_weights, place, share_steps, whole_weights
from lora_ggpo.training.trackers import tracking
from lora_ggpo.training.trainer import NonFiniteLossError, RunTrainer
from lora_ggpo.training.validation import Validation, is_over, kept_step
from lora_ggpo.workspace.files import new_folder, read_json, read_json_lines, settle, write_json
from lora_ggpo.workspace.folder import work_in
from lora_ggpo.workspace.interrupt import Interrupted, StopRequest, two_stage_interrupt
from lora_ggpo.workspace.libraries import quiet_libraries, versions
from lora_ggpo.workspace.progress import Reporter
from lora_ggpo.workspace.ranks import is_first, wait_for_all

_STOPPING = "Stopping after this step; press Ctrl-C again, or send SIGTERM again, to stop at once."


def train(recipe: Recipe, reporter: Reporter | None = None) -> list[Run]:
    """Run `recipe` once for each of its seeds.

    A finished run is not run again; an unfinished one goes on from its last whole checkpoint.

    Under torchrun (or whatever sets RANK and WORLD_SIZE) the processes share the batches as Trainer has them do; the
    first one writes, and scores the trained model.

    Raises:
        UserError: bad input, a loss that is not finite, a full disk, or a folder that holds a run of another recipe or
            is in use.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint has been saved.
    """
    check_launch(recipe)
    reporter = reporter or Reporter(quiet=not is_first())
    quiet_libraries()
    splits = cache(lambda: recipe.task.type.load(recipe.data))
    with recipe.locate_errors():
        return [_run_seed(recipe, seed, splits, reporter) for seed in recipe.seeds]


def _run_seed(recipe: Recipe, seed: int, splits: Callable[[], Splits], reporter: Reporter) -> Run:
    folder = Path(recipe.output) / f"seed-{seed}"
    args = training_arguments(recipe, folder, seed)
    with work_in(folder, alone=is_first()):
        if is_first():
            begun = is_begun(folder)
            claim_run(folder, recipe.resolved(seed), begun=begun)
            record(folder, recipe.model, splits(), begun=begun)
        wait_for_all()
        if (folder / "metrics.json").is_file():
            reporter.say(f"{folder} is finished already; it is not run again.")
        else:
            _Unfinished(recipe, args, folder, splits(), reporter).finish()
    return read_run(folder)


@dataclass(frozen=True)
class _Unfinished:
    """A run that is not finished, in the folder claimed for it."""

    recipe: Recipe
    args: TrainingArguments
    folder: Path
    splits: Splits
    reporter: Reporter

    def finish(self) -> None:
        """Train what is not trained yet, and score it."""
        if is_first():
            self._record_versions()
        weights = weights_folder(self.folder, self.recipe)
        if weights.is_dir():
            model, tokenizer = load_weights(self.recipe, self._task, self.folder, self.args)
            if cuts_weights(self.args):
                place(RunTrainer(lengths=[], items=len, from_labels=False, model=model, args=self.args))
            score = self._scorer(model, tokenizer)
            score.prepare(scored_sets(self.recipe, self.splits))
            score.prefix = self._prefix(model, tokenizer, next(iter(score.encoded.values())))
        else:
            with memory_errors(self.recipe, "per_device_train_batch_size"):
                score = self._train(weights)
        predictions = self.folder / "predictions"
        predictions.mkdir(exist_ok=True)
        with memory_errors(self.recipe, "per_device_eval_batch_size"):
            found = score.score(scored_sets(self.recipe, self.splits), predictions)
            forgetting = forgetting_of(self.recipe, self.folder, score)
            scores = plain({**found, **({GENERAL_TEXT: forgetting.measure()} if forgetting else {})})
        if not is_first():
            return
        write_card(self.folder, weights, self.recipe, scores)
        took = read_json(self.folder / "training.json")
        metrics = {"evaluation": scores, "training": took, "weights": weight_digests(weights)}
        write_json(self.folder / "metrics.json", metrics)

    def _train(self, weights: Path) -> Scorer:
        """Train, and save what was trained in `weights`; return what scores it."""
        checkpoint = self._checkpoint()
        if checkpoint:
            share_steps(self.args, checkpoint, self.recipe)
        model, tokenizer, rows = build_model(self.recipe, self.args, self.splits, self.folder)
        if is_first() and not checkpoint:
            warn_of(self.recipe, self.args, self.splits, rows)
        start = self.folder / "start"
        moved = isinstance(model, PeftModel) and is_first() and save_start(model, start)
        if moved:
            settle(start)
        score = self._scorer(model, tokenizer)
        score.prepare(scored_sets(self.recipe, self.splits))  # what cannot be scored is found before hours of training
        if checkpoint:
            check_draws(self.args, checkpoint, self.recipe, model)
        score.prefix = self._prefix(model, tokenizer, rows)
        trainer = build_trainer(self.recipe, self.args, model, tokenizer, rows, score.prefix)
        validation = Validation(self.recipe, self.splits, score, model)
        stop = StopRequest()
        with expect_tensors(checkpoint):
            if checkpoint:
                validation.resume(checkpoint, self._log_until(checkpoint))
            if checkpoint and self._is_trained(checkpoint):
                trainer.take_up(str(checkpoint))  # train() would not know where to stop
            else:
                before = forgetting_of(self.recipe, self.folder, score)
                with score.prefix.cut_off() if score.prefix else nullcontext():
                    stop = self._fit(trainer, validation, before, checkpoint)
        kept = validation.take_best()
        if validation.latest != (trainer.state.global_step if kept is None else kept):
            score.forget()  # it was of other weights
        if kept is not None:
            best = f"the best validation by {self.recipe.kept_metric}"
            self.reporter.say(f"{self.folder}: the weights of step {kept} are kept, {best}.")
        whole = whole_weights(model) if cuts_weights(self.args) else None
        if is_first():
            self._save(model, tokenizer, weights, start if moved else None, whole)
        wait_for_all()
        if stop.made:
            text = f"{self.folder} is trained but not scored; give the same command again to score it."
            raise Interrupted(text) from stop.reason
        return score

    def _checkpoint(self) -> Path | None:
        """The checkpoint to go on from; broken ones are deleted first."""
        if is_first():
            remove_broken(self._checkpoints)
        wait_for_all()
        checkpoint = last_whole(self._checkpoints)
        if checkpoint:
            check_checkpoint(checkpoint, self.recipe.resolved(self.args.seed))
        return checkpoint

    def _is_trained(self, checkpoint: Path) -> bool:
        """Whether all steps are done in `checkpoint`."""
        state = read_json(checkpoint / "trainer_state.json")
        return state["global_step"] >= state["max_steps"] or is_over(self.recipe, self._log_until(checkpoint))

    def _fit(
        self, trainer: RunTrainer, validation: Validation, forgetting: Forgetting | None, checkpoint: Path | None
    ) -> StopRequest:
        """Train. A stop asked for in the last step is left for later: what is trained is saved first."""
        if checkpoint:
            self.reporter.say(f"{self.folder}: going on from step {step_of(checkpoint)}.")
        asked = partial(self.reporter.say, _STOPPING)
        with self.reporter.task(f"train {self.folder}") as shown, two_stage_interrupt(asked) as stop:
            callback = RunCallback(
                self.folder / "log.jsonl",
                first_step=step_of(checkpoint) if checkpoint else 0,
                task=shown,
                stop=stop,
                validation=validation,
                forgetting=forgetting,
                checkpoints=self.recipe.training_fields["save_total_limit"],
                track=trainer.log,
            )
            trainer.add_callback(callback)
            with tracking(trainer, self.recipe.training_fields.get("project")):
                self._take_steps(trainer, checkpoint)
        state = trainer.state
        if stop.made and state.global_step < state.max_steps:
            anew = trainer.args.save_strategy == SaveStrategy.NO
            raise Interrupted(
                f"Stopped after step {state.global_step} of {state.max_steps}; give the same command again "
                + ("to begin anew: peft does not keep AdaLoRA's state." if anew else "to go on from there.")
            ) from stop.reason
        return stop

    def _take_steps(self, trainer: RunTrainer, checkpoint: Path | None) -> None:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except NonFiniteLossError as error:
            good = last_whole(self._checkpoints)
            kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            advice = "a lower learning rate, gradient clipping (training.max_grad_norm), or dtype float32"
            raise DivergedError(f"{error}; {kept}. Try {advice}.") from error
        except BaseException:
            if is_first():
                remove_unsealed(self._checkpoints)
            raise

    def _save(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        weights: Path,
        start: Path | None,
        whole: dict[str, Tensor] | None,
    ) -> None:
        """Write training.json and the trained weights, with `start` as their difference to what is kept there.

        Args:
            whole: The weights of a model that is cut.
        """
        write_json(self.folder / "training.json", _training_summary(self._log(), model, self.args))
        with new_folder(weights) as target:
            if start:
                save_difference(model, target, start)
            else:
                save_model(model, target, whole)
            save_ends(model, target)
            save_tokenizer(tokenizer, target)

    def _scorer(self, model: AnyModel, tokenizer: PreTrainedTokenizerBase) -> Scorer:
        return Scorer(self.args, model, tokenizer, self._task, self.reporter)

    def _prefix(self, model: AnyModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> FrozenPrefix | None:
        collate = self._task.collator(tokenizer)
        prefix, told = find_prefix(self.recipe, self.args, model, collate, rows, self.reporter)
        if told:
            self.reporter.say(f"{self.folder}: {told}")
        return prefix

    def _log(self) -> list[dict[str, Any]]:
        return read_json_lines(self.folder / "log.jsonl")

    def _log_until(self, checkpoint: Path) -> list[dict[str, Any]]:
        return [row for row in self._log() if row["step"] <= step_of(checkpoint)]

    @property
    def _task(self) -> Task:
        return self.recipe.task.for_labels(self.splits.labels)

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _record_versions(self) -> None:
        installed = self.recipe.quantise and find_spec("bitsandbytes")
        quantiser = {"bitsandbytes": version("bitsandbytes")} if installed else {}
        machine = {"platform": platform.platform(), "threads": torch.get_num_threads()}
        begun = {"begun": (recorded_day(self.folder / "versions.json", "begun") or date.today()).isoformat()}
        precision = {"precision": precision_of(self.args)}
        write_json(self.folder / "versions.json", {**begun, **precision, **versions(), **quantiser, **machine})


def _training_summary(log: list[dict[str, Any]], model: AnyModel, args: TrainingArguments) -> dict[str, Any]:
    last = max(log, key=lambda row: row["step"], default={"step": 0, "seconds": 0.0})
    trained, parameters = count_parameters(model)
    kept = kept_step(log)
    return {
        "steps": last["step"],
        **({} if kept is None else {"kept_step": kept}),
        "processes": args.world_size,
        "seconds": last["seconds"],
        "seconds_per_step": round(last["seconds"] / max(last["step"], 1), 5),
        "peak_memory_bytes": max((row.get("peak_memory_bytes") or 0 for row in log), default=0) or None,
        "trainable_parameters": trained,
        "parameters": parameters,
    }
