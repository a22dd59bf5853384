"""The best checkpoint: which one it is, against a loop by hand; patience; power cuts; what cannot be kept."""

import copy
from functools import cache

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from lora_ggpo.data import Splits
from lora_ggpo.errors import UserError
from lora_ggpo.recipe.recipe import load_recipe, parse_recipe
from lora_ggpo.training import run
from lora_ggpo.training.build import build_model, load_weights, training_arguments
from lora_ggpo.training.checkpoints import last_whole
from lora_ggpo.training.folder import summary
from lora_ggpo.training.run import train
from lora_ggpo.training.trainer import EpochSampler
from lora_ggpo.training.validation import Validation, best_row, check_validation, is_over
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import recipe_text, write_rows
from tests.training.runs import assert_same

QUIET = Reporter(quiet=True)
STEPS, EVERY, RATE, ROWS = 9, 2, 0.04, 4


@pytest.fixture(scope="module")
def completions(tiny_llama, tmp_path_factory):
    """The text of a recipe by rows of a micro-batch. What it learns helps on the validation rows for six steps."""
    data = tmp_path_factory.mktemp("data")
    for split, count, word in (("train", 14, "good"), ("validation", 5, "bad"), ("test", 3, "bad")):
        rows = ((f"the {'film ' * (n % 5)}{n}", f"is {f'{word} ' * (1 + n % 3)}.") for n in range(count))
        write_rows(data / f"{split}.jsonl", [{"prompt": prompt, "completion": answer} for prompt, answer in rows])

    def text(rows):
        return recipe_text(
            tiny_llama,
            data,
            data / f"batch-{rows}",
            adapter={"r": 16, "target_modules": "all-linear"},
            training={
                "max_steps": STEPS,
                "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": ROWS // rows,
                "learning_rate": RATE,
                "lr_scheduler_type": "constant",
                "save_steps": 4,
                "train_sampling_strategy": "random",
            },
            validate_every=EVERY,
            keep="best",
        )

    return text


@pytest.fixture(scope="module")
def runs(completions):
    """By rows of a micro-batch; the first time that one is asked for, it is carried out."""
    return cache(lambda rows: train(parse_recipe(completions(rows), "r.yaml"), QUIET)[0])


def _loss(model, rows, collate):
    """The mean loss of all tokens that are learnt."""
    batch = collate(rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def _by_hand(recipe, folder):
    """{step: validation loss} and the trained weights of the best, by a plain loop."""
    splits = recipe.task.type.load(recipe.data)
    args = training_arguments(recipe, folder, 0)
    model, tokenizer, rows = build_model(recipe, args, splits)
    task = recipe.task.for_labels(None)
    collate, validation = task.collator(tokenizer), task.encode(splits.validation, tokenizer).to_list()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0)
    order, sampler = [], EpochSampler(list(rows["length"]), 0, None)
    for epoch in range(STEPS):
        sampler.set_epoch(epoch)
        indices = list(sampler)
        order += [indices[begin : begin + ROWS] for begin in range(0, len(indices), ROWS)]
    losses, best = {}, None
    for step in range(1, STEPS + 1):
        _loss(model, rows.select(order[step - 1]).to_list(), collate).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0 or step == STEPS:
            with torch.no_grad():
                losses[step] = _loss(model, validation, collate).item()
            if losses[step] == min(losses.values()):
                best = copy.deepcopy({name: p.detach() for name, p in trained.items()})
    return losses, best


@pytest.mark.parametrize("rows", [ROWS, 1])
def test_the_best_is_that_of_a_loop_by_hand(completions, runs, rows, tmp_path):
    """Also of steps of several micro-batches of unequal numbers of tokens; the last step is a candidate too."""
    recipe, found = parse_recipe(completions(ROWS), "r.yaml"), runs(rows)
    losses, best = _by_hand(recipe, tmp_path / "by-hand")
    logged = {row["step"]: row["validation/loss"] for row in found.log if "validation/loss" in row}
    assert list(logged) == [2, 4, 6, 8, 9]
    assert logged == pytest.approx(losses, rel=1e-4)
    kept = min(losses, key=losses.get)
    assert kept < 8, "the best must not be the last"
    assert found.metrics["training"] | {"steps": STEPS, "kept_step": kept} == found.metrics["training"]
    assert found.metrics["evaluation"]["validation"]["loss"]["value"] == pytest.approx(losses[kept], rel=1e-4)
    model, _ = load_weights(recipe, recipe.task.for_labels(None), found.folder)
    for name, value in best.items():
        torch.testing.assert_close(dict(model.named_parameters())[name], value, rtol=1e-3, atol=1e-5)


