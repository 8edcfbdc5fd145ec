"""A random Stable Diffusion of a few thousand weights as a diffusers folder, a random CLIP, and images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPTextModel

from miniature.diffusion_parts import make_autoencoder, make_pipeline, make_unet
from miniature.scenery.vocabulary import make_tokenizer

WIDTH = 32


def text_config() -> CLIPTextConfig:
    """Return one narrow layer on the miniature's vocabulary."""
    tokenizer = make_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save_pipeline(folder: Path) -> Path:
    """64x64 images, 16x16 latents; the text has more influence than in a fresh U-Net, so that prompts differ."""
    torch.manual_seed(0)
    tower, unet = CLIPTextModel(text_config()), make_unet((16, 16), WIDTH)
    with torch.no_grad():
        table: Any = tower.get_input_embeddings()
        table.weight.mul_(20)
        for name, weight in unet.named_parameters():
            if "attn2.to_out" in name or name.startswith("conv_out"):
                weight.normal_(std=0.3)
    make_pipeline(make_autoencoder((8, 8, 8)), unet, tower, make_tokenizer()).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """Save a random CLIP with its processor on the same vocabulary."""
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**shape, "image_size": 64, "patch_size": 32}
    config = CLIPConfig(text_config=text_config().to_dict(), vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    sized: dict[str, Any] = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    CLIPProcessor(CLIPImageProcessor(**sized), make_tokenizer()).save_pretrained(folder)
    return folder


def save_pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """Save coarse random images, one of them wider than high."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = random.integers(0, 256, (4, 4 + (index == 0), 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((20 * pixels.shape[1], 80), Image.Resampling.NEAREST).save(
            folder / f"{index}.png"
        )
    return folder
