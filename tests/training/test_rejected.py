"""What a library refuses before the first step has been taken is one sentence, in `train` and in `plan`."""

import re
from functools import partial

import pytest

from lora_ggpo.errors import UserError, rejected
from lora_ggpo.recipe.recipe import parse_recipe
from lora_ggpo.training.forecast import forecast
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter

RECIPE = """\
model: {model}
task: {{kind: causal-classification, max_length: 16}}
data: {reviews}
adapter: {{r: 2, target_modules: [q_proj, embed_tokens]}}
training: {{max_steps: 2, per_device_train_batch_size: 2, use_cpu: true}}
output: {output}
"""


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
        ("adapter.layer_replication=[[0, 9]]", "adapter.layer_replication has the range [0, 9]"),
        ("data.train_size=4000", "override 'data.train_size=4000': data.train_size is 4000"),
        ("model=org/name@v1", "override 'model=org/name@v1': Model 'org/name@v1' is no folder here, and no hub id"),
        ("model=llama3:8b", "Model 'llama3:8b' is no folder here, and no hub id, which is owner/name"),
        ("model=foo bar", "in letters, digits, -, _ and .."),
        ("ggpo={strict: true}", "override 'ggpo={strict: true}': ggpo: GGPO cannot perturb"),
    ],
)
def test_before_the_first_step(tiny_llama, reviews, use, override, message, tmp_path):
    run = partial(train if use == "train" else partial(forecast, steps=1), reporter=Reporter(quiet=True))
    text = RECIPE.format(model=tiny_llama, reviews=reviews, output=tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        run(parse_recipe(text, "r.yaml", [override]))


@pytest.mark.parametrize("error", [OSError("No space left"), MemoryError(), UserError("known"), IndexError("ours")])
def test_what_no_library_is_at_fault_for_passes(error):
    """What this file raises counts as a library's, hence the fourth."""
    expected = UserError if isinstance(error, IndexError) else type(error)
    with pytest.raises(expected, match=str(error)) as caught, rejected("training"):
        raise error
    assert (caught.value is error) == (expected is type(error))
