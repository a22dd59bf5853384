"""LoRA-GGPO in the loop of diffusers' text-to-image LoRA script: attention layers and convolutions of a UNet."""

import argparse

import numpy as np
import torch
from accelerate import Accelerator
from datasets import load_dataset
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch.utils.data import DataLoader

from lora_ggpo import GGPO, GGPOConfig

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--data", required=True, help="folder of images with a metadata.jsonl of file_name and text")
parser.add_argument("--resolution", type=int, default=512)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--output", default="adapter")
args = parser.parse_args()

accelerator = Accelerator(gradient_accumulation_steps=2)
pipeline = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None)
unet, vae, text_encoder, tokenizer = pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer
noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
for model in (unet, vae, text_encoder):
    model.requires_grad_(False).to(accelerator.device)
layers = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
unet.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=layers))


def collate(batch):
    """Images and captions as a batch of tensors."""
    size = (args.resolution, args.resolution)
    pixels = np.stack([np.asarray(row["image"].convert("RGB").resize(size), dtype=np.float32) for row in batch])
    tokens = tokenizer([row["text"] for row in batch], padding="max_length", truncation=True, return_tensors="pt")
    return torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2), tokens.input_ids


rows = load_dataset("imagefolder", data_dir=args.data, split="train")
loader = DataLoader(rows, batch_size=2, shuffle=True, collate_fn=collate)
optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-4)
unet, optimizer, loader = accelerator.prepare(unet.train(), optimizer, loader)

ggpo = GGPO(accelerator.unwrap_model(unet), GGPOConfig(sigma=0.1, rule="relative", beta=0.5))
step = 0
while step < args.steps:
    for pixels, tokens in loader:
        with accelerator.accumulate(unet):
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
                states = text_encoder(tokens)[0]
            noise = torch.randn_like(latents)
            times = torch.randint(noise_scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
            noisy = noise_scheduler.add_noise(latents, noise, times)
            loss = torch.nn.functional.mse_loss(unet(noisy, times, states).sample.float(), noise.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                ggpo.step(scaler=accelerator.scaler)  # before optimizer.step(), which changes the scale
                step += 1
            optimizer.step()
            optimizer.zero_grad()
        if step == args.steps:
            break
metrics = ggpo.metrics()
accelerator.print(f"step {step}: loss {loss.item():.4f}, noise in {metrics['ggpo/coverage']:.0%} of the layers")
ggpo.detach()
if accelerator.is_main_process:
    unet = accelerator.unwrap_model(unet)
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    settings = {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict()}
    StableDiffusionPipeline.save_lora_weights(args.output, unet_lora_layers=weights, **settings)
