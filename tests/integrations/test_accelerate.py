"""The Accelerate loop of docs/integration.md is the plain loop with accumulation written out."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from lora_ggpo import GGPO, GGPOConfig

from ..perturbation.nets import adapted, batch, loss_of, net

CONFIG = GGPOConfig(sigma=0.1, rule="relative", beta=0.5)
BATCHES = 6


def parts():
    model = adapted(net())
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def plain():
    model, optimizer = parts()
    ggpo = GGPO(model, CONFIG)
    for i in range(BATCHES):
        (loss_of(model(batch(i))) / 2).backward()
        if i % 2:
            optimizer.step()
            ggpo.step()
            optimizer.zero_grad()
    return model, ggpo


def with_accelerate():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = DataLoader(torch.cat([batch(i) for i in range(BATCHES)]), batch_size=len(batch(0)))
    model, optimizer, loader = accelerator.prepare(*parts(), loader)
    ggpo = GGPO(accelerator.unwrap_model(model), CONFIG)
    for x in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model(x)))
            optimizer.step()
            if accelerator.sync_gradients:
                ggpo.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model), ggpo


def test_accelerate_loop_is_the_plain_loop():
    (model, ggpo), (same, other) = plain(), with_accelerate()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(same.state_dict()[key], value, msg=key)
    assert other.state_dict().keys() == ggpo.state_dict().keys()
    for key, value in ggpo.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, msg=key)
