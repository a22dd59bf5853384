"""The same three lines in TRL's SFTTrainer: packing, loss on the completion only, gradient checkpointing."""

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_ggpo import GGPOCallback, GGPOConfig

ROWS = Dataset.from_list([{"prompt": f"the film {n} is", "completion": f" good {n}"} for n in range(24)])
SETTINGS = {
    "plain": {},
    "completion-only": {"completion_only_loss": True},
    "packing": {"packing": True, "completion_only_loss": True},
    "checkpointing": {"gradient_checkpointing": True, "completion_only_loss": True},
    "all": {"packing": True, "completion_only_loss": True, "gradient_checkpointing": True},
}


@pytest.fixture
def sft(tiny_llama, tmp_path):
    """Trains 3 steps of SFTTrainer on a fresh tiny Llama; returns the trainer."""

    def train(config, **settings):
        torch.manual_seed(0)
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            max_length=32,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            seed=0,
            **{"gradient_checkpointing": False, **settings},
        )
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama, pad_token="<unk>")
        trainer = trl.SFTTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_llama),
            arguments,
            train_dataset=ROWS,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
            callbacks=[GGPOCallback(config)] if config else [],
        )
        trainer.train()
        return trainer

    return train


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_callback_in_sft_trainer(sft, name):
    plain, still = (losses(sft(config, **SETTINGS[name])) for config in (None, GGPOConfig(sigma=0)))
    assert len(plain) == 3
    assert still == plain
    trainer = sft(GGPOConfig(sigma=0.3, rule="relative", beta=0.5), **SETTINGS[name])
    assert losses(trainer) != plain
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["ggpo/relative_noise"] for row in rows] == pytest.approx([0.3] * 3, rel=1e-2)
    assert all(0 < row["ggpo/gradient_share"] < 1 for row in rows[1:])
    assert not any(
        "forward" in vars(module) for module in trainer.model.modules() if isinstance(module, torch.nn.Linear)
    )


def test_checkpointing_sees_the_same_noise_twice(sft):
    """A block that is run again for its gradient must be the block that was run: equal losses and gradient norms."""
    config = GGPOConfig(sigma=0.3, rule="relative", beta=0.5)
    runs = [sft(config, gradient_checkpointing=on) for on in (False, True)]
    logs = [[(row["loss"], row["grad_norm"]) for row in run.state.log_history if "loss" in row] for run in runs]
    assert torch.tensor(logs[1]).allclose(torch.tensor(logs[0]), rtol=1e-4)


def test_stock_peft_loads_what_it_saved(sft, tiny_llama, tmp_path):
    trainer = sft(GGPOConfig(sigma=0.3), **SETTINGS["all"])
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "saved").eval()
    ids = torch.tensor([[1, 5, 7, 9]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
