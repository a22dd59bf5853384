"""How the processes of a run share its model out: the recipe's `sharding` as transformers and accelerate know it.

FSDP2 and ZeRO-3 cut every weight into a piece a process, ZeRO-1 the optimizer's state alone, ZeRO-2 the gradients too.
A cut model is trained, scored and saved by all processes together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_init

from lora_ggpo.errors import UserError
from lora_ggpo.perturbation.weights import whole
from lora_ggpo.perturbation.zero import gather, is_cut
from lora_ggpo.recipe.recipe import Recipe
from lora_ggpo.workspace.files import read_json
from lora_ggpo.workspace.ranks import is_first, is_launched

_AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_LAUNCH = "start it with one: torchrun --nproc-per-node=N -m lora_ggpo.cli train RECIPE.yaml"


def sharding_arguments(recipe: Recipe) -> dict[str, Any]:
    """What `sharding` sets of TrainingArguments; a process that no launcher started has nobody to share with."""
    training, own = recipe.training_fields, ("fsdp", "fsdp_config", "deepspeed")
    if not is_launched():
        return dict.fromkeys(own)
    if recipe.sharding == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"version": 2, **(training.get("fsdp_config") or {})}}
    if recipe.sharding == "none":
        return {name: training[name] for name in own if name in training}
    settings: dict[str, Any] = dict.fromkeys(_AUTO, "auto")
    stage = int(recipe.sharding.removeprefix("zero"))
    precision = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    return {"deepspeed": {**settings, **precision, "zero_optimization": {"stage": stage}}}


def check_launch(recipe: Recipe) -> None:
    """Refuse to train a model alone that is to be shared out.

    Raises:
        UserError: no launcher started this process.
    """
    if recipe.shards and not is_launched():
        raise UserError(f"sharding {recipe.shards} is for the processes of a launcher, and there is none; {_LAUNCH}.")


def cuts_weights(args: TrainingArguments) -> bool:
    """Whether each process holds but a piece of every weight."""
    plugin: Any = args.deepspeed_plugin
    stage = plugin.hf_ds_config.config.get("zero_optimization", {}).get("stage", 0) if plugin else 0
    return is_fsdp(args) or stage == 3


def is_fsdp(args: TrainingArguments) -> bool:
    """Whether FSDP shares the model out: by the arguments, or by what `accelerate launch` sets."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard_on_cpu(trainer: Trainer) -> None:
    """Have accelerate use FSDP2 on processors as it does on accelerators, where alone it looks for the plugin."""
    state, args = trainer.accelerator.state, trainer.args
    if not args.fsdp or state.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    if args.bf16 or args.fp16:
        plugin.set_mixed_precision("bf16" if args.bf16 else "fp16")
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def place(trainer: Trainer) -> None:
    """Cut a model that is scored and was not trained by `trainer`, as its `evaluate` does."""
    if trainer.is_deepspeed_enabled:
        deepspeed_init(trainer, num_training_steps=0, inference=True)
        trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    else:
        optimizer = trainer.create_optimizer()  # accelerate takes no model without one
        trainer.model_wrapped, _ = trainer.accelerator.prepare(trainer.model, optimizer)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """What is saved of a cut model: of one with an adapter what is trained, else all.

    The first process has it; every process must call this.
    """
    state = model.state_dict(keep_vars=True)
    parts = {n: t for n, t in state.items() if t.requires_grad} if isinstance(model, PeftModel) else state
    return {name: value for name, value in _put_together(parts) if is_first()}


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, whole and on the CPU of every process, each of which must call this."""
    return dict(_put_together({name: p for name, p in model.named_parameters() if p.requires_grad}))


def put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put whole `weights` into a model; what it does not have is left out. Every process must call this."""
    for name, parameter in model.named_parameters():
        value = weights.get(_plain(name))
        if value is None:
            continue
        with torch.no_grad(), _writing(parameter):
            here: Tensor = value.to(parameter.device)
            if isinstance(parameter, DTensor):
                on_all = DTensor.from_local(here, parameter.device_mesh, [Replicate()], run_check=False)
                here = on_all.redistribute(placements=parameter.placements)
            parameter.copy_(here)


