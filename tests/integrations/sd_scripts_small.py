"""sd-scripts' own train_network.py on a small random model, with the arguments that it takes.

The folder of sd-scripts is that of the environment's SD_SCRIPTS; the model, its tokenizer and four pictures are made in
the current one at first use. Where sd-scripts has the widths of SD's UNet in its code, they are smaller here.
"""

import importlib
import json
import os
import runpy
import sys
from functools import reduce
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from PIL import Image

WIDTHS = (32, 32, 32, 32)


def make_model():
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocabulary = make_tokenizer(Path("tokenizers") / "openai_clip-vit-large-patch14")
    encoder = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=len(vocabulary), bos_token_id=26, eos_token_id=27))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = diffusers.AutoencoderKL(block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=4, **blocks)
    unet = diffusers.UNet2DConditionModel(8, block_out_channels=WIDTHS, cross_attention_dim=32, attention_head_dim=2)
    parts = {"vae": vae, "text_encoder": encoder, "unet": unet, "scheduler": diffusers.DDIMScheduler()}
    others = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor"))
    diffusers.StableDiffusionPipeline(**parts, **others, requires_safety_checker=False).save_pretrained("model")


def make_tokenizer(folder):
    """CLIP's, of letters that end a word; where sd-scripts looks for it before it asks the hub."""
    folder.mkdir(parents=True)
    tokens = [*(chr(code) + "</w>" for code in range(97, 123)), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    return vocabulary


def make_pictures(folder):
    folder.mkdir(parents=True)
    for number in range(4):
        picture = np.random.default_rng(number).integers(0, 255, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")


def make_torchvision():
    """What sd-scripts calls of torchvision, whose wheels are for a torch with CUDA."""

    def to_tensor():
        return lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255

    def normalise(mean, std):
        return lambda picture: (picture - mean[0]) / std[0]

    def compose(parts):
        return lambda picture: reduce(lambda made, part: part(made), parts, picture)

    module = ModuleType("torchvision")
    module.transforms = SimpleNamespace(Compose=compose, ToTensor=to_tensor, Normalize=normalise)
    module.__spec__ = ModuleSpec("torchvision", None)  # others look for it, and for its version, which is not there
    sys.modules["torchvision"] = module


def main():
    make_torchvision()
    if not Path("model").exists():
        make_model()
        make_pictures(Path("pictures") / "1_a")
    script = Path(os.environ["SD_SCRIPTS"]) / "train_network.py"
    sys.path.insert(0, str(script.parent))
    unet = importlib.import_module("library.original_unet")
    unet.BLOCK_OUT_CHANNELS, unet.TIMESTEP_INPUT_DIM, unet.TIME_EMBED_DIM = WIDTHS, WIDTHS[0], 4 * WIDTHS[0]
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
