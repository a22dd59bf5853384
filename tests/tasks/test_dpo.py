"""Task dpo: its loss against the definition in float64 and against TRL used directly, noise, resume, commands."""

import math
import shutil

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from torch.nn import functional as F

from lora_ggpo import GGPOCallback
from lora_ggpo.errors import UserError
from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.tasks.dpo import preference_metrics
from lora_ggpo.tasks.dpo_trainer import PreferenceTrainer
from lora_ggpo.training.build import build_model, build_trainer, training_arguments
from lora_ggpo.training.folder import read_run
from lora_ggpo.training.forecast import forecast
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import recipe_text, write_rows
from tests.tasks.make import evaluate
from tests.training import runs
from tests.training.sharded import MICRO_BATCHES, WORLD, Job, start, write_recipe

QUIET = Reporter(quiet=True)
BETA = 0.3
PAIRS = [
    {
        "prompt": f"the {'film ' * (n % 5)}{n}",
        "chosen": f" is {'good ' * (n % 7)}.",
        "rejected": f" is {'bad ' * (n % 3)}, {n}.",
    }
    for n in range(40)
]
NOISE = "ggpo={sigma: 0.5, rule: relative, beta: 0.5}"


@pytest.fixture
def recipe(tiny_llama, tmp_path):
    """A recipe of 4 steps on 24 pairs, 4 a step; its adapter has left its starting point."""
    data = write_rows(tmp_path / "pairs.jsonl", PAIRS)

    def recipe(*overrides, output="runs", source=data, **changes):
        adapter = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
        task = {"kind": "dpo", "max_length": 64, "beta": BETA}
        text = recipe_text(tiny_llama, source, tmp_path / output, task=task, adapter=adapter, **changes)
        return parse_recipe(text, "r.yaml", overrides)

    return recipe


def built(recipe, folder):
    """(task, model, tokenizer, training rows, arguments) as a run begins with them."""
    args, splits = training_arguments(recipe, folder, 0), recipe.task.type.load(recipe.data)
    model, tokenizer, rows = build_model(recipe, args, splits)
    return recipe.task.for_labels(None), model, tokenizer, rows, args


def log_probability(model, tokenizer, prompt, answer):
    """Of the answer and its end, from the tokens one by one."""
    before = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([[*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]])
    assert ids[0, : len(before)].tolist() == before
    logits = model(input_ids=ids).logits[0].double()
    chances = torch.softmax(logits, dim=-1)
    return sum(torch.log(chances[place - 1, ids[0, place]]) for place in range(len(before), ids.shape[1]))


def margins(model, tokenizer, rows):
    """beta ((log p - log p_ref)(chosen) - (log p - log p_ref)(rejected)) of each pair, by the definition."""
    found = []
    for row in rows:
        sides = [(row["prompt"], row["chosen"]), (row["prompt"], row["rejected"])]
        chosen, rejected = (log_probability(model, tokenizer, *side) for side in sides)
        with model.disable_adapter(), torch.no_grad():
            chosen_before, rejected_before = (log_probability(model, tokenizer, *side) for side in sides)
        found.append(BETA * ((chosen - chosen_before) - (rejected - rejected_before)))
    return torch.stack(found)


def test_scores_are_those_of_the_definition(recipe, tmp_path):
    recipe = recipe()
    task, model, tokenizer, _, _ = built(recipe, tmp_path)
    model.double().eval()
    rows = recipe.task.type.load(recipe.data).test
    found = evaluate(task, model, task.encode(rows, tokenizer), tokenizer, batch_size=3)
    with torch.no_grad():
        expected = margins(model, tokenizer, rows)
    assert found["margin"].value == pytest.approx(float(expected.mean()), abs=1e-6)
    assert found["accuracy"].value == float((expected > 0).double().mean())
    assert found["loss"].value == pytest.approx(float(-F.logsigmoid(expected).mean()), abs=1e-6)
    assert 0 < found["accuracy"].value < 1