def _writing(parameter: Any) -> AbstractContextManager[Any]:
    """What a parameter is written in: ZeRO-3 puts it together for that, and cuts it again."""
    if not is_cut(parameter):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def _put_together(parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, part in parts.items():
        with torch.no_grad(), gather([part]):
            yield _plain(name), whole(part.detach()).to("cpu", copy=True).contiguous()


def _plain(name: str) -> str:
    """The name of a weight without FSDP's activation checkpoints."""
    return name.replace("_checkpoint_wrapped_module.", "")


def piece(parameter: Any) -> Tensor:
    """What this process holds of a parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return parameter.ds_tensor if is_cut(parameter) else parameter


# --- going on with other processes ---------------------------------------------------------------------------------

PROCESSES = "processes.json"
"""In a checkpoint: how many processes made it, and how many micro-batches each took a step."""


def processes(args: TrainingArguments) -> dict[str, int]:
    """What `PROCESSES` holds."""
    return {"processes": args.world_size, "gradient_accumulation_steps": args.gradient_accumulation_steps}


def share_steps(args: TrainingArguments, checkpoint: Path, recipe: Recipe) -> None:
    """Have the processes of now take the same micro-batches a step as those that made `checkpoint`, in the same order.

    Raises:
        UserError: they cannot, or would draw other noise.
    """
    made, now = _made_by(checkpoint, args), args.world_size
    before, each = made["processes"], made["gradient_accumulation_steps"]
    _refuse(checkpoint, before, now, _why_not(before, each, now, recipe) if before != now else None)
    args.gradient_accumulation_steps = before * each // now


def check_draws(args: TrainingArguments, checkpoint: Path, recipe: Recipe, model: Any) -> None:
    """Refuse to go on from `checkpoint` with other processes than made it, where they would drop out other values.

    Raises:
        UserError: they would.
    """
    before, now = _made_by(checkpoint, args)["processes"], args.world_size
    _refuse(checkpoint, before, now, _what_differs(before, recipe, model) if before != now else None)


def _made_by(checkpoint: Path, args: TrainingArguments) -> dict[str, int]:
    file = checkpoint / PROCESSES  # an earlier release wrote none, and had as many to go on
    made: dict[str, int] = read_json(file) if file.is_file() else processes(args)
    return made


def _refuse(checkpoint: Path, before: int, now: int, reason: str | None) -> None:
    if reason:
        raise UserError(f"{checkpoint} is of {before} processes, and {now} cannot go on from it: {reason}.")


def _why_not(before: int, each: int, now: int, recipe: Recipe) -> str | None:
    """Why `now` processes would not go on as `before`, with `each` micro-batches a step, began."""
    if (recipe.shards or "").startswith("zero"):
        return f"DeepSpeed's checkpoints are of as many processes as made them; start {before}"
    if before * each % now:
        return f"a step is of {before * each} micro-batches, which they cannot share evenly; start {before}"
    ggpo = recipe.ggpo_config(seed=0)
    if ggpo and (ggpo.ranks == "agree") != (ggpo.redraw == "optimizer-step"):
        draws = f"with ggpo.ranks {ggpo.ranks} and ggpo.redraw {ggpo.redraw} they would draw other noise"
        return f"{draws}; start {before}"
    return None


def _what_differs(before: int, recipe: Recipe, model: Any) -> str | None:
    """What other processes than the `before` ones would draw otherwise."""
    dropouts = {**model.config.to_dict(), **(recipe.adapter_fields or {})}
    drawing = [name for name, value in dropouts.items() if "drop" in name and isinstance(value, float) and value > 0]
    drawing += [name for name in ("neftune_noise_alpha",) if recipe.training_fields.get(name)]
    drawing += [name for name in ("monteclora_config",) if dropouts.get(name)]
    return f"they would draw otherwise for {drawing[0]}; start {before}" if drawing else None
