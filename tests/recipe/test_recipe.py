import dataclasses
import json

import pytest
import yaml
from peft import LoraConfig
from transformers import TrainingArguments

from lora_ggpo.errors import UserError
from lora_ggpo.perturbation import GGPOConfig
from lora_ggpo.recipe.aliases import ALIASES
from lora_ggpo.recipe.fields import TRAINING_DEFAULTS
from lora_ggpo.recipe.recipe import json_schema, load_recipe, parse_recipe
from lora_ggpo.recipe.source import dump_yaml

TEXT = """\
model: minilm
task: classification
data: movie-reviews
adapter:
  r: 8
ggpo:
  sigma: 0.05
training:
  max_steps: 3
output: runs/x
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("  max_stps: 3", "r.yaml, line 9: training.max_stps is not a setting; did you mean max_steps?"),
        ("  lr: 3", "r.yaml, line 9: training.lr is not a setting; did you mean learning_rate?"),
        ("  max_steps: many", "r.yaml, line 9: training.max_steps must be a valid integer"),
        ("  per_device_train_batch_size: 0", "training.per_device_train_batch_size must be at least 1, not 0."),
        ("  gradient_accumulation_steps: -1", "training.gradient_accumulation_steps must be at least 1, not -1."),
        ("  max_steps: 0", "r.yaml, line 9: training.max_steps must be above 0"),
        ("  num_train_epochs: -1", "r.yaml, line 9: training.num_train_epochs must be greater than 0, not -1."),
        ("  train_sampling_strategy: group_by_lenght", "train_sampling_strategy must be 'group_by_length', 'random'"),
        ("  learning_rate: null", "r.yaml, line 9: training.learning_rate must be a valid number, not null."),
        ("  learning_rate: fast", "training.learning_rate must be a valid number"),
        ("  max_grad_norm: .inf", "training.max_grad_norm must be a finite number, not inf."),
        ("  optim: adamm", "r.yaml, line 9: training.optim must be"),
        ("  output_dir: x", "r.yaml, line 9: training.output_dir cannot be set: the recipe's output sets it."),
        ("  seed: 1", "r.yaml, line 9: training.seed cannot be set: the recipe's seeds set it."),
        ("  push_to_hub: true", "r.yaml, line 9: training.push_to_hub cannot be set"),
        ("  max_steps: 3\nlearning_rate: 1", "line 10: learning_rate is not a setting; did you mean training.learn"),
        ("  max_steps: 3\nvalidate_every: 0", "r.yaml, line 10: validate_every must be greater than 0, not 0."),
        ("  max_steps: 3\nseeds: [1, 1]", "r.yaml, line 10: seeds must be different whole numbers"),
    ],
)
def test_bad_training_settings(line, message):
    with pytest.raises(UserError) as error:
        parse_recipe(TEXT.replace("  max_steps: 3", line), "r.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rank=4", "override 'adapter.rank=4': adapter.rank is not a setting; did you mean r?"),
        ("adapter.task_type=CAUSAL_LM", "adapter.task_type cannot be set"),
        ("ggpo.sigma=-1", "override 'ggpo.sigma=-1': ggpo.sigma must be a finite number >= 0"),
        ("ggpo.rule=papre", "ggpo.rule must be 'paper', 'relative' or 'sd-scripts', not 'papre'."),
        ("data.out_of_domain=[test]", "data.out_of_domain has a source named test, as a set of the run's own is"),
        ("data.sorce=x", "data.sorce is not a setting; did you mean source?"),
        ("task.kind=classify", "task.kind must be one of classification, "),
        ("ggpo.rise=0", "ggpo.rise must be a finite number > 0, or None, not 0"),
        ("adapter=null", "r.yaml, line 6: ggpo perturbs an adapter, but adapter is null"),
    ],
)
def test_bad_sections(override, message):
    with pytest.raises(UserError) as error:
        parse_recipe(TEXT, "r.yaml", [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.template='{text}!'"], "task sets template, which kind classification does not look at; leave it out."),
        (["task.label_words=[bad, good]"], "task sets label_words, which kind classification does not look at"),
        (["task.chat_template=true"], "task sets chat_template, which kind classification does not look at"),
        (["task.kind=sft", "task.label_words=[bad, good]"], "task sets label_words, which kind sft does not look at"),
        (["data.prompt=question"], "data sets prompt, which task classification does not look at; leave it out."),
        (["data.chosen=better"], "data sets chosen, which task classification does not look at"),
        (["task.too_long=refuse"], "task sets too_long, which kind classification does not look at; leave it out"),
        (["data.single_turn=true"], "data sets single_turn, which task classification does not look at"),
        (["task.kind=sft", "data.text=body"], "data sets text, which task sft does not look at"),
        (["task.kind=sft", "data.label=stars"], "data sets label, which task sft does not look at"),
        (["optimizer={kind: lora-fa, lr_ratio: 4}"], "optimizer lora-fa takes no lr_ratio"),
        (["optimizer.kind=lora-fa", "training.adam_beta2=0.9"], "optimizer lora-fa takes no adam_beta2"),
        (["optimizer.kind=lora-fa", "training.optim=sgd"], "optimizer lora-fa takes no optim"),
        (["optimizer={kind: ivon, lr_ratio: 4}", "ggpo=null"], "optimizer ivon takes no lr_ratio"),
        (["optimizer={kind: lora-plus, ess: 4}"], "optimizer lora-plus takes no ess"),
        (["ggpo.rise=0.05", "training.label_smoothing_factor=0.1"], "ggpo.rise is measured by the model's own loss"),
    ],
)
def test_settings_without_effect(overrides, message):
    with pytest.raises(UserError) as error:
        parse_recipe(TEXT, "r.yaml", overrides)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["classification", "causal-classification", "seq2seq-classification", "sft"])
def test_a_recorded_recipe_may_spell_out_defaults_without_effect(kind):
    recipe = parse_recipe(TEXT, "r.yaml", [f"task.kind={kind}", "optimizer.kind=lora-fa"])
    assert recipe.resolved(0)["task"]["template"]
    assert parse_recipe(dump_yaml(recipe.resolved(0)), "recipe.yaml").resolved(0) == recipe.resolved(0)


@pytest.mark.parametrize("optim", ["adamw_8bit", "schedule_free_adamw", "sgd"])
def test_mgpo_needs_an_optimizer_that_keeps_the_momentum_it_follows(optim):
    mgpo = ["ggpo=null", "mgpo.rho=0.05"]
    parse_recipe(TEXT, "r.yaml", [*mgpo, "training.optim=adamw_torch_fused"])
    with pytest.raises(
        UserError, match=r"mgpo follows the momentum of torch's Adam; set training.optim to adamw_torch"
    ):
        parse_recipe(TEXT, "r.yaml", [*mgpo, f"training.optim={optim}"])


CUTS = "sees whole weights and gradients, and sharding {} cuts them"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["sharding=fsdp2", "training.fsdp=true"], "training.fsdp both share the model out; leave one of them out"),
        (["sharding=zero2", "training.deepspeed={zero_optimization: {stage: 2}}"], "training.deepspeed both share"),
        (["training.fsdp=true", "training.fsdp_config={version: 1}"], "training.fsdp_config is for version 2 of FSDP"),
        (["ggpo=null", "sharding=zero1", "sam.rho=0.1"], "sam " + CUTS.format("zero1")),
        (["ggpo=null", "sharding=fsdp2", "mgpo.rho=0.1"], "mgpo " + CUTS.format("fsdp2")),
        (["ggpo=null", "training.fsdp=true", "bi_lora.rho=0.1"], "bi_lora " + CUTS.format("fsdp2")),
        (["sharding=zero2", "task=dpo", "ggpo=null"], "task dpo compares a model with what it was"),
        (["sharding=zero3", "optimizer=lora-fa"], "optimizer lora-fa " + CUTS.format("zero3")),
        (["sharding=zero2", "adapter.type=adalora"], "adapter.type adalora " + CUTS.format("zero2")),
        (["sharding=fsdp2", "adapter.init_lora_weights=pissa"], "pissa " + CUTS.format("fsdp2")),
        (["sharding=fsdp2", "quantise=int8", "ggpo=null"], "quantise int8 cannot be cut by sharding fsdp2"),
        (["sharding=zero3", "quantise=nf4", "ggpo=null"], "quantise nf4 cannot be cut by sharding zero3"),
    ],
)
def test_what_a_model_that_is_shared_out_cannot_be_with(settings, message):
    with pytest.raises(UserError) as error:
        parse_recipe(TEXT, "r.yaml", settings)
    assert message in str(error.value)


def test_a_shared_model_may_be_adapted_and_quantised_otherwise():
    for sharding in ("zero1", "zero2"):
        parse_recipe(TEXT, "r.yaml", [f"sharding={sharding}", "adapter.init_lora_weights=pissa"])
        parse_recipe(TEXT, "r.yaml", [f"sharding={sharding}", "quantise=int8"])
    nf4 = ["sharding=fsdp2", "quantise=nf4", "ggpo=null", "training.fsdp_config={cpu_offload: true}"]
    parse_recipe(TEXT, "r.yaml", nf4)


def test_settings_of_deepspeed_may_come_from_a_file(tmp_path):
    settings = {"zero_optimization": {"stage": 3}}
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    recipe = parse_recipe(TEXT, "r.yaml", [f"training.deepspeed={tmp_path / 'zero.json'}"])
    assert recipe.resolved(0)["training"]["deepspeed"] == settings
    assert recipe.shards == "zero3"


@pytest.mark.parametrize("name", ["mgpo", "bi_lora"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("adapter=null", "moves the weights under LoRA layers, and there are none"),
        ("adapter.use_dora=true", "moves W0, which the norms of DoRA would not see"),
        ("optimizer.kind=lora-fa", "takes steps of A too, which LoRA-FA does not"),
        ("training.torch_compile=true", "by hooks, which a compiled model may not call"),
    ],
)
def test_what_a_moved_weight_cannot_be_with(name, setting, message):
    with pytest.raises(UserError, match=f"{name} .*{message}"):
        parse_recipe(TEXT, "r.yaml", ["ggpo=null", f"{name}.rho=0.05", setting])


def test_monteclora_needs_checkpoints_that_keep_the_graph():
    settings = ["ggpo=null", "adapter.monteclora_config={num_samples: 4}", "training.gradient_checkpointing=true"]
    parse_recipe(TEXT, "r.yaml", settings)
    with pytest.raises(UserError, match="a loss that reentrant checkpoints have no gradient of"):
        parse_recipe(TEXT, "r.yaml", [*settings, "training.gradient_checkpointing_kwargs={use_reentrant: true}"])


def test_mgpo_does_not_average_scaled_gradients():
    with pytest.raises(UserError, match="mgpo averages gradient norms, which fp16 scales"):
        parse_recipe(TEXT, "r.yaml", ["ggpo=null", "mgpo.rho=0.05", "precision=fp16"])


@pytest.mark.parametrize("section", ["ggpo.sigma=0.05", "mgpo.rho=0.1", "bi_lora.rho=0.1", "sam.rho=0.1"])
def test_ivon_decides_where_the_gradient_is_taken(section):
    with pytest.raises(UserError, match=r"optimizer ivon and \w+ both decide where the gradient is taken"):
        parse_recipe(TEXT, "r.yaml", ["ggpo=null", section, "optimizer=ivon"])


def test_ivon_does_not_read_scaled_gradients():
    parse_recipe(TEXT, "r.yaml", ["ggpo=null", "optimizer=ivon", "adapter=null"])
    with pytest.raises(UserError, match="optimizer ivon reads gradients that fp16 scales"):
        parse_recipe(TEXT, "r.yaml", ["ggpo=null", "optimizer=ivon", "training.fp16=true"])


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ([], "auto"),
        (["training.bf16=true"], "bf16"),
        (["training.fp16=true", "training.bf16=false"], "fp16"),
        (["training.bf16=false"], "fp32"),
        (["precision=fp32", "training.fp16=false"], "fp32"),
    ],
)
def test_precision_and_its_names_in_earlier_recipes(settings, asked):
    resolved = parse_recipe(TEXT, "r.yaml", settings).resolved(0)
    assert resolved["precision"] == asked
    assert not {"bf16", "fp16"} & resolved["training"].keys()


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        ("bf16: true", ["precision=fp32"], "bf16 true contradicts precision fp32; leave training.bf16 out."),
        ("bf16: false", ["precision=bf16"], "bf16 false contradicts precision bf16; leave training.bf16 out."),
        ("fp16: true", ["training.bf16=true"], "fp16 true contradicts precision bf16; leave training.fp16 out."),
    ],
)
def test_two_precisions_in_one_recipe(line, settings, message):
    with pytest.raises(UserError, match=f"^r.yaml, line 10: training.{message}"):
        parse_recipe(TEXT.replace("output", f"  {line}\noutput"), "r.yaml", settings)


def test_a_bad_value_is_found_on_its_line():
    with pytest.raises(UserError, match=r"r.yaml, line 7: ggpo.sigma must be a finite number >= 0, not -0.05"):
        parse_recipe(TEXT.replace("0.05", "-0.05"), "r.yaml")


def test_missing_file_and_field(tmp_path):
    with pytest.raises(UserError, match="There is no recipe file"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match=r"r.yaml: output is missing"):
        parse_recipe(TEXT.replace("output: runs/x\n", ""), "r.yaml")


def test_resolved_is_a_recipe_that_resolves_to_itself():
    resolved = parse_recipe(TEXT, "r.yaml").resolved(7)
    assert resolved["training"] == TRAINING_DEFAULTS | {"max_steps": 3}
    assert resolved["ggpo"] == {**GGPOConfig(sigma=0.05).to_dict(), "seed": 7}
    assert resolved["adapter"] == {"r": 8}
    again = parse_recipe(dump_yaml(resolved), "recipe.yaml")
    assert again.resolved(7) == resolved == yaml.safe_load(dump_yaml(resolved))


def test_completions_are_scored_in_batches_as_large_as_those_of_training_unless_set():
    sft = TEXT.replace("minilm", "smollm2").replace("classification", "sft").replace("movie-reviews", "data.jsonl")
    size = "training.per_device_train_batch_size=4"
    assert parse_recipe(sft, "r.yaml", [size]).training_fields["per_device_eval_batch_size"] == 4
    both = [size, "training.per_device_eval_batch_size=2"]
    assert parse_recipe(sft, "r.yaml", both).training_fields["per_device_eval_batch_size"] == 2
    assert parse_recipe(TEXT, "r.yaml", [size]).training_fields["per_device_eval_batch_size"] == 64


def test_a_set_noise_seed_is_kept():
    assert parse_recipe(TEXT, "r.yaml", ["ggpo.seed=5"]).ggpo_config(7).seed == 5


def test_schema_has_the_defaults_that_runs_use():
    fields = json.loads(json_schema())["$defs"]["TrainingFields"]["properties"]
    assert {name: fields[name]["default"] for name in TRAINING_DEFAULTS} == TRAINING_DEFAULTS


def test_schema_has_every_field_that_can_be_set():
    definitions = json.loads(json_schema())["$defs"]
    assert {field.name for field in dataclasses.fields(GGPOConfig)} == set(definitions["GGPOFields"]["properties"])
    lora = {field.name for field in dataclasses.fields(LoraConfig)}
    assert lora - set(definitions["AdapterFields"]["properties"]) == {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config", "arrow_config"),
    }
    training = set(definitions["TrainingFields"]["properties"])
    assert training < {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {"learning_rate", "max_steps", "gradient_checkpointing", "optim", "bf16", "torch_compile"} < training
    assert not {"output_dir", "seed", "disable_tqdm", "push_to_hub", "hub_token"} & training
    assert set(ALIASES) < training  # which transformers has too
