"""What each process of a run of `test_deepspeed` does; DeepSpeed is imported here alone."""

import os

import deepspeed
import torch
from datasets import Dataset
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import distributed
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from lora_ggpo import GGPO, GGPOCallback, GGPOConfig

from .distributed_run import BACKENDS, LR, ROWS, STEPS, data, parts, sgd
from .nets import loss_of


def run(rank: int, device: str, world: int, cases: dict, trainer: tuple, folder: str, port: int) -> None:
    """Carry out each case, (ZeRO's settings, config, adapter) by name, and save what this process has at its end."""
    os.environ |= {"DS_ACCELERATOR": device, "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    deepspeed.init_distributed(BACKENDS[device])
    for name, case in cases.items():
        torch.save(train(rank, device, world, *case), f"{folder}/{name}-{rank}.pt")
    torch.save(train_by_trainer(folder, device, world, *trainer), f"{folder}/trainer-{rank}.pt")
    distributed.barrier()
    os._exit(0)  # what is saved is all that counts; the libraries' threads do not always end well at exit


def train(
    rank: int, device: str, world: int, zero: dict, config: dict, adapter, micro_batches: int, clip: float
) -> dict:
    """Train on this process's part of every global batch, in micro-batches."""
    model = parts(adapter).to(device)
    settings = {
        "train_micro_batch_size_per_gpu": ROWS // world // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=sgd(model), config=settings)
    ggpo = GGPO(model, GGPOConfig(**config), optimizer=optimizer)
    losses = []
    for step in range(STEPS):
        mean = torch.zeros((), device=device)
        for micro in data(step).float().to(device).chunk(world)[rank].chunk(micro_batches):
            loss = loss_of(engine(micro))
            engine.backward(loss)
            engine.step()
            mean += loss.detach() / micro_batches
        ggpo.step()
        distributed.all_reduce(mean)
        losses.append(float(mean) / world)
    norms = {name: value.clone() for name, value in ggpo.state_dict().items()}
    ggpo.detach()
    assert optimizer.step.__func__ is type(optimizer).step  # nothing of ours is left
    return {"losses": losses, "ggpo": norms, **state_of(model)}


def train_by_trainer(folder: str, device: str, world: int, zero: dict, config: dict, clip: float) -> dict:
    """The same by transformers' Trainer, whose processes take the halves of the global batches in turn."""
    args = TrainingArguments(
        folder,
        use_cpu=device == "cpu",
        ddp_backend=BACKENDS[device],
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // world,
        optim="sgd",
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=clip,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
        },
    )
    rows = Dataset.from_dict({"x": torch.cat([data(step) for step in range(STEPS)]).tolist()})
    model, callback = parts(None), GGPOCallback(GGPOConfig(**config))
    trainer = InOrder(model, args, collate, rows, callbacks=[callback])
    trainer.train()
    assert callback.ggpo is not None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "ggpo": callback.ggpo.state_dict(), **state_of(model)}


class InOrder(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return loss_of(model(inputs["x"]))

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def collate(rows: list[dict]) -> dict:
    return {"x": torch.tensor([row["x"] for row in rows])}


def state_of(model) -> dict:
    """What was trained, put together, and the number of parameters that are not."""
    cut = [p for p in model.parameters() if hasattr(p, "ds_id")]
    empty = sum(p.ds_status is ZeroParamStatus.NOT_AVAILABLE and p.numel() == 0 for p in cut)
    with deepspeed.zero.GatheredParameters(cut):
        state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"state": state, "empty": empty}