def test_metrics_by_hand():
    found = preference_metrics(np.array([[1.0, 0.0], [0.5, 0.5], [-1.0, 1.0]]))
    assert found["accuracy"].value == pytest.approx(1 / 3)
    assert found["accuracy"].se == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 3))
    assert found["margin"].value == pytest.approx((1 + 0 - 2) / 3)
    assert found["margin"].se == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2 / 3))
    assert found["loss"].value == pytest.approx((math.log1p(math.e**-1) + math.log(2) + math.log1p(math.e**2)) / 3)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_loss_and_gradient_are_those_of_the_definition(recipe, tmp_path, accumulation):
    """Of a step over all training rows, in micro-batches of equal and of unequal sizes."""
    size = [24, 10][accumulation > 1]
    settings = [f"training.per_device_train_batch_size={size}", f"training.gradient_accumulation_steps={accumulation}"]
    recipe = recipe(*settings)
    _, model, tokenizer, rows, args = built(recipe, tmp_path)
    trainer = build_trainer(recipe, args, model.double(), tokenizer, rows)
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), accumulation, args.device)
    found = sum(float(trainer.training_step(model, batch, items)) for batch in batches)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss = -F.logsigmoid(margins(model.eval(), tokenizer, recipe.task.type.load(recipe.data).train)).mean()
    loss.backward()
    assert found == pytest.approx(float(loss), rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("ggpo", ["ggpo=null", NOISE])
def test_a_run_is_that_of_trl_used_directly(recipe, tmp_path, ggpo):
    """A batch holds all rows, so that their order does not matter; from the same adapter, with the same noise."""
    recipe = recipe(ggpo, "training.per_device_train_batch_size=24", "training.max_steps=3")
    ours = [row["loss"] for row in train(recipe, QUIET)[0].log if "loss" in row]
    _, model, tokenizer, _, args = built(recipe, tmp_path)
    rows = recipe.task.type.load(recipe.data).train.to_list()
    own = ("per_device_train_batch_size", "max_steps", "learning_rate", "logging_steps")
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(
            str(tmp_path / "trl"),
            **{name: getattr(args, name) for name in own},
            **{"beta": BETA, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no"},
            **{"report_to": [], "disable_tqdm": True},
        ),
        train_dataset=Dataset.from_list([{name: row[name] for name in PAIRS[0]} for row in rows]),
        processing_class=tokenizer,
        callbacks=[GGPOCallback(recipe.ggpo_config(0))] if recipe.ggpo else [],
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".ref." in name:  # our reference is the model without its adapter
                parameter.zero_()
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert len({round(loss, 3) for loss in ours}) == 3


METHODS = [
    "ggpo=null",
    NOISE,
    "sam={rho: 0.5, space: weights}",
    "mgpo={rho: 0.5, beta: 0.9}",
    "adapter.lora_dropout=0.5",
]


def test_the_reference_sees_no_noise_no_move_and_no_dropout(recipe, monkeypatch):
    seen, with_reference = [], PreferenceTrainer._with_reference

    def look(trainer, batch):
        found = with_reference(trainer, batch)
        seen[-1].append(torch.cat([found["ref_chosen_logps"], found["ref_rejected_logps"]]))
        return found

    monkeypatch.setattr(PreferenceTrainer, "_with_reference", look)
    losses = []
    for number, method in enumerate(METHODS):
        seen.append([])
        done = train(recipe(method, "score_test=false", output=f"runs-{number}"), QUIET)[0]
        losses.append([row["loss"] for row in done.log if "loss" in row])
    assert [len(one) for one in seen] == [4] * len(METHODS)
    for other in seen[1:]:
        assert all(map(torch.equal, other, seen[0]))
    assert len({round(loss[-1], 5) for loss in losses}) == len(METHODS)


def test_what_an_optimizer_froze_stays_frozen(recipe, tmp_path):
    """LoRA-FA freezes A, which peft thaws as it switches an adapter on again: here for the reference and for scores."""
    recipe = recipe("optimizer=lora-fa")
    task, model, tokenizer, rows, args = built(recipe, tmp_path)
    trainer = build_trainer(recipe, args, model, tokenizer, rows)
    trainer.create_optimizer()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_B" in name for name in trained)
    trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, args.device)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    evaluate(task, model, task.encode(recipe.task.type.load(recipe.data).test, tokenizer), tokenizer, batch_size=8)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_both_answers_see_the_same_noise(recipe, tmp_path):
    rows = [{"prompt": f"film {n}", "chosen": " is good", "rejected": " is good"} for n in range(40)]
    source = write_rows(tmp_path / "same.jsonl", rows)
    with pytest.warns(UserWarning, match="both answers are the same"):
        log = [row for row in train(recipe(NOISE, source=source), QUIET)[0].log if "loss" in row]
    assert [row["rewards/margins"] for row in log] == pytest.approx([0] * 4, abs=1e-5)
    assert [row["loss"] for row in log] == pytest.approx([math.log(2)] * 4, abs=1e-5)
    assert all(abs(row["rewards/chosen"]) > 1e-2 for row in log)


@pytest.fixture
def chats(recipe, tmp_path):
    """A finished run with GGPO, validation and checkpoints."""
    made = recipe(NOISE, "training.save_steps=2", "validate_every=2", "training.gradient_accumulation_steps=2")
    return made, train(made, QUIET)[0]


def test_a_run_resumes_and_its_adapter_can_be_used(recipe, chats, tmp_path):
    made, run = chats
    assert set(run.metrics["evaluation"]["test"]) == {"accuracy", "margin", "loss"}
    assert run.metrics["evaluation"]["train"]["loss"]["value"] < math.log(2)
    whole = shutil.copytree(run.folder, tmp_path / "whole")
    runs.unfinish(run.folder)
    shutil.rmtree(run.folder / "checkpoints" / "checkpoint-4")
    again = train(made, QUIET)[0]
    runs.assert_same(again.folder, whole)
    assert again.metrics["evaluation"] == run.metrics["evaluation"]
    assert not list(run.folder.rglob("*ref*"))
    for command in ("eval", "merge", "chat"):
        runs.works(runs.invoke(*runs.USES[command](run.folder, tmp_path / command)))
    assert read_run(run.folder).metrics["evaluation"]["test"] == run.metrics["evaluation"]["test"]
    refused = runs.invoke(*runs.USES["sharpness"](run.folder, tmp_path / "sharpness"))
    runs.refused(refused, "is a run of task dpo, whose loss is not the model's own")


def test_it_is_planned(recipe):
    found = forecast(recipe(), 1, QUIET)
    assert (found.rows, found.steps) == (24, 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter=null", "task dpo compares the model with itself without its adapter, and there is no LoRA"),
        (
            "adapter={type: adalora}",
            "task dpo compares the model with itself without its adapter, and there is no LoRA",
        ),
        ("adapter.init_lora_weights=pissa", "init_lora_weights pissa changes it; choose true, gaussian or eva"),
        ("task.packing=true", "task sets packing, which kind dpo does not look at"),
        ("data.completion=chosen", "data sets completion, which task dpo does not look at"),
        ("task={kind: sft, beta: 0.2}", "task sets beta, which kind sft does not look at"),
        ("adapter.target_modules=[lm_head]", "Applying a PEFT adapter to `lm_head` is not supported"),
    ],
)
def test_what_cannot_be(recipe, override, message):
    with pytest.raises(UserError, match=message):
        train(recipe(override), QUIET)


def test_without_trl_it_is_said(recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Task dpo trains with TRL; install it with: pip install 'lora-ggpo\[dpo\]'"):
        recipe().task.for_labels(None).begin(None, None)


# --- several processes ---------------------------------------------------------------------------------------------


def test_two_processes_are_one(tiny_llama, tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    task = {"kind": "dpo", "max_length": 64, "beta": BETA}

    def text(name, micro_batches):
        return write_recipe(tiny_llama, data, tmp_path / name, micro_batches, task=task)

    train(parse_recipe(text("one", MICRO_BATCHES * WORLD), "r.yaml"), QUIET)
    start(WORLD, [Job(text("two", MICRO_BATCHES))])
    one, two = (read_run(tmp_path / name / "seed-0") for name in ("one", "two"))
    for key in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "validation/margin"):
        logged, also = ([row[key] for row in run.log if key in row] for run in (one, two))
        assert logged
        assert also == pytest.approx(logged, rel=1e-4), key
    assert one.metrics["training"]["processes"] == 1
    assert two.metrics["training"]["processes"] == WORLD
    for metric, value in one.metrics["evaluation"]["test"].items():
        assert two.metrics["evaluation"]["test"][metric]["value"] == pytest.approx(value["value"], rel=1e-4)
