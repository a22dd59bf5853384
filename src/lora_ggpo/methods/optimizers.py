"""What peft has for a Trainer: LoRA's optimizers, as the recipe names them, and AdaLoRA's schedule and pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import AdaLoraConfig
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_ggpo.errors import UserError


def lora_plus(lr_ratio: float, model: Any, args: TrainingArguments) -> Optimizer:
    """The optimizer of `args` in LoRA+'s parameter groups: B learns at `lr_ratio` times A's rate (arXiv 2402.12354)."""
    cls, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    options |= {"loraplus_lr_ratio": lr_ratio, "loraplus_weight_decay": args.weight_decay}
    return create_loraplus_optimizer(model, cls, **options)


def lora_fa(lr_ratio: float, model: Any, args: TrainingArguments) -> Optimizer:
    """LoRA-FA (arXiv 2308.03303): A is frozen, and B's gradient is projected to where the full weight would go."""
    config: Any = model.peft_config["default"]
    return create_lorafa_optimizer(
        model, r=config.r, lora_alpha=config.lora_alpha, lr=args.learning_rate, weight_decay=args.weight_decay
    )


OPTIMIZERS = {"lora-plus": lora_plus, "lora-fa": lora_fa}


class AdaLoraCallback(TrainerCallback):
    """Lets peft allocate ranks after each optimizer step, while the gradients are still there (arXiv 2303.10512)."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step)


def adalora_config(fields: Mapping[str, Any], total_steps: int | None) -> AdaLoraConfig:
    """AdaLoRA's configuration, where `r` is the average rank in the end.

    Where nothing is said it starts at 1.5 r, prunes from a tenth to seven tenths of the run, in about a hundred
    allocations.

    Raises:
        UserError: `total_steps` is None.
    """
    if total_steps is None:
        raise UserError("adapter.type adalora needs the number of steps of the run for its schedule.")
    r = fields.get("r", 8)
    schedule = {"tinit": total_steps // 10, "tfinal": 3 * total_steps // 10, "deltaT": max(1, total_steps // 100)}
    others = {name: value for name, value in fields.items() if name != "r"}
    return AdaLoraConfig(**{"init_r": -(-3 * r // 2), **schedule, **others, "target_r": r, "total_step": total_steps})
