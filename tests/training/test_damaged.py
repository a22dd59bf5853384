"""What becomes of a run whose files, data or base model somebody has changed."""

import json
import shutil

import pytest

from lora_ggpo.training import checkpoints
from tests.training.runs import USES, assert_same, cut, flip, invoke, refused, unfinish


def model_in(folder, run, tiny_llama):
    """Give `run` a copy of its base model, and return that folder."""
    model = shutil.copytree(tiny_llama, folder / "base")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(tiny_llama), str(model)))
    return model


@pytest.mark.parametrize(("file", "damage"), [("adapter_model.safetensors", flip), (checkpoints.SEAL, cut)])
def test_a_damaged_checkpoint_is_passed_over(whole, unfinished, file, damage):
    """test_checkpoints.py has all the changes by which a checkpoint counts as damaged."""
    damage(unfinished / "checkpoints" / "checkpoint-4" / file)
    result = invoke("train", whole[0], f"output={unfinished.parent}")
    assert result.exit_code == 0, result.stderr
    assert "going on from step 3" in result.stderr
    assert_same(unfinished, whole[1])


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("use", ["eval", "merge", "chat", "sharpness"])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_refused(copy, file, use, damage, tmp_path):
    damage(copy / "adapter" / file)
    refused(invoke(*USES[use](copy, tmp_path / "out")), f"{file} is damaged: it is not what the run ended with.")


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"{}", b'{"weight": 3}'])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_of_a_run_without_metrics_is_refused(whole, copy, file, content):
    """Killed in scoring, then damaged: there are no digests yet."""
    (copy / "metrics.json").unlink()
    (copy / "adapter" / file).write_bytes(content)
    refused(invoke("train", whole[0], f"output={copy.parent}"), f"Adapter '{copy / 'adapter'}' cannot be loaded: ")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\xff", b"model: [", b"model: minilm\n", b"- 1", b"task: 3", b"data: 2001-99-99"),
        b"{model: minilm, task: sft, data: null, adapter: null, ggpo: null, training: {}}",
    ],
)
@pytest.mark.parametrize("use", ["show", "eval", "merge", "train"])
def test_a_damaged_recipe_of_a_run_is_refused(whole, copy, use, content, tmp_path):
    (copy / "recipe.yaml").write_bytes(content)
    if use == "train":
        (copy / "metrics.json").unlink()
    commands = {"show": ["show", copy], "train": ["train", whole[0], f"output={copy.parent}"]}
    command = commands[use] if use in commands else USES[use](copy, tmp_path / "out")
    refused(invoke(*command), "recipe.yaml")


def test_a_run_whose_log_lacks_a_loss_is_shown(copy):
    log = copy / "log.jsonl"
    first, *others = map(json.loads, log.read_text().splitlines())
    log.write_text("\n".join(map(json.dumps, [first | {"loss": None}, *others])))
    result = invoke("show", copy)
    assert result.exit_code == 0, result.output
    assert f" {others[0]['loss']:.3f} to {others[-1]['loss']:.3f}\n" in result.stdout


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("file", ["data.json", "metrics.json"])
def test_damaged_records_of_a_run_are_refused(copy, file, content):
    (copy / file).write_bytes(content)
    refused(invoke("eval", copy), f"{file} is damaged: ")


def test_data_that_changed_under_an_unfinished_run_is_refused(whole, unfinished, tmp_path):
    recipe, changed = whole[0].read_text(), tmp_path / "data.jsonl"
    data = whole[0].with_name("data.jsonl").read_text()
    for text, message in [(data.replace("good", "bad", 1), "The data has changed since"), (data[:-5], "line 24: malf")]:
        changed.write_text(text)
        for file in (unfinished / "recipe.yaml", tmp_path / "recipe.yaml"):
            file.write_text(recipe.replace(str(whole[0].with_name("data.jsonl")), str(changed)))
        refused(invoke("train", tmp_path / "recipe.yaml", f"output={unfinished.parent}"), message)


@pytest.mark.parametrize("use", ["eval", "merge", "chat", "sharpness"])
def test_a_base_model_that_changed_after_the_run_is_refused(copy, tiny_llama, use, tmp_path):
    flip(model_in(tmp_path, copy, tiny_llama) / "model.safetensors")
    refused(invoke(*USES[use](copy, tmp_path / "out")), f"is not what {copy} was trained on: its files have changed")


@pytest.mark.parametrize("finished", [True, False])
def test_a_base_model_that_changed_before_the_command_is_given_again_is_refused(
    whole, copy, tiny_llama, finished, tmp_path
):
    if not finished:
        unfinish(copy)
    model = model_in(tmp_path, copy, tiny_llama)
    command = ("train", whole[0], f"output={copy.parent}", f"model={model}")
    if finished:
        assert invoke(*command).exit_code == 0  # the same files in another place
    flip(model / "model.safetensors")
    refused(invoke(*command), f"The model has changed since {copy} was begun")


def test_data_that_changed_after_the_run_is_refused(whole, copy, tmp_path):
    data = whole[0].with_name("data.jsonl")
    changed = tmp_path / "data.jsonl"
    changed.write_text(data.read_text().replace("good", "bad", 1))
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(data), str(changed)))
    refused(invoke("eval", copy), f"The data has changed since {copy} was trained on it; name what to score with --on.")
    command = ("train", whole[0], f"output={copy.parent}", f"data.source={changed}")
    refused(invoke(*command), f"The data has changed since {copy} was begun")
