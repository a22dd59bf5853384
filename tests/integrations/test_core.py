"""What is installed without an extra: the perturbation and the callback, and a command that says what it lacks."""

import subprocess
import sys
from pathlib import Path

import pytest

from lora_ggpo import __main__ as command

TRAIN = """
from tests.core_only import HIDDEN
assert {"datasets", "matplotlib", "pandas", "scipy"} <= HIDDEN
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from lora_ggpo import GGPO, GGPOCallback, GGPOConfig

sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(r=2, target_modules=["q_proj"]))
row = {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])}
args = TrainingArguments(OUT, max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1)
trainer = Trainer(model, args, train_dataset=[row] * 8, callbacks=[GGPOCallback(GGPOConfig(sigma=0.1))])
trainer.train()
assert trainer.state.log_history[1]["ggpo/gradient_share"] > 0
GGPO(model, GGPOConfig()).detach()
"""


@pytest.mark.slow
def test_the_core_trains_without_the_packages_of_the_extra(tmp_path):
    code = TRAIN.replace("OUT", repr(str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_command_without_its_packages_says_what_to_install(monkeypatch, capsys):
    asked = ['absent-one>=1.2; extra == "cli"', "torch>=2", "pytest>=9; extra == 'cli'", 'other; extra == "ray"']
    monkeypatch.setattr(command, "requires", lambda name: [*asked, 'absent_two ; extra == "cli"'])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    said = capsys.readouterr()
    install = "install with: pip install 'lora-ggpo[cli]'"
    assert (said.out, said.err) == ("", f"error: The command line needs absent-one and absent_two; {install}\n")


def test_the_command_with_its_packages_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lora-ggpo", "--help"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert not stopped.value.code
    assert "lora-ggpo" in capsys.readouterr().out
