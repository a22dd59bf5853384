"""What is evaluated or chatted with: a finished run, or a model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation.answers import Prompt
from lora_ggpo.models.chat_template import write_day
from lora_ggpo.recipe.recipe import Recipe
from lora_ggpo.tasks import SFT, Task, TaskConfig
from lora_ggpo.tasks.text import prompt_ids
from lora_ggpo.training.build import training_arguments
from lora_ggpo.training.folder import find_runs
from lora_ggpo.training.precision import TYPES, precision_of
from lora_ggpo.training.reuse import load_trained
from lora_ggpo.workspace.files import file_name
from lora_ggpo.workspace.libraries import quiet_libraries

Messages = list[dict[str, str]]

_SAMPLE = 16


@dataclass(frozen=True)
class Target:
    """A model that answers.

    Attributes:
        name: As the user named it, with the seed of a run.
        model: On its device, in eval mode.
        task: Its template goes around what a user asks.
        chat: Whether the tokenizer's chat template does as well.
        autocast: Type of the forward passes; None is the model's own.
        folder: Where its results go.
    """

    name: str
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    chat: bool
    autocast: torch.dtype | None
    folder: Path

    def conversation(self, turns: Sequence[str], answers: Sequence[str], system: str | None = None) -> str | Messages:
        """What precedes the next answer: `turns` of the user, with the `answers` to all but the last.

        Without a chat template a conversation is the turns and answers one behind the other, blank lines between them.
        """
        asked = [self.task.user_turn(turn) for turn in turns]
        if not self.chat:
            pairs = zip(asked, [*(f"{answer.rstrip()}\n\n" for answer in answers), ""], strict=True)
            return "".join(turn + answer for turn, answer in pairs)
        messages = [{"role": "system", "content": system}] if system else []
        for turn, answer in zip(asked, [*answers, None], strict=True):
            messages.append({"role": "user", "content": turn})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return messages

    def prompt(self, name: str, text: str | Messages) -> Prompt:
        """The tokens of a text, or of a `conversation`."""
        return Prompt(name, prompt_ids(self.tokenizer, text))

    def fingerprint(self) -> str:
        """A digest of some values of every parameter, which differs for other weights."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            values = parameter.detach().flatten()
            chosen = values[:: max(1, len(values) // _SAMPLE)].float().cpu().numpy()
            digest.update(name.encode() + chosen.tobytes())
        return digest.hexdigest()[:16]


def find_targets(name: str) -> list[str]:
    """The runs at the path `name`, one for each seed, or `name` itself where it is a model."""
    path = Path(name)
    if (path / "recipe.yaml").is_file() or next(path.glob("seed-*"), None):
        return [str(run.folder) for run in find_runs(path)]
    return [name]


def load_target(
    name: str,
    *,
    chat: bool | None = None,
    dtype: str | None = None,
    template: str | None = None,
    base: str | None = None,
) -> Target:
    """Load a run folder with one seed, a bundled model, a model folder or a hub id.

    Args:
        chat: Use the chat template; None does as the run was trained, and with a model if it has one.
        dtype: Type of a model's weights, "float32" by default; a run has its own.
        template: Goes around what a user asks, as task.template does in a recipe; a run has its own.
        base: Where a run's base model lies now, if it has moved.

    Raises:
        UserError: the run is unfinished or of a task that generates nothing, or the model cannot be loaded.
    """
    quiet_libraries()
    if (Path(name) / "recipe.yaml").is_file():
        if dtype or template:
            option = "--dtype" if dtype else "--template"
            raise UserError(f"{option} is for models, but {name} is a run, whose recipe has it; leave it out.")
        target = _run(name, chat, base)
    elif base:
        raise UserError(f"--model is for runs, but {name} is a model itself; leave it out.")
    else:
        target = _model(name, chat, dtype or "float32", template or SFT.default_template)
    if target.chat and not target.tokenizer.chat_template:
        raise UserError(f"{name} has no chat template; leave out --chat.")
    target.model.eval()
    return target


def _run(name: str, chat: bool | None, base: str | None) -> Target:
    model, tokenizer, recipe, task = load_trained(Path(name), base=base)
    if not task.answers:
        raise UserError(f"{name} is a run of task {recipe.task.kind}, which answers nothing; give one of task sft.")
    args = training_arguments(recipe, Path(name), recipe.seeds[0])
    model.to(args.device)  # type: ignore[arg-type]
    if chat is None:
        chat = _trained_on_chats(recipe, tokenizer)
    return Target(name, model, tokenizer, task, chat, TYPES[precision_of(args)], Path(name) / "evaluation")


def _model(name: str, chat: bool | None, dtype: str, template: str) -> Target:
    task = _task(template)
    model, tokenizer = task.load_model(name, dtype)
    write_day(tokenizer, date.today())
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    if chat is None:
        chat = bool(tokenizer.chat_template)
    folder = Path("runs") / "evaluation" / file_name(name)
    return Target(name, model, tokenizer, task, chat, None, folder)


def _task(template: str) -> Task:
    try:
        return TaskConfig.model_validate({"kind": "sft", "template": template}).for_labels(None)
    except ValidationError as error:
        raise UserError(f"--template: {error.errors()[0]['msg'].removeprefix('Value error, ')}.") from error


def _trained_on_chats(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the run saw the chat template: the recipe says so, or the data holds conversations."""
    task = recipe.task
    if task.chat_template or task.template != task.type.default_template or not tokenizer.chat_template:
        return task.chat_template
    try:
        return "messages" in task.type.load(recipe.data).train.column_names
    except UserError as error:
        raise UserError(
            f"{error} (Needed to see how the run was trained: give --chat or --no-chat instead.)"
        ) from error
