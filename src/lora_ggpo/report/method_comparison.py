"""PEFT's method_comparison (its folder MetaMathQA): runs in the form of its result files, and its results beside ours.

Its form is what ``log_results`` in its ``utils.py`` writes and ``processing.py`` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_ggpo.comparison.results import Results, Row
from lora_ggpo.data.bundled import GENERAL_TEXT
from lora_ggpo.errors import UserError
from lora_ggpo.recipe.recipe import Recipe, load_recipe
from lora_ggpo.report.analysis import TEST, MethodResult, SettingResult
from lora_ggpo.report.tables import NOTHING, TextTable, format_score
from lora_ggpo.statistics.intervals import is_finite, mean_interval
from lora_ggpo.statistics.metrics import METRICS
from lora_ggpo.training.card import public_base, public_place
from lora_ggpo.training.folder import Run, finished_metrics, weights_folder
from lora_ggpo.workspace.files import read_json, write_json

NOT_MEASURED = -1
"""In place of a number that a run does not measure and PEFT's programs need."""

_LIBRARIES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
_BITS = {"nf4": "int4", "int8": "int8"}


# --- ours in its form ----------------------------------------------------------------------------------------------


def write_peft_results(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write a file for each of `runs` into `folder`, named as PEFT names them.

    Raises:
        UserError: a run is unfinished.
    """
    results = [peft_result(run) for run in runs]
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{result['run_info']['experiment_name'].replace('/', '--')}.json" for result in results]
    for file, result in zip(files, results, strict=True):
        write_json(file, result)
    return files


def peft_result(run: Run) -> dict[str, Any]:
    """A finished run as a result of PEFT's; what is `NOT_MEASURED` is a number, and what is unknown null.

    Raises:
        UserError: the run is unfinished.
    """
    metrics, recipe = finished_metrics(run), load_recipe(run.folder / "recipe.yaml")
    training, versions = metrics["training"], read_json(run.folder / "versions.json")
    config = weights_folder(run.folder, recipe) / "adapter_config.json"
    kind = (recipe.adapter_fields or {"type": "full-finetuning"}).get("type", "lora") + ("-ggpo" if recipe.ggpo else "")
    return {
        "run_info": {
            "created_at": f"{versions['begun']}T00:00:00+00:00",
            "total_time": float(NOT_MEASURED),
            "experiment_name": f"{kind}/{Path(recipe.output).name}-{run.folder.name}",
            "peft_branch": "",
            "train_config": _train_config(recipe, training, versions),
            "peft_config": read_json(config) if config.is_file() else None,
            "error_msg": "",
        },
        "train_info": {
            **dict.fromkeys(("accelerator_memory_reserved_avg", "accelerator_memory_max"), NOT_MEASURED),
            "accelerator_memory_reserved_99th": NOT_MEASURED,
            "train_time": training["seconds"],
            "file_size": sum(file.stat().st_size for file in config.parent.glob("*.safetensors")),
            "num_trainable_params": training["trainable_parameters"],
            "num_total_params": training["parameters"],
            "status": "success",
            "metrics": [_last_metrics(run, recipe, metrics)],
        },
        "meta_info": {
            "model_info": {"sha": _of_hub(run.folder / "model.json"), "created_at": None},
            "dataset_info": {public_place(recipe.data.source): {"sha": None, "created_at": None}},
            "package_info": {f"{name}-version": versions.get(name) for name in _LIBRARIES},
            "system_info": {"platform": versions["platform"]},
            "pytorch_info": "",
            "lora_ggpo": {"version": versions["lora-ggpo"], "ggpo": run.recipe["ggpo"]},
        },
    }


def _train_config(recipe: Recipe, training: Mapping[str, Any], versions: Mapping[str, Any]) -> dict[str, Any]:
    fields = _training_fields(recipe)
    return {
        "model_id": public_base(recipe),
        "dtype": _BITS[recipe.quantise] if recipe.quantise else recipe.dtype,
        "max_seq_length": recipe.task.max_length,
        "batch_size": _rows_a_step(recipe, training),
        "batch_size_eval": fields["per_device_eval_batch_size"],
        "max_steps": training["steps"],
        "eval_steps": recipe.validate_every or training["steps"],
        "compile": bool(fields["torch_compile"]),
        "use_gc": bool(fields["gradient_checkpointing"]),
        "query_template": recipe.task.template.replace("{text}", "{query}"),
        "seed": recipe.seeds[0],
        "grad_norm_clip": fields["max_grad_norm"],
        "optimizer_type": recipe.optimizer.kind if recipe.optimizer else _plain(fields["optim"]),
        "optimizer_kwargs": {"lr": fields["learning_rate"], "weight_decay": fields["weight_decay"]},
        "lr_scheduler": _plain(fields["lr_scheduler_type"]),
        "use_amp": versions.get("precision") in ("bf16", "fp16"),
        "autocast_adapter_dtype": True,
        "generation_kwargs": {},
        **dict.fromkeys(("attn_implementation", "init_kv_cache_prefix")),
    }


def _last_metrics(run: Run, recipe: Recipe, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's last entry, from which all its tables are made."""
    training, evaluation = metrics["training"], metrics["evaluation"]
    suite = run.folder / "evaluation" / "gsm8k" / "scores.json"
    solved = read_json(suite)["evaluation"]["gsm8k"] if suite.is_file() else evaluation.get(TEST, {})
    losses = [row["loss"] for row in run.log if is_finite(row.get("loss"))]
    return {
        "step": training["steps"],
        "test accuracy": solved.get("accuracy", {}).get("value"),
        "train loss": losses[-1] if losses else None,
        "train samples": training["steps"] * _rows_a_step(recipe, training),
        "train total tokens": NOT_MEASURED,
        "forgetting": evaluation.get(GENERAL_TEXT, {}).get("forgetting", {}).get("value"),
    }


def _training_fields(recipe: Recipe) -> dict[str, Any]:
    """All of them, where the recipe leaves one out by its default."""
    return {**dict(recipe.training), **recipe.training_fields}


def _plain(value: Any) -> str:
    """A setting that may be an enum's member."""
    return str(getattr(value, "value", value))


def _rows_a_step(recipe: Recipe, training: Mapping[str, Any]) -> int:
    fields = _training_fields(recipe)
    batch = fields["per_device_train_batch_size"] * fields["gradient_accumulation_steps"]
    return int(batch * training.get("processes", 1))


def _of_hub(file: Path) -> str | None:
    return read_json(file).get("commit") if file.is_file() else None


# --- its results beside ours ---------------------------------------------------------------------------------------


def read_peft_results(folder: Path) -> list[dict[str, Any]]:
    """What tables show of the results in `folder`, those that ended well.

    Raises:
        UserError: there is none, or a file has another form; it is named.
    """
    files = sorted(folder.glob("*.json"))
    found = [one for one in map(_read, files) if one]
    if not found:
        raise UserError(f"{folder} holds no result of PEFT's method_comparison; give its folder MetaMathQA/results.")
    return found


def _read(file: Path) -> dict[str, Any] | None:
    content = read_json(file)
    try:
        run, train = content["run_info"], content["train_info"]
        if train["status"] != "success":
            return None
        last, config = train["metrics"][-1], run["train_config"]
        return {
            "experiment": str(run["experiment_name"]),
            "model": str(config["model_id"]),
            "seed": config["seed"],
            "trainable_parameters": int(train["num_trainable_params"]),
            "accuracy": _number(last.get("test accuracy")),
            "forgetting": _number(last.get("forgetting")),
        }
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is no result of PEFT's method_comparison ({error!r}); take it away.") from error


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def peft_tables(settings: Sequence[SettingResult], results: Results) -> list[TextTable]:
    """Ours and PEFT's in one table, if its results were given: those of a single seed have no interval."""
    if not results.peft:
        return []
    model = public_place(str(results.facts.get("recipe", {}).get("model", NOTHING)))
    rows = [_our_row(method, setting, model, results) for setting in settings for method in setting.methods]
    rows += [_their_row(one) for one in results.peft]
    shown = [METRICS[name].heading for name in ("accuracy", "forgetting")]
    header = ("method", "seeds", "model", *shown, "trained parameters")
    return [TextTable("Beside PEFT's method_comparison, whose results are of one seed each", header, tuple(rows))]


def _our_row(method: MethodResult, setting: SettingResult, model: str, results: Results) -> tuple[str, ...]:
    runs = [run for run in results.runs if (run["setting"], run["method"]) == (setting.name, method.name)]
    runs = [run for run in runs if not run["failed"]]
    accuracies = [run["gsm8k"] if "gsm8k" in run else _value(run, TEST, "accuracy") for run in runs]
    rises = [_value(run, GENERAL_TEXT, "forgetting") for run in runs]
    title = f"{method.title} ({setting.name})" if setting.name else method.title
    scores = (_mean(accuracies, "accuracy"), _mean(rises, "forgetting"))
    return (title, str(len(runs)), model, *scores, _count(method.trainable))


def _their_row(one: Row) -> tuple[str, ...]:
    scores = (_mean([one[name]], name) for name in ("accuracy", "forgetting"))
    return (f"PEFT: {one['experiment']}", "1", one["model"], *scores, _count(one["trainable_parameters"]))


def _value(run: Row, name: str, metric: str) -> float | None:
    return _number(run["evaluation"].get(name, {}).get(metric, {}).get("value"))


def _mean(values: Sequence[float | None], metric: str) -> str:
    known = [value for value in values if value is not None]
    return format_score(mean_interval(known) if known else None, METRICS[metric])


def _count(parameters: int | None) -> str:
    return NOTHING if parameters is None else f"{parameters:,}"
