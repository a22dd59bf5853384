"""diffusers' models, small and random, with LoRA on attention layers and convolutions, and the example's script."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_ggpo import GGPO, GGPOConfig

from .surfaces import assert_documented, check_noise

diffusers = pytest.importorskip("diffusers")

EXAMPLE = Path(__file__).parents[2] / "examples" / "diffusers_lora.py"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def small_unet():
    return diffusers.UNet2DConditionModel(
        **{"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 12},
        **{"in_channels": 4, "out_channels": 4, "norm_num_groups": 4, "attention_head_dim": 4},
        **{"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
        **{"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    )


def unet():
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 70])}
    return small_unet(), {**inputs, "encoder_hidden_states": torch.randn(2, 5, 12)}, [*ATTENTION, "conv1", "conv2"]


def sd3():
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 4}
    heads = {"num_attention_heads": 2, "caption_projection_dim": 8, "joint_attention_dim": 12, "out_channels": 4}
    model = diffusers.SD3Transformer2DModel(**sizes, **heads, pooled_projection_dim=16, pos_embed_max_size=16)
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 12)}
    inputs |= {"pooled_projections": torch.randn(2, 16), "timestep": torch.tensor([3, 70])}
    return model, inputs, [*ATTENTION, "add_k_proj", "add_q_proj", "add_v_proj", "proj"]


def flux():
    sizes = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    other = {
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 4, 8),
    }
    model = diffusers.FluxTransformer2DModel(**sizes, **other)
    inputs = {"hidden_states": torch.randn(2, 6, 4), "encoder_hidden_states": torch.randn(2, 5, 12)}
    inputs |= {"pooled_projections": torch.randn(2, 16), "timestep": torch.tensor([0.3, 0.7])}
    return model, {**inputs, "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(5, 3)}, [*ATTENTION, "proj_mlp"]


def dit():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "num_layers": 1, "sample_size": 8}
    model = diffusers.DiTTransformer2DModel(**sizes, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4)
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 7])}
    return model, {**inputs, "class_labels": torch.tensor([1, 4])}, [*ATTENTION, "proj"]


MODELS = {"UNet": unet, "SD3": sd3, "Flux": flux, "DiT": dit}
PIPELINES = {"UNet": "StableDiffusionPipeline", "SD3": "StableDiffusion3Pipeline", "Flux": "FluxPipeline"}


def build(kind):
    torch.manual_seed(0)
    model, inputs, targets = MODELS[kind]()
    model.requires_grad_(False)
    settings = LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    if hasattr(model, "add_adapter"):  # DiT's has none
        model.add_adapter(settings)
    else:
        model = inject_adapter_in_model(settings, model)
    model = model.double().train()
    return model, {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}


def loss_of(model, inputs):
    torch.manual_seed(1)  # DiT drops labels
    return model(**inputs).sample.square().mean()


@pytest.mark.parametrize("kind", MODELS)
def test_each_layer_is_perturbed_and_the_gradient_is_exact(kind):
    model, inputs = build(kind)
    plain = loss_of(model, inputs)
    ggpo = GGPO(model, GGPOConfig(sigma=0.0))
    assert torch.equal(loss_of(model, inputs), plain)
    ggpo = GGPO(model, GGPOConfig(sigma=0.2, rule="relative", beta=0.5, strict=True))
    kinds = {type(layer.base) for layer in ggpo.layers}
    assert kinds == ({nn.Linear, nn.Conv2d} if kind != "Flux" else {nn.Linear})
    for _ in range(2):
        loss = loss_of(model, inputs)
        assert not torch.equal(loss, plain)
        loss.backward()
        ggpo.step()
        model.zero_grad()
    assert ggpo.metrics()["ggpo/coverage"] == 1
    assert_documented(f"diffusers, {kind.replace('Flux', 'FLUX')}", "diffusers")
    for layer in {type(layer.base): layer for layer in ggpo.layers}.values():
        check_noise(layer, images=(8, 8))
    ggpo.detach()
    assert torch.equal(loss_of(model, inputs), plain)


@pytest.mark.parametrize("kind", PIPELINES)
def test_lora_weights_are_saved_and_loaded(kind, tmp_path):
    model, inputs = build(kind)
    ggpo = GGPO(model, GGPOConfig(sigma=0.2, rule="relative", beta=0.5))
    loss_of(model, inputs).backward()
    ggpo.step()
    ggpo.detach()
    prefix = "unet" if kind == "UNet" else "transformer"
    pipeline = getattr(diffusers, PIPELINES[kind])
    weights = get_peft_model_state_dict(model)
    if kind == "UNet":
        weights = diffusers.utils.convert_state_dict_to_diffusers(weights)
    settings = {f"{prefix}_lora_adapter_metadata": model.peft_config["default"].to_dict()}
    pipeline.save_lora_weights(tmp_path, **{f"{prefix}_lora_layers": weights}, **settings)
    torch.manual_seed(0)
    other = MODELS[kind]()[0]
    state, *_, metadata = pipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    other.load_lora_adapter(state, prefix=prefix, metadata=metadata)
    torch.testing.assert_close(other.double().eval()(**inputs).sample, model.eval()(**inputs).sample)


@pytest.fixture
def stable_diffusion(tmp_path):
    """Folder of a pipeline with small random models, and one of images."""
    torch.manual_seed(0)
    special = ["<|startoftext|>", "<|endoftext|>"]
    letters = [chr(code) for code in range(97, 123)]
    vocabulary = {token: i for i, token in enumerate([*letters, *[letter + "</w>" for letter in letters], *special])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=16)
    sizes = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=len(vocabulary), max_position_embeddings=16))
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8)
    pipeline = diffusers.StableDiffusionPipeline(
        vae, encoder, tokenizer, small_unet(), diffusers.DDIMScheduler(), None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(8):
        picture = np.random.default_rng(number).integers(0, 255, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "images" / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": f"a picture of {number % 2}"}))
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(rows))
    return tmp_path


def test_the_example(stable_diffusion, monkeypatch, capsys):
    folder = stable_diffusion
    settings = ["--model", folder / "model", "--data", folder / "images", "--steps", "2", "--resolution", "8"]
    monkeypatch.setattr(sys, "argv", [str(one) for one in (EXAMPLE, *settings, "--output", folder / "saved")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"^step 2: loss \d\.\d{4}, noise in 100% of the layers$", printed, re.MULTILINE), printed
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)
    pipeline.load_lora_weights(folder / "saved")
    found = {name: p for name, p in pipeline.unet.named_parameters() if "lora_B" in name}
    assert any("conv1" in name for name in found)
    assert any("to_q" in name for name in found)
    assert all(value.any() for value in found.values())
