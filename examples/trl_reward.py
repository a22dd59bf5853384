"""LoRA-GGPO in TRL's RewardTrainer: a reward model from pairs of answers."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import RewardConfig, RewardTrainer

from lora_ggpo import GGPOCallback, GGPOConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--data", required=True, help="JSONL with prompt, chosen and rejected")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output", default="adapter")
args = parser.parse_args()

trainer = RewardTrainer(
    args.model,
    args=RewardConfig(
        "checkpoints",
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        bf16=torch.cuda.is_available(),  # TRL's default stops on a CPU without bf16 instructions
        logging_steps=10,
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=args.data, split="train"),
    peft_config=LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear"),
    callbacks=[GGPOCallback(GGPOConfig(sigma=0.03, rule="relative", beta=0.5))],  # the only line that is new
)
trainer.train()
trainer.save_model(args.output)
