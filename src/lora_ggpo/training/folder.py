"""Run folders as they lie on disk, one for each seed of a recipe.

OUTPUT/seed-0/  recipe.yaml    the recipe as resolved; itself a recipe
                versions.json  of Python and the libraries; the day and the precision the run was begun with
                data.json      digest and size of each split, and the labels
                model.json     digests of the base model's files
                forgetting.json  the loss of general texts before training, with the recipe's forgetting
                log.jsonl      one line for each logged step
                training.json  steps, time, memory, parameters: written when training has ended
                checkpoints/   what an unfinished run resumes from
                adapter/       stock PEFT (model/ with full fine-tuning)
                predictions/   one file for each set: a line for each row
                metrics.json   written last: a run that has it is finished
                training.png   the log as curves, which `lora-ggpo train` draws
                calibration.png  likewise, how far probabilities can be trusted
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ggpo.errors import UserError
from lora_ggpo.recipe.source import dump_yaml, read_source
from lora_ggpo.workspace.files import read_json, read_json_lines, write_text
from lora_ggpo.workspace.folder import differences, refuse_changes

if TYPE_CHECKING:
    from lora_ggpo.recipe.recipe import Recipe

# What may change in a run that was begun: its place, and what affects nothing but its memory and speed.
_FREE = (
    ("output",),
    ("seeds",),
    ("frozen_prefix",),
    ("training", "per_device_eval_batch_size"),
    ("training", "dataloader_num_workers"),
    *(("training", name) for name in ("report_to", "run_name", "project")),
)


@dataclass(frozen=True)
class Run:
    """A run folder as it is on disk.

    Attributes:
        written: The recipe as resolved by the release that began the run.
        metrics: None until the run is finished.
    """

    folder: Path
    written: dict[str, Any]
    log: list[dict[str, Any]]
    metrics: dict[str, Any] | None

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe with the defaults of settings that an earlier release did not know; reading it loads libraries."""
        return _resolved(self.folder / "recipe.yaml")


def read_run(folder: Path) -> Run:
    """Read one run folder (``.../seed-0``).

    Raises:
        UserError: it is no run folder, or its files are damaged.
    """
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{folder} is not a run: it has no recipe.yaml; give a folder that `lora-ggpo train` made.")
    if not folder.absolute().name.startswith("seed-") and not (folder / "versions.json").is_file():
        raise UserError(f"{file} is a recipe, not a run; give the folder that `lora-ggpo train` made.")
    metrics = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else None
    if metrics is not None and not (isinstance(metrics, dict) and {"evaluation", "training"} <= metrics.keys()):
        raise UserError(f"{folder / 'metrics.json'} is damaged: it holds no metrics.")
    return Run(folder, read_source(file).values, read_json_lines(folder / "log.jsonl"), metrics)


def finished_metrics(run: Run) -> dict[str, Any]:
    """What the run ended with.

    Raises:
        UserError: it is unfinished.
    """
    if run.metrics is None:
        raise UserError(f"{run.folder} is not finished; give its `lora-ggpo train` command again to finish it.")
    return run.metrics


def kept_temperature(run: Run) -> float | None:
    """At which a finished run measured the probabilities of tokens; None where it did not."""
    evaluation = finished_metrics(run)["evaluation"]
    return next((of["temperature"]["value"] for of in evaluation.values() if "temperature" in of), None)


def find_runs(path: Path) -> list[Run]:
    """The runs at `path`: itself, or the seeds below it, in the order of the seeds.

    An empty folder of a seed, which a run killed as it began leaves behind, is passed over.

    Raises:
        UserError: there is none, or the seeds are of different recipes, so that a mean over them says nothing.
    """
    seeds = {
        int(number): folder
        for folder in path.glob("seed-*")
        if (number := folder.name.removeprefix("seed-")).isdecimal() and any(folder.glob("[!.]*"))
    }
    if not seeds and not (path / "recipe.yaml").is_file():
        raise UserError(_no_run(path))
    runs = [read_run(seeds[number]) for number in sorted(seeds)] or [read_run(path)]
    first, free = runs[0], (*_FREE, ("ggpo", "seed"))
    for other in runs[1:]:
        if not any(differences(first.written, other.written, free)):
            continue
        for name, one, another in differences(first.recipe, other.recipe, free):
            raise UserError(
                f"{first.folder} and {other.folder} are runs of different recipes: {name} is {one} in "
                f"{first.folder.name} and {another} in {other.folder.name}; choose one of them."
            )
    return runs


