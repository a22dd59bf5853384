"""peft's optimizers for LoRA, as the recipe names them."""

from __future__ import annotations

from typing import Any

from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments


def lora_plus(lr_ratio: float, model: Any, args: TrainingArguments) -> Optimizer:
    """The optimizer of `args` in LoRA+'s parameter groups: B learns at `lr_ratio` times A's rate (arXiv 2402.12354)."""
    cls, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    options.pop("lr")
    lr, decay = args.learning_rate, args.weight_decay
    return create_loraplus_optimizer(
        model, cls, lr=lr, loraplus_lr_ratio=lr_ratio, loraplus_weight_decay=decay, **options
    )


def lora_fa(lr_ratio: float, model: Any, args: TrainingArguments) -> Optimizer:
    """LoRA-FA (arXiv 2308.03303): A is frozen, and B's gradient is projected to where the full weight would go."""
    config: Any = model.peft_config["default"]
    return create_lorafa_optimizer(
        model, r=config.r, lora_alpha=config.lora_alpha, lr=args.learning_rate, weight_decay=args.weight_decay
    )


OPTIMIZERS = {"lora-plus": lora_plus, "lora-fa": lora_fa}
