"""LoRA-GGPO in a training loop of your own: one line before it, one in it, one behind it."""

import argparse

import torch
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

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear"))
rows = load_dataset("json", data_files=args.data, split="train")


def collate(batch):
    """Rows of text as a padded batch of tensors."""
    texts = [row["text"] for row in batch]
    tokens = tokenizer(texts, truncation=True, max_length=128, padding=True, return_tensors="pt")
    return {**tokens, "labels": torch.tensor([row["label"] for row in batch])}


loader = DataLoader(rows, batch_size=16, shuffle=True, collate_fn=collate)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)

ggpo = GGPO(model.train(), GGPOConfig(sigma=0.1, rule="relative", beta=0.5))
step = 0
while step < args.steps:
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ggpo.step()  # once after each optimizer step
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0 or step == args.steps:
            print(
                f"step {step}: loss {loss.item():.4f}, noise {ggpo.metrics()['ggpo/relative_noise']:.3f} of the weight"
            )
        if step == args.steps:
            break
ggpo.detach()
model.save_pretrained(args.output)
