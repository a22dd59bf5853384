"""Axolotl's own command with the plugin, as the docs give it; and what the plugin does with Axolotl's settings."""

import importlib
import json
import sys
from types import ModuleType

import pytest
import yaml

from lora_ggpo import GGPOConfig
from tests.integrations.contract import NOISY, assert_contract, block, run

NAME = "lora_ggpo.integrations.axolotl"
SEEDED = "import runpy, torch; torch.manual_seed(0); runpy.run_module('axolotl.cli.train', run_name='__main__')"
ROWS = [{"instruction": f"Judge the film {n}.", "input": "", "output": f"It is good {n}."} for n in range(8)]


class Log(list):
    """Stands in for Axolotl's logger."""

    def warning(self, message, *arguments):
        self.append(message % arguments)


@pytest.fixture
def plugin(monkeypatch):
    """The plugin's module and what it logs, imported where Axolotl need not be."""
    names = ["axolotl", "axolotl.integrations", "axolotl.integrations.base", "axolotl.utils", "axolotl.utils.logging"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    log = Log()
    sys.modules["axolotl.integrations.base"].BasePlugin = object
    sys.modules["axolotl.utils.logging"].get_logger = lambda name: log
    yield importlib.import_module(NAME), log
    sys.modules.pop(NAME)


def test_fused_kernels_are_off_even_where_axolotl_would_switch_them_on(plugin):
    axolotl, log = plugin
    kernels = dict.fromkeys(axolotl.KERNELS, False)
    for cfg in ({}, {"lora_mlp_kernel": True, "lora_o_kernel": None}):
        axolotl.GGPOPlugin().register(cfg)
        assert cfg == kernels
    silent, named = log
    assert "switched off" not in silent
    assert "(lora_mlp_kernel switched off)" in named


def test_settings_are_those_of_the_section(plugin):
    axolotl, _ = plugin
    (callback,) = axolotl.GGPOPlugin().add_callbacks_post_trainer({"ggpo": NOISY}, None)
    assert callback.config == GGPOConfig(**NOISY)
    (callback,) = axolotl.GGPOPlugin().add_callbacks_post_trainer({}, None)
    assert callback.config == GGPOConfig()
    module, name = axolotl.GGPOPlugin().get_input_args().rsplit(".", 1)
    args = getattr(sys.modules[module], name)
    assert args(ggpo=NOISY).model_dump() == {"ggpo": NOISY}
    assert args().ggpo is None
    with pytest.raises(ValueError, match="no field 'sigam'"):
        args(ggpo={"sigam": 1})


def test_it_trains_as_the_docs_say(tiny_llama, tmp_path):
    pytest.importorskip("axolotl")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "stand-ins").mkdir()
    (tmp_path / "stand-ins" / "seeded.py").write_text(SEEDED)  # Axolotl's own seed comes after the adapter is drawn

    def train(name, ggpo, resume):
        settings = yaml.safe_load(block("GGPOPlugin")) | {
            "base_model": tiny_llama,
            "special_tokens": {"pad_token": "<unk>"},
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 2,
            "learning_rate": 0.01,
            "output_dir": str(tmp_path / name / "out"),
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "sequence_len": 128,
            "logging_steps": 1,
            "save_steps": 1,
            "use_tensorboard": True,
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "ggpo": ggpo,
        }
        settings |= {"resume_from_checkpoint": str(resume)} if resume else {}
        if ggpo is None:
            del settings["ggpo"], settings["plugins"]
            settings |= dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)  # need a GPU
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        run("seeded", f"{name}.yaml", folder=tmp_path, AXOLOTL_DO_NOT_TRACK="1", AXOLOTL_DATASET_NUM_PROC="0")
        return tmp_path / name / "out"

    assert_contract(train, "Axolotl", "axolotl")
