"""Tasks of lm-evaluation-harness, through its own API."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_ggpo.errors import UserError
from lora_ggpo.evaluation.target import Target
from lora_ggpo.tasks import Measured


def run_harness(
    target: Target, tasks: str, folder: str | None, limit: int | None, batch_size: int
) -> dict[str, dict[str, Measured]]:
    """Scores of harness tasks, as the harness computes them, with its standard errors.

    Args:
        tasks: Names of tasks or groups, with commas between them.
        folder: A folder of task files (YAML), instead of the harness's own; code that such a file names is run.
        limit: Problems of each task.

    Raises:
        UserError: the harness is not installed, knows no such task, or cannot load its data.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("Suite harness needs lm-evaluation-harness; install it with: pip install 'lora-ggpo[harness]'")
    if folder and not Path(folder).is_dir():
        raise UserError(f"--data {folder} is no folder; give a folder with the harness's task files.")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(
        pretrained=target.model,
        tokenizer=target.tokenizer,
        backend="causal",
        batch_size=batch_size,
        mixed_precision_dtype=target.autocast,
    )
    try:
        found: Any = lm_eval.simple_evaluate(
            model,
            tasks=[name.strip() for name in tasks.split(",") if name.strip()],
            limit=limit,
            apply_chat_template=target.chat,
            task_manager=TaskManager(include_path=folder, include_defaults=folder is None),
            log_samples=False,
        )
    except (KeyError, ValueError, OSError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split()).rstrip(".")
        raise UserError(f"lm-evaluation-harness cannot run {tasks}: {reason}.") from error
    return {name: metrics for name, row in found["results"].items() if (metrics := _metrics(row, found, name))}


def _metrics(row: Mapping[str, Any], found: Mapping[str, Any], task: str) -> dict[str, Measured]:
    """The harness names a value "acc,none" (metric, filter) and its error "acc_stderr,none"."""
    n = int(found["n-samples"].get(task, {}).get("effective", 0))
    values = {key: value for key, value in row.items() if isinstance(value, float | int) and "_stderr," not in key}
    metrics = {}
    for key, value in values.items():
        name, comma, used = key.partition(",")
        error = row.get(f"{name}_stderr,{used}", math.nan)
        if comma:
            label = name if used == "none" else f"{name} ({used})"
            metrics[label] = Measured(float(value), float(error) if isinstance(error, float | int) else math.nan, n)
    return metrics
