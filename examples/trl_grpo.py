"""LoRA-GGPO in TRL's GRPOTrainer: rollouts come from the plain model, noise is in the passes that have gradients."""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from lora_ggpo import GGPOCallback, GGPOConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--data", required=True, help="JSONL with prompt and answer")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output", default="adapter")
args = parser.parse_args()


def reward(completions, answer, **_):
    """1 for a completion that holds the answer and is no longer than it need be, less for a longer one."""
    pairs = zip(completions, answer, strict=True)
    return [float(right in text) - 0.01 * len(text) for text, right in pairs]


trainer = GRPOTrainer(
    args.model,
    reward_funcs=reward,
    args=GRPOConfig(
        "checkpoints",
        max_steps=args.steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=16,
        beta=0.04,  # above 0: with a reference, which the adapter's absence is
        learning_rate=1e-5,
        bf16=torch.cuda.is_available(),  # TRL's default stops on a CPU without bf16 instructions
        logging_steps=10,
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=args.data, split="train"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    callbacks=[GGPOCallback(GGPOConfig(sigma=0.03, rule="relative", beta=0.5))],  # the only line that is new
)
trainer.train()
trainer.save_model(args.output)
