"""Tasks of lm-evaluation-harness, through its own API."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_ggpo.errors import UserError, first_line
from lora_ggpo.evaluation.suite_run import SuiteRun
from lora_ggpo.statistics.measured import Measured, Scores, plain
from lora_ggpo.workspace.files import digests, json_digest, read_json, write_json


def score(run: SuiteRun) -> Scores:
    """The harness's scores of the tasks behind "harness:". A finished measurement is kept; half of one cannot be."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("Suite harness needs lm-evaluation-harness; install it with: pip install 'lora-ggpo[harness]'")
    data, limit = run.options.data, run.options.limit
    if data and not Path(data).is_dir():
        raise UserError(f"--data {data} is no folder; give a folder with the harness's task files.")
    files = digests((path for path in Path(data).rglob("*") if path.is_file()), Path(data)) if data else {}
    file = run.folder / f"measured-{json_digest([data, limit, version('lm-eval'), files])[:8]}.json"
    if file.is_file():
        run.reporter.say(f"{file} is there already; it is not measured again.")
        return {name: {key: _metric(**one) for key, one in row.items()} for name, row in read_json(file).items()}
    scores = run_harness(run, data)
    write_json(file, plain(scores))
    return scores


def run_harness(run: SuiteRun, folder: str | None) -> Scores:
    """Scores as the harness computes them, with its standard errors.

    Args:
        folder: Of task files (YAML), instead of the harness's own; code that such a file names is run.

    Raises:
        UserError: the harness knows no such task, or cannot load its data.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    target, tasks = run.target, run.suite.partition(":")[2]
    model = HFLM(
        pretrained=target.model,
        tokenizer=target.tokenizer,
        backend="causal",
        batch_size=run.batch_size,
        mixed_precision_dtype=target.autocast,
    )
    try:
        found: Any = lm_eval.simple_evaluate(
            model,
            tasks=[name.strip() for name in tasks.split(",") if name.strip()],
            limit=run.options.limit,
            apply_chat_template=target.chat,
            task_manager=TaskManager(include_path=folder, include_defaults=folder is None),
            log_samples=False,
        )
    except (KeyError, ValueError, OSError) as error:
        reason = first_line(error, str(error.args[0]) if error.args else None).rstrip(".")
        raise UserError(f"lm-evaluation-harness cannot run {tasks}: {reason}.") from error
    scores = {name: _metrics(row, found["n-samples"].get(name, {})) for name, row in found["results"].items()}
    return {name: metrics for name, metrics in scores.items() if metrics}


def _metrics(row: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Measured]:
    """The harness names a value "acc,none" (metric, filter) and its error "acc_stderr,none"."""
    metrics = {}
    for key, value in row.items():
        name, comma, used = key.partition(",")
        if comma and isinstance(value, float | int) and not name.endswith("_stderr"):
            error = row.get(f"{name}_stderr,{used}")
            label = name if used == "none" else f"{name} ({used})"
            metrics[label] = _metric(value, error, counts.get("effective", 0))
    return metrics


def _metric(value: float | None, se: Any, n: int) -> Measured:
    value, se = (float(one) if isinstance(one, float | int) else math.nan for one in (value, se))  # JSON's null was nan
    return Measured(value, se, int(n))
