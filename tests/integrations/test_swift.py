"""ms-swift's own command with the plugin, as the docs give it; and the settings that the plugin reads."""

import importlib
import json
import shlex
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest

from lora_ggpo import GGPOCallback, GGPOConfig
from tests.integrations.contract import assert_contract, block, run

NAME = "lora_ggpo.integrations.swift.ggpo"
ROWS = [{"messages": [{"role": role, "content": f"{role} {n}"} for role in ("user", "assistant")]} for n in range(8)]


@pytest.fixture
def plugin(monkeypatch):
    """The plugin, imported where ms-swift need not be: it registers itself in a table."""
    stub = ModuleType("swift.callbacks")
    stub.callbacks_map = {}
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.callbacks", stub)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME)


def test_settings_are_environment_variables(plugin, monkeypatch):
    named = {"SIGMA": "1e-2", "RULE": "relative", "BETA": "1", "NOISE_RANK": "4", "STRICT": "True", "RISE": "null"}
    for name, text in named.items():
        monkeypatch.setenv(f"GGPO_{name}", text)
    callback = plugin.callbacks_map["ggpo"](object(), object())
    assert isinstance(callback, GGPOCallback)
    assert callback.config == GGPOConfig(sigma=0.01, rule="relative", beta=1, noise_rank=4, strict=True)
    assert plugin.config_from({"PATH": "/bin"}) == GGPOConfig()
    with pytest.raises(ValueError, match="no field 'sigam'"):
        plugin.config_from({"GGPO_SIGAM": "1"})


def test_it_trains_as_the_docs_say(tiny_llama, tmp_path):
    pytest.importorskip("swift")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    exports, _, line = block("swift sft").replace("\\\n", " ").splitlines()
    assert exports == "export GGPO_SIGMA=0.03 GGPO_RULE=relative GGPO_BETA=0.5"
    command, ours = shlex.split(line), ["--external_plugins", "$plugin", "--callbacks", "ggpo"]
    assert command[:2] == ["swift", "sft"]
    assert command[2:6] == ours
    ours[1] = find_spec(NAME).origin

    def train(name, ggpo, resume):
        settings = {
            "model": tiny_llama,
            "model_type": "llama",
            "template": "llama",
            "torch_dtype": "float32",
            "output_dir": tmp_path / name / "out",
            "add_version": "false",
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "save_steps": 1,
            "split_dataset_ratio": 0,
            "report_to": "tensorboard",
        }
        settings |= {"resume_from_checkpoint": resume} if resume else {}
        environment = {f"GGPO_{key.upper()}": str(value) for key, value in (ggpo or {}).items()}
        given = [part for key, value in settings.items() for part in (f"--{key}", value)]
        plugin = [] if ggpo is None else ours
        run("swift.cli.sft", *command[6:], *plugin, *given, folder=tmp_path, **environment)
        return tmp_path / name / "out"

    assert_contract(train, "ms-swift", "ms-swift")
