"""A new task is one class and one row of the table: nothing else knows what tasks there are."""

import json

import numpy as np
import pytest
from datasets import List, Value

from lora_ggpo.comparison.grid import plan_comparison
from lora_ggpo.errors import UserError
from lora_ggpo.models.architecture import HEADED
from lora_ggpo.recipe.recipe import json_schema, load_recipe
from lora_ggpo.recipe.source import read_source
from lora_ggpo.statistics.measured import measure_mean
from lora_ggpo.tasks import TASKS, Task
from lora_ggpo.tasks.base import encoded_row
from lora_ggpo.tasks.regression import TargetReader
from lora_ggpo.training.reuse import evaluate_run
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import recipe_text

SETS = ("validation", "test", "train")


class Guess(Task):
    """The length of a text in words, guessed from its first word; scored by how far the guess is off."""

    reader = TargetReader
    architecture = HEADED
    columns = frozenset({"text", "label"})
    metrics = ("off",)
    loss = "off"
    default_length = 4
    features = {"labels": List(Value("float32"))}  # noqa: RUF012

    @property
    def head(self):
        return {"num_labels": 2}

    def rows(self, dataset, tokenizer, name):
        for row in dataset:
            ids = tokenizer(row["text"].split()[0], truncation=True, max_length=self.config.max_length)["input_ids"]
            yield [encoded_row(ids, [row["target"], 0.0], id=row["id"])]

    def scorer(self, model, tokenizer):
        return lambda batch: model(batch["input_ids"], batch["attention_mask"]).logits

    def measure(self, scores, rows):
        return {"off": measure_mean(np.abs(scores[:, 0] - np.array(rows["labels"][:])[:, 0]))}


@pytest.fixture
def recipe(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "guess", Guess)
    rows = [{"text": f"{'word ' * (n % 7 + 1)}{n}", "label": n % 7 + 2} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = recipe_text(
        tiny_bert,
        tmp_path / "rows.jsonl",
        tmp_path / "runs",
        task={"kind": "guess", "max_length": 4},
        adapter={"target_modules": ["query"]},
        training={"max_steps": 2},
        validate_every=1,
    )
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def test_a_task_that_is_one_class_and_one_row_is_trained_scored_and_compared(recipe, tmp_path):
    (run,) = train(load_recipe(recipe), Reporter(quiet=True))
    assert run.recipe["task"]["max_length"] == 4
    assert {name for row in run.log for name in row if "/" in name} == {"validation/off"}
    scores = run.metrics["evaluation"]
    assert {name: set(metrics) for name, metrics in scores.items()} == {name: {"off"} for name in SETS}
    again = evaluate_run(run.folder, reporter=Reporter(quiet=True))
    assert again["test"]["off"]["value"] == pytest.approx(scores["test"]["off"]["value"], rel=1e-6)
    assert plan_comparison(read_source(recipe), ["lora", "ggpo"], 1, 1, [], None, tmp_path).metric == "off"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task.packing=true", "sets packing, which kind guess does not look at"),
        ("task.template='{text}!'", "sets template, which kind guess does not look at"),
        ("data.prompt=text", "sets prompt, which task guess does not look at"),
        ("data.label_noise=0.1", "sets label_noise, which task guess does not look at"),
        ("task.kind=guesses", "task.kind must be one of classification, .*, guess, not 'guesses'"),
    ],
)
def test_its_recipe_is_checked(recipe, setting, message):
    with pytest.raises(UserError, match=message):
        load_recipe(recipe, [setting])


def test_the_schema_lists_it(recipe):
    assert "guess" in json.loads(json_schema())["$defs"]["TaskConfig"]["properties"]["kind"]["enum"]
