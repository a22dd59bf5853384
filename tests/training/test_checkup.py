"""`lora-ggpo doctor`: exit code 0 where noise reaches every layer, 1 where it does not, 2 for a user's mistake."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from lora_ggpo.cli import app
from lora_ggpo.training import checkup


def doctor(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def bypassed_by_a_kernel(projection):
    """Have what calls a layer of PEFT read its weights instead."""
    kind = type(projection)

    def call(self, x):
        a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
        w = self.base_layer.weight + self.scaling["default"] * b @ a
        return nn.functional.linear(x, w, self.base_layer.bias)

    projection.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def test_a_recipe_whose_layers_the_noise_reaches(recipe_file):
    found = doctor(recipe_file)
    assert found.exit_code == 0, found.output
    assert "The noise reaches all 4 adapted layers." in found.stdout
    assert re.search(r"^query +Linear +2 +2 +A and B$", found.stdout, re.MULTILINE)
    assert re.search(r"^ggpo .*sigma 0.05.*rule relative", found.stdout, re.MULTILINE)
    assert str(recipe_file.parent) not in found.stdout
    assert not (recipe_file.parent / "runs").exists()


def test_a_bypassed_layer_is_named_and_the_exit_code_is_1(recipe_file, monkeypatch):
    build = checkup.build_model

    def bypassed(*arguments):
        model, *rest = build(*arguments)
        for name, module in model.named_modules():
            if name.endswith("layer.1.attention.self.query"):
                bypassed_by_a_kernel(module)
        return model, *rest

    monkeypatch.setattr(checkup, "build_model", bypassed)
    found = doctor(recipe_file, "ggpo.strict=true", "ggpo.sigma=0.2")
    assert found.exit_code == 1, found.output
    assert "1 of 4 adapted layers train without noise." in found.stdout
    assert "layer.1.attention.self.query: it trains, but its forward is not called. Switch off" in found.stdout
    assert re.search(r"^query +Linear +2 +1 +A and B$", found.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["ggpo=null", "sam.rho=0.05"], "none in the recipe; tried with the defaults"),
        (["ggpo.sigma=0"], "none in the recipe; tried with the defaults"),
        (["ggpo=null", "adapter=null"], "nothing to perturb: full fine-tuning has no adapter"),
    ],
)
def test_a_recipe_without_noise(recipe_file, overrides, expected):
    found = doctor(recipe_file, *overrides)
    assert found.exit_code == 0, found.output
    assert expected in found.stdout
    assert ("reaches all 4" in found.stdout) == ("adapter=null" not in overrides)


def test_a_run_says_what_it_was_made_with_and_is_left_alone(finished, tmp_path):
    run = shutil.copytree(finished[1].folder.parent, tmp_path / "run") / "seed-0"
    assert "run made with" in doctor(run.parent).stdout
    file = run / "versions.json"
    versions = json.loads(file.read_text()) | {"peft": "0.1", "precision": "bf16"}
    file.write_text(json.dumps(versions))
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    found = doctor(run)
    assert found.exit_code == 0, found.output
    assert re.search(r"^run made with +peft 0.1$", found.stdout, re.MULTILINE)
    assert re.search(r"^precision +bf16$", found.stdout, re.MULTILINE)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.yaml"], "There is no recipe file absent.yaml"),
        (["train.py"], "train.py is a script; have it print(lora_ggpo.doctor(model, batch))"),
        (["FOLDER"], "There is no run in"),
        (["FOLDER", "ggpo.sigma=1"], "is a run, whose settings are what they are; leave out ggpo.sigma=1."),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(tmp_path, arguments, message):
    found = doctor(*(str(tmp_path) if one == "FOLDER" else one for one in arguments))
    assert found.exit_code == 2
    assert message in found.stderr


def test_without_a_model_torch_alone_is_imported():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom lora_ggpo.cli import app\n"
        "print(CliRunner().invoke(app, ['doctor']).stdout)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    *lines, heavy = printed.splitlines()
    assert heavy == "['torch']"
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in lines if line)
    assert facts["torch"] == torch.__version__.partition("+")[0] or facts["torch"] == torch.__version__
    assert facts["precision: auto"] in ("bf16", "fp32")
    assert str(Path.home()) not in printed
