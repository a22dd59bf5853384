"""A frozen head: it stays as it was drawn, goes with the adapter, and stays frozen when a run resumes."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from lora_ggpo.errors import UserError
from lora_ggpo.models.architecture import HEADED
from lora_ggpo.models.load import load_model
from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.training.merge import merge_run
from lora_ggpo.training.reuse import evaluate_run, load_trained
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import recipe_text
from tests.training.runs import assert_same, unfinish

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def recipe(tiny_bert, reviews, tmp_path_factory):
    """Six steps of LoRA on the pooler's one layer, a checkpoint every third."""
    text = recipe_text(
        tiny_bert,
        reviews,
        tmp_path_factory.mktemp("frozen") / "runs",
        task={"kind": "classification", "max_length": 24},
        data={"validation_fraction": 0.167, "test_fraction": 0.167},
        adapter={"r": 4, "target_modules": ["pooler.dense"]},
        training={"max_steps": 6, "per_device_train_batch_size": 8, "save_steps": 3},
        freeze_head=True,
        model_dropout=0,
    )
    return parse_recipe(text, "r.yaml")


@pytest.fixture(scope="module")
def run(recipe):
    return train(recipe, QUIET)[0]


@pytest.fixture(scope="module")
def drawn(tiny_bert):
    """The model as transformers draws its head with the run's seed."""
    set_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)


def test_the_head_stays_and_one_layer_is_trained(run, drawn):
    model = load_trained(run.folder)[0]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    place = "base_model.model.bert.pooler.dense.lora"
    assert trained == {f"{place}_A.default.weight", f"{place}_B.default.weight"}
    assert run.metrics["training"]["trainable_parameters"] == 4 * (32 + 32)
    assert model.get_submodule(f"{place}_B.default").weight.abs().max() > 0
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(head.weight, drawn.classifier.weight)
    assert torch.equal(head.bias, drawn.classifier.bias)


def test_stock_peft_predicts_as_the_run_does(recipe, run, tiny_bert):
    torch.manual_seed(123)  # another head, if it did not come with the adapter
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    model = PeftModel.from_pretrained(base, run.folder / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "adapter")
    lines = [json.loads(line) for line in (run.folder / "predictions" / "test.jsonl").read_text().splitlines()]
    for row, line in zip(recipe.task.type.load(recipe.data).test, lines, strict=True):
        batch = tokenizer(row["text"], truncation=True, max_length=24, return_tensors="pt")
        assert row["id"] == line["id"]
        assert model(**batch).logits.softmax(-1)[0].tolist() == pytest.approx(line["probabilities"], abs=2e-6)


def test_it_is_scored_again_and_merged(run, tmp_path):
    again = evaluate_run(run.folder, reporter=QUIET)["test"]["log_loss"]["value"]
    assert again == pytest.approx(run.metrics["evaluation"]["test"]["log_loss"]["value"], abs=1e-6)
    assert merge_run(run.folder, tmp_path / "merged").difference < 1e-5


def test_it_stays_frozen_when_a_run_resumes(recipe, run, tmp_path):
    whole = shutil.copytree(run.folder, tmp_path / "whole")
    unfinish(run.folder)
    shutil.rmtree(run.folder / "checkpoints" / "checkpoint-6")
    assert_same(train(recipe, QUIET)[0].folder, whole)


def test_full_fine_tuning_with_a_frozen_head(recipe, drawn, tmp_path):
    changed = {
        "adapter": None,
        "output": str(tmp_path / "full"),
        "training": {**recipe.training_fields, "max_steps": 1},
    }
    full = parse_recipe(json.dumps({**recipe.resolved(0), **changed}), "r.yaml")
    model = load_trained(train(full, QUIET)[0].folder)[0]
    assert torch.equal(model.classifier.weight, drawn.classifier.weight)
    assert not torch.equal(model.bert.pooler.dense.weight, drawn.bert.pooler.dense.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": None, "freeze_body": True}, "freeze_head leaves nothing to train beside freeze_body"),
        ({"task": "sft"}, "freeze_head needs task classification or regression"),
        ({"model_dropout": 1}, "model_dropout"),
    ],
)
def test_refused(recipe, changes, message):
    with pytest.raises(UserError, match=message):
        parse_recipe(json.dumps({**recipe.resolved(0), **changes}), "r.yaml")


def test_dropout_in_place_of_the_rates_of_the_config(tiny_bert):
    def rates(**changes):
        model, _ = load_model(tiny_bert, HEADED, {"num_labels": 2}, **changes)
        return {part.p for part in model.modules() if isinstance(part, nn.Dropout)}

    assert rates() == {0.1}
    assert rates(dropout=0.25) == {0.25}
    assert rates(dropout=0.0) == {0.0}
