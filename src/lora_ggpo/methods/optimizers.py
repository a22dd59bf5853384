"""Optimizers of other packages, as the recipe names them, and AdaLoRA's schedule and pruning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import AdaLoraConfig
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_ggpo.errors import UserError
from lora_ggpo.methods.ascent import Closure
from lora_ggpo.methods.thin import keep_with

_STEP_STRIDE = 1_000_003


def lora_plus(model: Any, args: TrainingArguments, lr_ratio: float) -> Optimizer:
    """The optimizer of `args` in LoRA+'s parameter groups: B learns at `lr_ratio` times A's rate (arXiv 2402.12354)."""
    cls, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    options |= {"loraplus_lr_ratio": lr_ratio, "loraplus_weight_decay": args.weight_decay}
    return create_loraplus_optimizer(model, cls, **options)


def lora_fa(model: Any, args: TrainingArguments) -> Optimizer:
    """LoRA-FA (arXiv 2308.03303): A is frozen, and B's gradient is projected to where the full weight would go."""
    config: Any = model.peft_config["default"]
    return create_lorafa_optimizer(
        model, r=config.r, lora_alpha=config.lora_alpha, lr=args.learning_rate, weight_decay=args.weight_decay
    )


def ivon(model: Any, args: TrainingArguments, ess: float, hess_init: float) -> Optimizer:
    """IVON (arXiv 2402.17641) as it is used for LoRA (2411.04421): learning rates are not rescaled, steps are clipped.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from ivon import IVON
    except ImportError as error:
        raise UserError("optimizer ivon needs ivon-opt; install it with: pip install 'lora-ggpo[ivon]'") from error
    trained = [p for p in model.parameters() if p.requires_grad]
    fixed = {"weight_decay": args.weight_decay, "clip_radius": 1e-3, "rescale_lr": False}
    return IVON(trained, lr=args.learning_rate, ess=ess, hess_init=hess_init, **fixed)


OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {"lora-plus": lora_plus, "lora-fa": lora_fa, "ivon": ivon}


class Posterior:
    """Takes the gradient at a draw from IVON's posterior: one for all micro-batches and processes of an optimizer step.

    IVON wants forward and backward passes within its ``sampled_params``, which moves the weights, and on leaving puts
    them back and reads their gradients. It is entered before a step's first micro-batch and left as the optimizer
    begins its step, so the gradient that it reads is the step's whole one, averaged over the processes and clipped.
    The draw depends on the seed and the step alone: processes agree, and a resumed run repeats it.

    Args:
        optimizer: What `ivon` has made. The number of its step becomes part of its ``state_dict``.
        seed: Of the draws.
    """

    def __init__(self, optimizer: Any, seed: int) -> None:
        self._optimizer, self._seed = optimizer, seed
        self._parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self._draw: AbstractContextManager[None] | None = None
        optimizer.current_step = self._step = torch.zeros((), dtype=torch.long)  # IVON adds to it in place
        keep_with(optimizer, "ivon", [self._step])
        optimizer.register_load_state_dict_post_hook(lambda _: self._place())
        optimizer.register_step_pre_hook(lambda *_: self._collect())

    def backward(self, closure: Closure) -> Tensor:
        """Leave the gradient at the draw; return the loss there."""
        if self._draw is None:
            self._draw = self._optimizer.sampled_params(train=True)
            device = self._parameters[0].device
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(self._seed + _STEP_STRIDE * (1 + int(self._step)))
                self._draw.__enter__()
        return closure()

    def _collect(self) -> None:
        if self._draw is not None:
            for parameter in self._parameters:
                if parameter.grad is None:  # of a layer that has not been used
                    parameter.grad = torch.zeros_like(parameter)
            self._draw.__exit__(None, None, None)
            self._draw = None

    def _place(self) -> None:
        """Put what was loaded beside the parameters: torch moves the state of a parameter, not that of a group."""
        for group in self._optimizer.param_groups:
            group.update({name: group[name].to(self._parameters[0].device) for name in ("momentum", "hess")})


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
