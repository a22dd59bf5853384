"""Values that the libraries take without a word, or answer with a traceback in the first step."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments

from lora_ggpo.errors import UserError
from lora_ggpo.recipe.aliases import ALIASES
from lora_ggpo.recipe.fields import AdapterFields, TrainingFields, why_not_set
from lora_ggpo.recipe.recipe import json_schema, parse_recipe
from lora_ggpo.recipe.source import dump_yaml

RECIPE = """\
model: minilm
task: classification
data: movie-reviews
adapter:
  r: 8
output: runs/x
"""
DOCS = Path(__file__).parents[2] / "docs"
ADALORA = "type: adalora, r: 8"
BEST = "eval_steps: 5, load_best_model_at_end: true"


def refused(section, fields):
    with pytest.raises(UserError) as error:
        parse_recipe(RECIPE.replace("adapter:\n  r: 8", f"{section}: {{{fields}}}"), "r.yaml")
    return str(error.value)


@pytest.mark.parametrize("section", ["AdapterFields", "TrainingFields"])
def test_every_number_has_a_range(section):
    """A number of a later release is to be looked at before it is let through."""
    for name, field in json.loads(json_schema())["$defs"][section]["properties"].items():
        for kind in field.get("anyOf", [field]):
            if kind.get("type") in ("number", "integer") and name != "max_steps":  # -1, or above 0
                assert kind.keys() & {"minimum", "exclusiveMinimum"}, name


@pytest.mark.parametrize("model", [AdapterFields, TrainingFields])
def test_no_number_is_true(model):
    for name, field in json.loads(json_schema())["$defs"][model.__name__]["properties"].items():
        kinds = {kind.get("type") for kind in field.get("anyOf", [field])}
        if kinds & {"number", "integer"} and not kinds & {"boolean", "array"}:
            with pytest.raises(ValueError, match="must be a number, not true"):
                model(**{name: True})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("neftune_noise_alpha", "-5", "must be at least 0, not -5"),
        ("label_smoothing_factor", "2", "must be less than 1, not 2"),
        ("label_smoothing_factor", "-1", "must be at least 0, not -1"),
        ("adam_beta1", "1.5", "must be less than 1, not 1.5"),
        ("adam_beta2", "-0.1", "must be at least 0, not -0.1"),
        ("adam_epsilon", "0", "must be greater than 0, not 0"),
        ("max_grad_norm", "-1", "must be at least 0, not -1"),
        ("weight_decay", "-1", "must be at least 0, not -1"),
        ("warmup_steps", "-3", "must be at least 0, not -3"),
        ("logging_steps", "-1", "must be greater than 0, not -1"),
        ("save_total_limit", "-1", "must be at least 0, not -1"),
        ("max_steps", "-2", "must be above 0, or there is nothing to train"),
        ("max_steps", "true", "must be a number, not true"),
        ("dataloader_num_workers", "-1", "must be at least 0, not -1"),
        ("dataloader_persistent_workers", "true", "is for workers; set training.dataloader_num_workers"),
        ("dataloader_multiprocessing_context", "fork", "is for workers; set training.dataloader_num_workers"),
        ("gradient_checkpointing_kwargs", "{a: 1}", "is for checkpointing; set training.gradient_checkpointing: true"),
        ("accelerator_config", "file.json", "must be a valid dictionary"),
        ("include_num_input_tokens_seen", "some", "must be 'all', 'non_padding' or 'no'"),
        ("parallelism_config", "{}", "cannot be set: the processes share rows and weights, not sequences or layers"),
        ("deepspeed", "nowhere.json", "'nowhere.json' cannot be read as a JSON file"),
        ("fsdp_config", "{version: 2}", "is for FSDP; set sharding: fsdp2, or leave it out"),
        ("debug", "underflow_overflow", "cannot be set: a loss that is not finite stops the run"),
        ("enable_jit_checkpoint", "true", "cannot be set: a run that is asked to stop saves a checkpoint"),
    ],
)
def test_training(field, value, message):
    assert f"r.yaml, line 4: training.{field} {message}" in refused("training", f"{field}: {value}")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", "0", "must be at least 1, not 0"),
        ("r", "1e30", "must be a smaller number"),
        ("lora_alpha", "-1", "must be greater than 0, not -1"),
        ("lora_dropout", "1.0", "must be less than 1, not 1.0"),
        ("lora_dropout", "-0.1", "must be at least 0, not -0.1"),
        ("target_modules", '"*proj["', "'*proj[' is not a regular expression: nothing to repeat"),
        ("exclude_modules", '"*proj["', "'*proj[' is not a regular expression: nothing to repeat"),
        ("layers_pattern", '"(x"', "'(x' is not a regular expression: missing )"),
        ("rank_pattern", '{"*proj[": 3}', "'*proj[' is not a regular expression: nothing to repeat"),
        ("rank_pattern", "{query: 0}", "must be at least 1, not 0"),
        ("alpha_pattern", "{query: -1}", "must be greater than 0, not -1"),
        ("layers_to_transform", "[-1]", "must be at least 0, not -1"),
        ("trainable_token_indices", "[-1]", "must be at least 0, not -1"),
        ("qalora_group_size", "0", "must be at least 1, not 0"),
        ("init_lora_weights", "pissa_niter_99999", "must match pattern"),
        ("eva_config", "{x: 1}", "is not a setting of it"),
        ("deltaT", "5", "is a setting of AdaLoRA; set adapter.type to adalora as well"),
    ],
)
def test_adapter(field, value, message):
    sentence = refused("adapter", f"{field}: {value}")
    assert sentence.startswith(f"r.yaml, line 4: adapter.{field}")
    assert message in sentence


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("init_r", "2", "is the rank AdaLoRA starts from: it must be at least adapter.r, 8, not 2"),
        ("init_r", "0", "must be at least 1, not 0"),
        ("deltaT", "0", "must be at least 1, not 0"),
        ("deltaT", "-3", "must be at least 1, not -3"),
        ("tinit", "-1", "must be at least 0, not -1"),
        ("beta1", "1.5", "must be less than 1, not 1.5"),
        ("beta1", "0", "must be greater than 0, not 0"),
        ("beta2", "-1", "must be greater than 0, not -1"),
        ("orth_reg_weight", "-1", "must be at least 0, not -1"),
        ("use_rslora", "true", "is none of AdaLoRA's settings; leave it out"),
        ("init_lora_weights", "pissa", "is none of AdaLoRA's settings; leave it out"),
        ("rank_pattern", "{query: 4}", "is none of AdaLoRA's settings; leave it out"),
    ],
)
def test_adalora(field, value, message):
    assert f"r.yaml, line 4: adapter.{field} {message}" in refused("adapter", f"{ADALORA}, {field}: {value}")


@pytest.mark.parametrize(
    ("adapter", "further", "message"),
    [
        ("layers_by_gradient: 0.5, layers_to_transform: [0], target_modules: [query]", "", "both choose the blocks"),
        ("layers_by_gradient: 0.5", "quantise: nf4\n", "which quantise nf4 leaves without; leave one of them out"),
        ("layers_by_gradient: 0.5", "sharding: fsdp2\n", "sharding fsdp2 cuts them; leave one of them out"),
        ("layers_by_gradient: 0.5, type: adalora", "", "is none of AdaLoRA's settings"),
        ("layers_by_gradient: 1.5", "", "must be less than or equal to 1, not 1.5"),
        ("layers_by_gradient: 0", "", "must be greater than 0, not 0"),
    ],
)
def test_blocks_by_gradient(adapter, further, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        parse_recipe(RECIPE.replace("adapter:\n  r: 8", f"adapter: {{{adapter}}}") + further, "r.yaml")
    assert "adapter.layers_by_gradient" in str(error.value)


@pytest.mark.parametrize(
    ("adapter", "override", "message"),
    [
        ("sc_lora_beta: 0.5", "", "sc_lora_beta is a setting of SC-LoRA; set adapter.init_lora_weights to sc_lora"),
        ("init_lora_weights: sc_lora, sc_lora_beta: 1.1", "", "sc_lora_beta must be less than or equal to 1, not 1.1"),
        ("init_lora_weights: sc_lora, sc_lora_beta: -1", "", "sc_lora_beta must be at least 0, not -1"),
        ("init_lora_weights: sc_lora, sc_lora_beta: true", "", "must be a number, not true"),
        ("type: adalora, sc_lora_beta: 0.5", "", "sc_lora_beta is none of AdaLoRA's settings; leave it out"),
        ("init_lora_weights: sc_lora", "quantise=nf4", "sc_lora reads or changes them unquantised"),
        ("init_lora_weights: sc_lora", "sharding=zero3", "sc_lora sees whole weights and gradients"),
        ("init_lora_weights: sc_lora", "task.kind=seq2seq-classification", "as task seq2seq-classification has"),
        (
            "init_lora_weights: sc_lora",
            "task.kind=dpo",
            "under the adapter as it was, but adapter.init_lora_weights sc_l",
        ),
    ],
)
def test_sc_lora(adapter, override, message):
    text = RECIPE.replace("adapter:\n  r: 8", f"adapter: {{{adapter}}}")
    with pytest.raises(UserError, match=re.escape(message)):
        parse_recipe(text, "r.yaml", [override] if override else [])


@pytest.mark.parametrize("values", ["sam: {rho: .inf}", "mgpo: {rho: .nan}", "stop_loss: .inf\nvalidate_every: 1"])
def test_what_is_not_finite(values):
    with pytest.raises(UserError, match=r"must be a finite number"):
        parse_recipe(f"{RECIPE}{values}\n", "r.yaml")


def test_the_docs_name_what_is_refused_and_why():
    every = {field.name for field in dataclasses.fields(TrainingArguments)}
    reasons = {name: reason for name in every if (reason := why_not_set("training", name))}
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    table = page.partition("## What a recipe may not set")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+`) \| (.+) \|$", table, re.MULTILINE)
    assert {name: reason for names, reason in rows for name in re.findall(r"`(\w+)`", names)} == reasons
    assert f"{len(reasons)} of {len(every)}" in page
    table = page.partition("## What a recipe takes over")[2].partition("\n## ")[0]
    taken = re.findall(r"^\| `training\.(\w+)", table, re.MULTILINE)
    assert set(taken) == ALIASES.keys() <= every - reasons.keys()


@pytest.mark.parametrize(
    ("training", "ours"),
    [
        ("eval_strategy: steps, eval_steps: 50", {"validate_every": 50}),
        ("eval_steps: 50", {"validate_every": 50}),
        ("eval_strategy: no, eval_steps: 50", {"validate_every": None}),
        ("eval_strategy: steps, eval_steps: 5, load_best_model_at_end: true", {"validate_every": 5, "keep": "best"}),
        (f"{BEST}, metric_for_best_model: eval_loss", {"keep": "best", "keep_metric": None}),
        (f"{BEST}, metric_for_best_model: eval_accuracy, greater_is_better: true", {"keep_metric": "accuracy"}),
        (f"{BEST}, metric_for_best_model: f1", {"keep_metric": "f1"}),
        (f"{BEST}, greater_is_better: false, save_strategy: steps, logging_strategy: steps", {"keep_metric": None}),
        ("load_best_model_at_end: false", {"keep": "last"}),
    ],
)
def test_what_transformers_calls_otherwise_is_taken_over(training, ours):
    recipe = parse_recipe(f"{RECIPE}training: {{{training}, learning_rate: 1.0e-3}}\n", "r.yaml")
    assert {name: getattr(recipe, name) for name in ours} == ours
    assert recipe.training_fields["learning_rate"] == 1e-3
    again = recipe.resolved(0)
    assert not again["training"].keys() & ALIASES.keys()
    assert parse_recipe(dump_yaml(again), "again").resolved(0) == again


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("eval_strategy: epoch", "eval_strategy epoch cannot be had: validations come every validate_every steps"),
        ("eval_strategy: steps", "eval_strategy steps needs their number: set validate_every"),
        ("eval_steps: 0.1", "eval_steps must be a whole number of steps, at least 1, not 0.1"),
        ("load_best_model_at_end: maybe", "load_best_model_at_end must be true or false, not 'maybe'"),
        (f"{BEST}, greater_is_better: true", "greater_is_better is false for loss in any case; leave it out"),
        (
            f"{BEST}, metric_for_best_model: f1, greater_is_better: false",
            "greater_is_better is true for f1 in any case",
        ),
        ("save_strategy: best", "save_strategy best cannot be had: checkpoints come every save_steps steps"),
        ("logging_strategy: epoch", "logging_strategy epoch cannot be had: the log has a line every logging_steps"),
    ],
)
def test_what_is_meant_otherwise_is_not(training, message):
    assert f"r.yaml, line 4: training.{message}" in refused("training", training)


def test_a_recipe_that_contradicts_itself():
    text = f"{RECIPE}validate_every: 20\ntraining: {{eval_steps: 50}}\n"
    with pytest.raises(UserError, match=r"eval_steps makes validate_every 50, which is 20 here; leave one of them out"):
        parse_recipe(text, "r.yaml")
    assert parse_recipe(text.replace("50", "20"), "r.yaml").validate_every == 20
    both = text.replace("eval_steps: 50", "eval_strategy: steps")
    assert parse_recipe(both, "r.yaml").validate_every == 20