def _no_run(path: Path) -> str:
    below, report = sorted(folder.parent for folder in path.glob("**/runs/*/seed-*")), path / "report.html"
    if below and report.is_file():
        return f"{path} holds several methods, whose report is {report}; give the runs of one, such as {below[0]}."
    return f"There is no run in {path}; give a folder that `lora-ggpo train` made."


def is_begun(folder: Path) -> bool:
    """Whether the folder holds results that another recipe or other data would spoil."""
    names = ("adapter", "model", "metrics.json")
    logged = read_json_lines(folder / "log.jsonl")
    return bool(logged) or any((folder / n).exists() for n in names) or any(folder.glob("checkpoints/checkpoint-*"))


def claim_run(folder: Path, resolved: dict[str, Any], *, begun: bool) -> None:
    """Write the recipe into `folder`; check that a run begun there has the same.

    Raises:
        UserError: it is not.
    """
    file = folder / "recipe.yaml"
    if begun and file.exists():
        refuse_changes(f"{folder} holds a run of another recipe", _resolved(file), resolved, "output", free=_FREE)
    if not (folder / "metrics.json").is_file():
        write_text(file, dump_yaml(resolved))


def check_checkpoint(checkpoint: Path, resolved: dict[str, Any]) -> None:
    """Refuse a checkpoint of another recipe (those of an earlier release do not say which one they are of).

    Raises:
        UserError: it is of another one.
    """
    file = checkpoint / "recipe.yaml"
    if file.is_file():
        found = f"{checkpoint} is of another recipe"
        refuse_changes(found, _resolved(file), resolved, "output, or delete it", free=_FREE)


def weights_folder(folder: Path, recipe: Recipe) -> Path:
    """Where the run in `folder` keeps what it trained."""
    return folder / ("model" if recipe.adapter is None else "adapter")


def summary(run: Run) -> str:
    """The recipe of a run in a few lines."""
    chosen = recorded_precision(run.folder) or "fp32"
    try:
        return _summary(run.written, chosen)
    except (LookupError, TypeError, AttributeError):  # of an earlier release, or damaged, which is then said
        return _summary(run.recipe, chosen)


def _summary(recipe: dict[str, Any], precision: str) -> str:
    data, sections = recipe["data"], ("sam", "mgpo", "bi_lora", "optimizer")
    best = {name: recipe[name] for name in ("keep_metric", "patience")}
    lines = {
        "model": recipe["model"] + (f" in {recipe['quantise']}" if recipe["quantise"] else ""),
        "task": recipe["task"]["kind"],
        "data": _short({name: data[name] for name in ("source", "train_size", "label_noise", "out_of_domain")}),
        "adapter": _short(recipe["adapter"]) if recipe["adapter"] else "none (full fine-tuning)",
        "ggpo": _short(recipe["ggpo"]) if recipe["ggpo"] else "none",
        **{name: _short(recipe[name]) for name in sections if recipe[name]},
        "training": _short(recipe["training"]),
        "keep": ", ".join([recipe["keep"], *filter(None, [_short(best)])]),
        "precision": describe_precision(recipe["precision"], precision),
    }
    return "\n".join(f"{name:10}{value}" for name, value in lines.items())


def recorded_precision(folder: Path) -> str | None:
    """The precision that the run in `folder` was begun with, if it says so."""
    file = folder / "versions.json"
    found = read_json(file) if file.is_file() else {}
    return found.get("precision") if isinstance(found, dict) else None


def describe_precision(asked: str, chosen: str) -> str:
    """``fp32``, or ``auto: fp32``."""
    return f"{asked}: {chosen}" if asked == "auto" else asked


def _short(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, [], 0.0))


def _resolved(file: Path) -> dict[str, Any]:
    """The recipe of a run; an earlier release did not know all the settings, whose defaults it then had."""
    from lora_ggpo.recipe.recipe import load_recipe

    recipe = load_recipe(file)
    return recipe.resolved(recipe.seeds[0])
