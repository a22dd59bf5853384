"""The model card of a run: what a reader of a hub is told of it, and what the hub itself reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lora_ggpo.data.bundled import GENERAL_TEXT
from lora_ggpo.models.load import BUNDLED
from lora_ggpo.recipe.recipe import Recipe
from lora_ggpo.recipe.source import dump_yaml
from lora_ggpo.statistics.metrics import METRICS, is_scaled
from lora_ggpo.workspace.files import read_json, write_text

_CITATION = """\
@article{chang2025loraggpo,
  title   = {LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation Optimization},
  author  = {Chang, Yupeng and Guo, Chenlu and Chang, Yi and Wu, Yuan},
  journal = {arXiv preprint arXiv:2502.14538v1},
  year    = {2025}
}
"""
_OF_FORGETTING = " Forgetting is the rise of the loss on general text by the training, in nats a token."
_LOAD = {
    "AutoModelForSequenceClassification": "AutoPeftModelForSequenceClassification",
    "AutoModelForCausalLM": "AutoPeftModelForCausalLM",
    "AutoModelForSeq2SeqLM": "AutoPeftModelForSeq2SeqLM",
}


def write_card(folder: Path, weights: Path, recipe: Recipe, scores: Mapping[str, Any]) -> None:
    """Write ``README.md`` of the weights that the run in `folder` has trained.

    Args:
        scores: As metrics.json holds them, by set and metric.
    """
    name = f"{Path(recipe.output).name}-{folder.name}"
    scores = {name: {key: of[key] for key in of if not is_scaled(key)} for name, of in scores.items()}
    data = _metadata(name, recipe, scores).to_yaml()
    write_text(weights / "README.md", f"---\n{data}\n---\n\n{_text(name, folder, recipe, scores)}")


def _metadata(name: str, recipe: Recipe, scores: Mapping[str, Any]) -> ModelCardData:
    headed = recipe.task.type.architecture.new_head
    task = "text-classification" if headed else "text-generation"
    source = public_place(recipe.data.source)
    results = [
        EvalResult(
            task_type=task,
            dataset_type=source,
            dataset_name=source if name in ("test", "validation") else name,
            dataset_split=name,
            metric_type=metric,
            metric_name=METRICS[metric].label if metric in METRICS else metric,
            metric_value=found["value"],
        )
        for name, metrics in scores.items()
        if not name.startswith("train")
        for metric, found in metrics.items()
        if found["value"] is not None
    ]
    return ModelCardData(
        base_model=public_base(recipe),
        datasets=[source] if "/" in source else None,
        eval_results=results or None,
        library_name="peft" if recipe.adapter else "transformers",
        model_name=name,
        pipeline_tag=task,
        tags=["lora-ggpo", *(["lora"] if recipe.adapter else []), *(["ggpo"] if recipe.ggpo else [])],
    )


def _text(name: str, folder: Path, recipe: Recipe, scores: Mapping[str, Any]) -> str:
    versions = read_json(folder / "versions.json")
    made = ", ".join(f"{key} {versions[key]}" for key in sorted(versions) if key not in ("platform", "threads"))
    noise = "with LoRA-GGPO, under small random perturbations of the full weight" if recipe.ggpo else "without noise"
    kind = "A PEFT adapter" if recipe.adapter else "A fully fine-tuned model"
    base, data = public_base(recipe), public_place(recipe.data.source)
    return (
        f"# {name}\n\n{kind} for `{base}`, trained on {data} (task `{recipe.task.kind}`) {noise}, with seed "
        f"{folder.name.removeprefix('seed-')}.\n\n"
        f"## Results\n\n{_table(scores)}\n"
        "± is the standard error: how well the set knows the value, not how it varies from seed to seed."
        f"{_OF_FORGETTING if GENERAL_TEXT in scores else ''}\n\n"
        f"## Use\n\n{_use(recipe)}\n"
        f"## How it was made\n\n    lora-ggpo train recipe.yaml\n\nwith\n\n```yaml\n{_shown(recipe, folder)}```\n\n"
        f"{made}.\n\n## Citation\n\n```bibtex\n{_CITATION}```\n"
    )


def _table(scores: Mapping[str, Any]) -> str:
    metrics = list(dict.fromkeys(metric for found in scores.values() for metric in found))
    rows = [["set", "rows", *metrics], ["---", *["---:"] * (len(metrics) + 1)]]
    for name, found in scores.items():
        rows.append([name, str(next(iter(found.values()))["n"]), *(_cell(found.get(metric)) for metric in metrics)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return "–"
    return f"{found['value']:.4f}" + (f" ± {found['se']:.4f}" if found["se"] is not None else "")


def _use(recipe: Recipe) -> str:
    loader = recipe.task.type.architecture.auto_class.__name__
    package, name = ("peft", _LOAD[loader]) if recipe.adapter else ("transformers", loader)
    head = ", num_labels=..." if recipe.adapter and recipe.task.type.architecture.new_head else ""
    return f'```python\nfrom {package} import {name}\n\nmodel = {name}.from_pretrained("PLACE"{head})\n```\n'


def _shown(recipe: Recipe, folder: Path) -> str:
    """The recipe, with what lies on this machine under its name alone."""
    values = recipe.resolved(int(folder.name.removeprefix("seed-")))
    values["output"] = Path(values["output"]).name
    values["model"] = public_base(recipe)
    values["data"] = {
        **values["data"],
        "source": public_place(recipe.data.source),
        "out_of_domain": [public_place(source) for source in recipe.data.out_of_domain],
    }
    if recipe.forgetting:
        values["forgetting"] = {**values["forgetting"], "source": public_place(recipe.forgetting.source)}
    return dump_yaml({key: value for key, value in values.items() if value is not None})


def public_base(recipe: Recipe) -> str:
    """The model that a recipe trains, as others know it."""
    return BUNDLED[recipe.model].hub if recipe.model in BUNDLED else public_place(recipe.model)


def public_place(place: str) -> str:
    """A hub id or a bundled name as it is, a path, which a recipe holds from the root, by its last part."""
    return Path(place).name if os.path.isabs(place) else place