def test_patience_spares_the_rest_and_keeps_the_same(completions, runs, tmp_path):
    kept = runs(ROWS).metrics["training"]["kept_step"]
    settings = ["patience=1", f"output={tmp_path}"]
    (patient,) = train(parse_recipe(completions(ROWS), "r.yaml", settings), QUIET)
    assert patient.metrics["training"] | {"steps": kept + EVERY, "kept_step": kept} == patient.metrics["training"]
    assert patient.metrics["evaluation"] == runs(ROWS).metrics["evaluation"]
    assert "\nkeep      best\n" in summary(runs(ROWS))
    assert "\nkeep      best, patience 1\n" in summary(patient)


@pytest.mark.parametrize(("where", "patience"), [("in training", "null"), ("before the weights are saved", "1")])
def test_after_a_power_cut_the_best_is_the_same(completions, runs, where, patience, tmp_path, monkeypatch):
    """In training the cut comes at the validation after the best, and the best after the last checkpoint."""
    whole = runs(ROWS)
    kept, measure = whole.metrics["training"]["kept_step"], Validation.measure
    recipe = parse_recipe(completions(ROWS), "r.yaml", [f"patience={patience}", f"output={tmp_path}"])

    def cut(validation, step=None, *arguments):
        if step is None or step > kept:
            raise SystemError("power cut")
        return measure(validation, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(*((Validation, "measure", cut) if where == "in training" else (run, "new_folder", cut)))
        with pytest.raises(SystemError):
            train(recipe, QUIET)
    checkpoint = last_whole(tmp_path / "seed-0" / "checkpoints")
    assert checkpoint.name == ("checkpoint-4" if where == "in training" else "checkpoint-8")
    (again,) = train(recipe, QUIET)
    if patience == "null":
        assert_same(again.folder, whole.folder)
    assert (
        again.metrics["weights"]["adapter_model.safetensors"] == whole.metrics["weights"]["adapter_model.safetensors"]
    )
    assert again.metrics["evaluation"] == whole.metrics["evaluation"]
    assert again.metrics["training"]["kept_step"] == kept


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("log_loss", [0.7, 0.5, 0.5, 0.6], 1),  # the first of equals
        ("accuracy", [0.7, 0.5, 0.8, 0.6], 2),
        ("mcc", [float("nan"), -0.1, float("nan")], 1),
        ("log_loss", [float("inf"), 9.0], 1),
        ("log_loss", [], None),
    ],
)
def test_which_validation_is_the_best(metric, values, best):
    log = [{"step": 1, "loss": 0.0}, *({"step": n, f"validation/{metric}": v} for n, v in enumerate(values))]
    row = best_row(_recipe(f"keep_metric: {metric}"), log)
    assert (row and row["step"]) == best


@pytest.mark.parametrize(
    ("settings", "values", "over"),
    [
        ("patience: 2", [3.0, 2.0, 2.5], False),
        ("patience: 2", [3.0, 2.0, 2.5, 2.0], True),  # as good is not better
        ("patience: 2", [3.0, 2.0, 2.5, 1.9, 2.0], False),
        ("patience: 1", [], False),
        ("keep: best", [1.0, 2.0, 3.0], False),
        ("stop_loss: 1.5\npatience: 9", [1.0], True),
    ],
)
def test_when_training_is_over(settings, values, over):
    log = [{"step": n, "validation/log_loss": v, "train/log_loss": v} for n, v in enumerate(values)]
    assert is_over(_recipe(settings), log) is over


def _recipe(settings):
    base = "model: minilm\ntask: classification\ndata: movie-reviews\noutput: o\nvalidate_every: 1\n"
    best = "" if "keep: best" in settings else "keep: best\n"
    return parse_recipe(f"{base}{best}{settings}\n", "r.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["keep=best", "validate_every=null"], "keep best takes the best of the validations, .*: set it"),
        (["patience=2"], "patience is looked at where the best is kept; set keep: best, or leave it out"),
        (["keep_metric=f1"], "keep_metric is looked at where the best is kept; set keep: best"),
        (
            ["keep=best", "keep_metric=loss"],
            "keep_metric loss is not measured for task classification; choose one of a",
        ),
        (["keep=best", "patience=0"], "patience must be greater than 0, not 0"),
        (["keep=first"], "keep must be 'last' or 'best', not 'first'"),
    ],
)
def test_settings_that_say_nothing(recipe_file, settings, message):
    with pytest.raises(UserError, match=message):
        load_recipe(recipe_file, settings)


def test_without_validation_rows_there_is_no_best():
    """Files without rows are refused already, and what a source has not is split off; a hub may hold anything."""
    none, some = Dataset.from_dict({"text": []}), Dataset.from_dict({"text": ["a"]})
    check_validation(_recipe("keep: best"), Splits(some, some, some))
    with pytest.raises(UserError, match=r"keep: best needs validation rows, and movie-reviews comes with an empty"):
        check_validation(_recipe("keep: best"), Splits(some, none, some))
