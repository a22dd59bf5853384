"""What each process of a distributed run of `test_distributed` does."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lora_ggpo import GGPO, GGPOConfig
from lora_ggpo.perturbation.rise import Rise

from .nets import adapted, batch, conv1d, loss_of, net

STEPS, LR = 4, 0.05
ROWS = 8
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def data(step: int) -> torch.Tensor:
    """The global batch of a step."""
    return batch(step, rows=ROWS)


def parts(adapter):
    base = net(linear=conv1d) if adapter and adapter.fan_in_fan_out else net()
    return adapted(base, adapter).float()


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)


def worlds() -> list:
    """(device, number of processes) to test on: two on the CPU, and one on each GPU, up to a divisor of a batch."""
    gpus = torch.cuda.device_count()
    on_gpus = ("cuda", 1 << min(gpus, ROWS).bit_length() - 1 if gpus else 0)
    return [("cpu", 2), pytest.param(on_gpus, marks=pytest.mark.skipif(not gpus, reason="needs a GPU"))]


def run(rank: int, device: str, world: int, cases: dict, folder: str) -> None:
    """Carry out each case, (kind, config, adapter) by name, and save what this process has at its end."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    if device == "cuda":
        torch.cuda.set_device(rank)
    distributed.init_process_group(BACKENDS[device], init_method=meeting, rank=rank, world_size=world)
    for name, case in cases.items():
        torch.save(train(rank, device, world, *case), f"{folder}/{name}-{rank}.pt")
    torch.save(steered(rank), f"{folder}/rise-{rank}.pt")
    distributed.destroy_process_group()


def steered(rank: int) -> torch.Tensor:
    """How a process steers sigma whose own batch rose by 10 percent, or by 10 more in each process behind the first."""
    rise = Rise(0.05, 0.1)
    rise.apply(1.0)
    rise.take(*torch.tensor([1.1, 1.1, 1.0]) + torch.tensor([0.1, 0.1, 0.0]) * rank)
    return rise.state()


def train(rank: int, device: str, world: int, kind: str, config: dict, adapter) -> dict:
    """Train on this process's part of every global batch."""
    model = parts(adapter).to(device)
    trained = model
    if kind == "ddp":
        trained = DistributedDataParallel(model)
    elif kind == "fsdp":
        mesh = init_device_mesh(device, (world,))
        for name in ("inp", "up", "down", "head"):
            fully_shard(getattr(model, name), mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = sgd(model)
    ggpo = GGPO(model, GGPOConfig(**config))
    losses = []
    for step in range(STEPS):
        loss = loss_of(trained(data(step).float().chunk(world)[rank].to(device)))
        loss.backward()
        optimizer.step()
        ggpo.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        distributed.all_reduce(mean)
        losses.append(float(mean) / world)
    state = {name: whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    norms = {name: value.clone() for name, value in ggpo.state_dict().items()}
    largest = max(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
    return {"losses": losses, "state": state, "ggpo": norms, "largest": largest}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
