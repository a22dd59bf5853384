"""LoRA-GGPO in an Accelerate loop with gradient accumulation; `accelerate launch` runs it on several GPUs as it is."""

import argparse

import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_ggpo import GGPO, GGPOConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
parser.add_argument("--data", required=True, help="JSONL with text and label")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output", default="adapter")
args = parser.parse_args()

accelerator = Accelerator(gradient_accumulation_steps=2)
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear"))
rows = load_dataset("json", data_files=args.data, split="train")


def collate(batch):
    """Rows of text as a padded batch of tensors."""
    texts = [row["text"] for row in batch]
    tokens = tokenizer(texts, truncation=True, max_length=128, padding=True, return_tensors="pt")
    return {**tokens, "labels": torch.tensor([row["label"] for row in batch])}


loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=collate)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

ggpo = GGPO(accelerator.unwrap_model(model).train(), GGPOConfig(sigma=0.1, rule="relative", beta=0.5))
step = 0
while step < args.steps:
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            if accelerator.sync_gradients:
                ggpo.step()  # once after each optimizer step
                step += 1
            optimizer.zero_grad()
        if step == args.steps:
            break
ggpo.detach()
accelerator.print(f"step {step}: loss {loss.item():.4f}")
accelerator.unwrap_model(model).save_pretrained(args.output, is_main_process=accelerator.is_main_process)
