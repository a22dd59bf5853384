"""A network module as sd-scripts has them, and its training loop: signatures and order of calls, and little else.

With the environment's SD_SCRIPTS at a copy of sd-scripts its own modules can be imported, too. What they import of the
rest of the world and do not use here is made up.
"""

import importlib
import os
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock, patch

import torch
from accelerate import Accelerator
from torch import nn


class LoRAModule(nn.Module):
    def __init__(self, lora_name, org_module, multiplier=1.0, lora_dim=4, alpha=1, dropout=None, split_dims=None):
        super().__init__()
        self.lora_name, self.lora_dim, self.multiplier, self.scale = lora_name, lora_dim, multiplier, alpha / lora_dim
        if isinstance(org_module, nn.Conv2d):
            shape = (org_module.kernel_size, org_module.stride, org_module.padding)
            self.lora_down = nn.Conv2d(org_module.in_channels, lora_dim, *shape, bias=False)
            self.lora_up = nn.Conv2d(lora_dim, org_module.out_channels, 1, bias=False)
        elif split_dims is None:
            self.lora_down = nn.Linear(org_module.in_features, lora_dim, bias=False)
            self.lora_up = nn.Linear(lora_dim, org_module.out_features, bias=False)
        else:
            down = [nn.Linear(org_module.in_features, lora_dim, bias=False) for _ in split_dims]
            self.lora_down = nn.ModuleList(down)
            self.lora_up = nn.ModuleList([nn.Linear(lora_dim, width, bias=False) for width in split_dims])
        self.register_buffer("alpha", torch.tensor(alpha))
        self.org_module, self.dropout = org_module, dropout

    def apply_to(self):
        self.org_forward = self.org_module.forward
        self.org_module.forward = self.forward
        del self.org_module

    def forward(self, x):
        y = self.org_forward(x)
        if isinstance(self.lora_down, nn.ModuleList):
            parts = [up(down(x)) for down, up in zip(self.lora_down, self.lora_up, strict=True)]
            return y + torch.cat(parts, -1) * self.multiplier * self.scale
        return y + self.lora_up(self.lora_down(x)) * self.multiplier * self.scale


class LoRANetwork(nn.Module):
    def __init__(self, text_encoders, unet, multiplier, lora_dim, alpha, split=False):
        super().__init__()
        self.multiplier = multiplier
        models = {"lora_te": text_encoders, "lora_unet": [unet]}
        found = {prefix: [] for prefix in models}
        for prefix, group in models.items():
            for model in group:
                for name, module in model.named_modules():
                    if isinstance(module, nn.Linear | nn.Conv2d):
                        parts = [module.out_features // 2] * 2 if split and name.endswith("qkv") else None
                        name = f"{prefix}_{name.replace('.', '_')}"
                        lora = LoRAModule(name, module, multiplier, lora_dim, alpha, split_dims=parts)
                        found[prefix].append(lora)
        self.text_encoder_loras, self.unet_loras = found.values()

    def set_multiplier(self, multiplier):
        for lora in self.text_encoder_loras + self.unet_loras:
            lora.multiplier = multiplier

    def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
        self.text_encoder_loras = self.text_encoder_loras if apply_text_encoder else []
        self.unet_loras = self.unet_loras if apply_unet else []
        for lora in self.text_encoder_loras + self.unet_loras:
            lora.apply_to()
            self.add_module(lora.lora_name, lora)

    def is_mergeable(self):
        return True

    def load_weights(self, file):
        return self.load_state_dict(torch.load(file), False)

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, default_lr):
        self.requires_grad_(True)
        return [{"params": list(self.parameters()), "lr": default_lr}], ["unet"]

    def prepare_grad_etc(self, text_encoder, unet):
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder, unet):
        self.train()

    def get_trainable_params(self):
        return self.parameters()

    def save_weights(self, file, dtype, metadata):
        torch.save({key: value.to(dtype or value.dtype) for key, value in self.state_dict().items()}, file)


def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, **kwargs):
    encoders = text_encoder if isinstance(text_encoder, list) else [text_encoder]
    split = kwargs.get("split_qkv") == "True"
    return LoRANetwork(encoders, unet, multiplier, network_dim or 4, network_alpha or 1.0, split)


def create_network_from_weights(
    multiplier, file, vae, text_encoder, unet, weights_sd=None, for_inference=False, **kwargs
):
    weights = torch.load(file) if weights_sd is None else weights_sd
    rank = next(value.shape[0] for key, value in weights.items() if "lora_down" in key)
    return create_network(multiplier, rank, 1.0, vae, text_encoder, unet), weights


def stub():
    """``networks`` with the classes above as ``networks.lora`` and ``networks.lora_flux``."""
    package = ModuleType("networks")
    modules = {f"networks.{name}": sys.modules[__name__] for name in ("lora", "lora_flux")}
    return {"networks": package, **modules}


def real():
    """sd-scripts' own modules; None without the environment's SD_SCRIPTS."""
    folder = os.environ.get("SD_SCRIPTS")
    if not folder:
        return None
    if folder not in sys.path:
        sys.path.insert(0, folder)
    assert importlib.import_module("diffusers").AutoencoderKL  # asks for torchvision before one is made up
    made_up = {name: MagicMock() for name in ("cv2", "torchvision") if not find_spec(name)}
    with patch.dict(sys.modules, made_up):
        modules = {f"networks.{name}": importlib.import_module(f"networks.{name}") for name in ("lora", "lora_flux")}
        before = dict(sys.modules)
    sys.modules.update({name: module for name, module in before.items() if name not in made_up})
    return modules


def train(network, text_encoder, unet, batches, accumulate=1, accelerator=None, clip=1.0, lr=0.1, seen=None, mean=None):
    """The calls of sd-scripts' train_network.py in their order; returns the losses."""
    accelerator = accelerator or Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    unet.requires_grad_(False).eval()
    text_encoder.requires_grad_(False).eval()
    parameters, _ = network.prepare_optimizer_params(None, lr, lr)
    optimizer = torch.optim.SGD(parameters, lr)
    unet, text_encoder, network, optimizer = accelerator.prepare(unet, text_encoder, network, optimizer)
    inside = accelerator.unwrap_model(network)
    inside.prepare_grad_etc(text_encoder, unet)
    if seen and seen.get("resume"):
        accelerator.load_state(seen["resume"])
    on_step_start = getattr(inside, "on_step_start", lambda *_: None)
    inside.on_epoch_start(text_encoder, unet)
    losses = []
    for number, (tokens, picture) in enumerate(batches, 1):
        with accelerator.accumulate(network):
            on_step_start(text_encoder, unet)
            loss = unet(picture, text_encoder(tokens)).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                for parameter in network.parameters() if mean else ():
                    parameter.grad = mean(parameter.grad)
                accelerator.clip_grad_norm_(inside.get_trainable_params(), clip)
                if hasattr(network, "update_grad_norms"):
                    network.update_grad_norms()
                if hasattr(network, "update_norms"):
                    network.update_norms()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if hasattr(network, "weight_norms"):
            logged = network.weight_norms(), network.grad_norms(), network.combined_weight_norms()
            if seen is not None:
                seen.setdefault("logged", []).append(logged)
        if seen and seen.get("save") and number == seen["save"][1]:
            accelerator.save_state(seen["save"][0])
        losses.append(loss.item())
    return losses


def arguments(steps):
    return SimpleNamespace(max_train_steps=steps)
