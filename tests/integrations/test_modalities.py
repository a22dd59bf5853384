"""Models of images, speech, and images with text, small and random, with LoRA on all linear layers and convolutions."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from lora_ggpo import GGPO, GGPOConfig

WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
EYE = {**WIDTHS, "image_size": 8, "patch_size": 4}
TEXT = {**WIDTHS, "vocab_size": 40}


def picture(rows=3):
    return torch.randn(rows, 3, 8, 8)


def vit():
    model = ViTForImageClassification(ViTConfig(**EYE, num_labels=3))
    return model, {"pixel_values": picture(), "labels": torch.tensor([0, 2, 1])}


def clip():
    text = CLIPTextConfig(**TEXT, max_position_embeddings=8, bos_token_id=1, eos_token_id=2)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=EYE, projection_dim=8))
    tokens = torch.tensor([[1, 5, 9, 2], [1, 7, 7, 2], [1, 3, 4, 2]])
    return model, {"pixel_values": picture(), "input_ids": tokens, "return_loss": True}


def whisper():
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    special = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(
        **sizes, **heads, **special, num_mel_bins=8, max_source_positions=10, max_target_positions=8, suppress_tokens=[]
    )
    sound = torch.randn(2, 8, 20)
    return WhisperForConditionalGeneration(config), {"input_features": sound, "labels": torch.tensor([[4, 5], [6, 2]])}


def llava():
    llama = LlamaConfig(**TEXT, max_position_embeddings=32, num_key_value_heads=2)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**EYE), text_config=llama, image_token_index=39)
    config.text_config.pad_token_id = 0
    tokens = torch.tensor([[1, 39, 39, 39, 39, 7, 8]] * 2)
    return LlavaForConditionalGeneration(config), {"pixel_values": picture(2), "input_ids": tokens, "labels": tokens}


MODELS = {"ViT": vit, "CLIP": clip, "Whisper": whisper, "Llava": llava}


def build(kind, **settings):
    """A PEFT model in float64, its inputs, and the names of the layers that are adapted."""
    torch.manual_seed(0)
    model, inputs = MODELS[kind]()
    # Whisper asks its convolutions for their stride, which PEFT's layer around one does not tell.
    kinds = nn.Linear if kind == "Whisper" else nn.Linear | nn.Conv2d
    targets = [name for name, one in model.named_modules() if isinstance(one, kinds)]
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **settings))
    inputs = {key: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in inputs.items()}
    return peft.double().train(), inputs, targets


@pytest.mark.parametrize("kind", MODELS)
def test_each_layer_is_perturbed_and_nothing_else_is_changed(kind):
    model, inputs, targets = build(kind)
    plain = model(**inputs).loss
    plain.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    ggpo = GGPO(model, GGPOConfig(sigma=0.0))
    loss = model(**inputs).loss
    loss.backward()
    assert torch.equal(loss, plain)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if p.grad is not None)
    model.zero_grad()

    ggpo = GGPO(model, GGPOConfig(sigma=0.2, rule="relative", beta=0.5, strict=True))
    assert {layer.name.removeprefix("base_model.model.") for layer in ggpo.layers} == set(targets)
    noisy = model(**inputs).loss
    noisy.backward()
    ggpo.step()
    assert ggpo.metrics()["ggpo/coverage"] == 1
    assert noisy != plain
    assert model(**inputs).loss != noisy
    model.eval()
    assert torch.equal(model(**inputs).loss, plain)
    ggpo.detach()


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_the_perturbed_weights(kind):
    """The same draw as dense matrices added to W0, and PEFT's own forward and autograd."""
    model, inputs, _ = build(kind)
    ggpo = GGPO(model, GGPOConfig(sigma=0.2, beta=0.0))
    loss = model(**inputs).loss
    loss.backward()
    drawn = ggpo._drawn
    given = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    ggpo.detach()
    model.zero_grad()
    with torch.no_grad():
        for layer, noise in zip(ggpo.layers, drawn, strict=True):
            assert isinstance(layer.module, LoraLayer)
            w0 = layer.base.weight  # that of Whisper's head is the embedding's, which has no noise
            layer.base.weight = nn.Parameter(w0 + noise.matrix().view(w0.shape), requires_grad=False)
    dense = model(**inputs).loss
    dense.backward()
    torch.testing.assert_close(loss, dense)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(given[name], parameter.grad, rtol=1e-8, atol=1e-10)
