"""`precision: auto` follows the processor as a run begins, and the run as it goes on elsewhere."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lora_ggpo.errors import UserError
from lora_ggpo.recipe.recipe import load_recipe
from lora_ggpo.training import precision
from lora_ggpo.training.build import training_arguments
from lora_ggpo.training.run import train
from lora_ggpo.workspace.progress import Reporter
from tests.training.runs import assert_same, invoke, unfinish, works

QUIET = Reporter(quiet=True)


def processor(monkeypatch, *instructions):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512_bf16" in instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in instructions)


def chosen(recipe, folder):
    args = training_arguments(recipe, folder, 0)
    return args.mixed_precision, args.bf16, args.fp16


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [([], ("no", False, False)), (["avx512_bf16"], ("bf16", True, False)), (["amx"], ("bf16", True, False))],
)
def test_auto_follows_the_processor(recipe_file, tmp_path, monkeypatch, instructions, expected):
    processor(monkeypatch, *instructions)
    assert chosen(load_recipe(recipe_file, ["precision=auto"]), tmp_path) == expected
    assert chosen(load_recipe(recipe_file, ["precision=fp32"]), tmp_path) == ("no", False, False)
    assert chosen(load_recipe(recipe_file, ["precision=bf16"]), tmp_path) == ("bf16", True, False)


@pytest.mark.parametrize(("emulates", "expected"), [(False, "bf16"), (True, "fp32")])
def test_auto_follows_the_gpu(recipe_file, tmp_path, monkeypatch, emulates, expected):
    """One that emulates bf16 says that it has it, unless it is asked about itself alone."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    has = lambda including_emulation=True: including_emulation or not emulates  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", has)
    recipe = SimpleNamespace(training_fields={}, asked_precision="auto")
    assert precision.choose_precision(recipe, tmp_path) == expected


def test_fp16_needs_a_gpu(recipe_file, tmp_path):
    with pytest.raises(UserError, match="precision fp16 needs a GPU; set it to auto"):
        training_arguments(load_recipe(recipe_file, ["precision=fp16"]), tmp_path, 0)


def test_a_run_keeps_the_precision_that_it_began_with(recipe_file, monkeypatch):
    in_bf16 = set()
    steps = ["precision=auto", "training.max_steps=4", "training.save_steps=2", "validate_every=null"]
    recipe = load_recipe(recipe_file, steps)

    def watch(module, _):
        if isinstance(module, nn.Linear):
            in_bf16.add(torch.is_autocast_enabled("cpu"))

    watching = register_module_forward_pre_hook(watch)
    processor(monkeypatch, "amx")
    (run,) = train(recipe, QUIET)
    whole = shutil.copytree(run.folder, run.folder.parent / "whole")
    assert run.recipe["precision"] == "auto"
    assert json.loads((run.folder / "versions.json").read_text())["precision"] == "bf16"
    assert "precision auto: bf16" in works(invoke("show", run.folder)).stdout.replace("  ", " ")

    processor(monkeypatch)
    unfinish(run.folder)
    shutil.rmtree(run.folder / "checkpoints" / "checkpoint-4")
    train(recipe, QUIET)
    watching.remove()
    assert_same(run.folder, whole)  # to the last bit, which other products would not give
    assert in_bf16 == {True}
    assert chosen(recipe, run.folder.parent / "seed-1") == ("no", False, False)


def test_a_run_of_an_earlier_release_was_begun_without_auto(recipe_file, tmp_path, monkeypatch):
    processor(monkeypatch, "amx")
    recipe = load_recipe(recipe_file, ["precision=auto"])
    (tmp_path / "versions.json").write_text('{"begun": "2026-01-31"}')
    assert chosen(recipe, tmp_path)[0] == "bf16"  # not a step is done
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert chosen(recipe, tmp_path)[0] == "no"
    (tmp_path / "versions.json").write_text('{"precision": "fp8"}')
    with pytest.raises(UserError, match=r"versions\.json is damaged: 'fp8' is no precision"):
        chosen(recipe, tmp_path)
