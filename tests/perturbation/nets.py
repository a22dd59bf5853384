"""Small random networks with PEFT adapters, and what a test does with them again and again."""

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

TARGETS = ["inp", "up", "down", "head"]


def conv1d(n: int, m: int, bias: bool = True) -> Conv1D:
    layer = Conv1D(m, n)
    nn.init.normal_(layer.weight, std=n**-0.5)
    nn.init.normal_(layer.bias, std=0.1)
    return layer


class Net(nn.Module):
    """Linear layers of four shapes around one residual block, smooth everywhere."""

    def __init__(self, linear=nn.Linear, bias: bool = True) -> None:
        super().__init__()
        self.inp, self.up = linear(6, 8, bias=bias), linear(8, 14, bias=bias)
        self.down, self.head = linear(14, 8, bias=bias), linear(8, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inp(x))
        return self.head(h + self.down(torch.tanh(self.up(h))))


class TiedNet(nn.Module):
    """A language model's shape: the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(x.new_ones(len(x), 11) + torch.arange(11) * x.mean(-1, keepdim=True), -1)
        return self.head(torch.tanh(self.up(weights @ self.embedding.weight)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Checkpointed(nn.Module):
    """Residual blocks that run again in the backward pass; ``reentrant`` None keeps their activations instead."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.reentrant: bool | None = None
        self.blocks = nn.ModuleList([Block(6) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def adapted(net: nn.Module, config: LoraConfig | None = None, dtype=torch.float64, seed: int = 0) -> PeftModel:
    """A PEFT model in training mode, with every adapter weight and DoRA magnitude away from its initial value."""
    torch.manual_seed(seed)
    config = config or LoraConfig(r=3, lora_alpha=5, target_modules=[t for t in TARGETS if hasattr(net, t)])
    model = get_peft_model(net, config)
    shake(model)
    return model.to(dtype).train()


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_magnitude" in name:
                parameter += 0.3 * torch.randn_like(parameter)
            if "lora_magnitude" in name:
                parameter.abs_()


def net(seed: int = 0, **kwargs) -> Net:
    torch.manual_seed(seed)
    return Net(**kwargs)


def batch(i: int, rows: int = 7, columns: int = 6, dtype=torch.float64) -> Tensor:
    return torch.randn(rows, columns, dtype=dtype, generator=torch.Generator().manual_seed(1000 + i))


def loss_of(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 2, y.shape[-1], dtype=y.dtype, device=y.device)).sum(-1).mean() + y.square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def clone(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
