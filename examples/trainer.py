"""LoRA-GGPO in a transformers Trainer: the one callback is all there is to it."""

import argparse

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from lora_ggpo import GGPOCallback, GGPOConfig

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
rows = rows.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=128), batched=True)

trainer = Trainer(
    model,
    TrainingArguments("checkpoints", max_steps=args.steps, learning_rate=5e-4, logging_steps=10, report_to="none"),
    train_dataset=rows,
    processing_class=tokenizer,
    callbacks=[GGPOCallback(GGPOConfig(sigma=0.1, rule="relative", beta=0.5))],  # the only line that is new
)
trainer.train()
model.save_pretrained(args.output)
