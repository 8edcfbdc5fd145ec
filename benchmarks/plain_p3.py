"""Textual inversion as widely copied, for comparison.

The text encoder's whole embedding table is AdamW's parameter, and all rows but the new one are restored after every step. Each step encodes
its images again; fp32, eager. Unlike in common copies, files are not read again at every step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from concepts.dataset import ConceptSet, InversionBatch, read_images, square
from concepts.embeddings import install
from concepts.single_file import make_parts, make_scheduler, make_tokenizer
from concepts.stable_diffusion import WITHOUT, load_pipeline


class Plain:
    """A model with one new token, which learns it in the plain way."""

    def __init__(self, model: str, concept: ConceptSet, device: torch.device, lr: float):
        self.pipe = load_pipeline(model, device, torch.float32)
        word = self.pipe.tokenizer(concept.init, add_special_tokens=False).input_ids[0]
        table = self.pipe.text_encoder.get_input_embeddings().weight
        install(self.pipe, {concept.token: table[word : word + 1].float().cpu()})
        self.table = self.pipe.text_encoder.get_input_embeddings().weight.requires_grad_(True)
        self.before = self.table.detach().clone()
        self.optimizer = torch.optim.AdamW([self.table], lr)
        side = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        self.x = square(read_images(concept.images), side).to(device)

    def step(self, sample: InversionBatch) -> None:
        """Take one step on the noise, timesteps and sentences of these samples; the images are encoded again."""
        rows = torch.arange(len(sample.t), device=self.x.device) % len(self.x)
        with torch.no_grad():
            x0 = self.pipe.vae.encode(self.x[rows]).latent_dist.sample() * self.pipe.vae.config.scaling_factor
        self.gradient(replace(sample, x0=x0))
        self.optimizer.step()
        with torch.no_grad():
            self.table[:-1] = self.before[:-1]

    def gradient(self, sample: InversionBatch) -> Tensor:
        """Return the gradient [width] of the loss for the new token's row."""
        self.optimizer.zero_grad()
        text = self.pipe.text_encoder(sample.tokens)[0]
        noisy = self.pipe.scheduler.add_noise(sample.x0, sample.eps, sample.t)
        out = self.pipe.unet(noisy, sample.t, encoder_hidden_states=text).sample
        torch.nn.functional.mse_loss(out, sample.eps).backward()
        gradient = self.table.grad
        assert gradient is not None
        return cast(Tensor, gradient[-1])


def save_random_v1(folder: Path) -> str:
    """Write a diffusers folder in Stable Diffusion v1's layout with random fp16 weights, 2 GB, and return its path.

    Speed and memory don't depend on the weights. They are small, so that nothing overflows.
    """
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline  # slow to import

    parts, stream = make_parts(), torch.Generator().manual_seed(0)
    for part in parts.values():
        values = {name: random_weight(name, tensor, stream) for name, tensor in part.state_dict().items()}
        part.load_state_dict(values, assign=True)
    pipeline = cast(Any, StableDiffusionPipeline)
    pipeline(**parts, tokenizer=make_tokenizer(), scheduler=make_scheduler(), **WITHOUT).save_pretrained(folder)
    return str(folder)


def random_weight(name: str, like: Tensor, stream: torch.Generator) -> Tensor:
    """Return random fp16 matrices and kernels, biases of 0, and norms' scales of 1, in the shape of `like`."""
    if like.dim() > 1:
        return (torch.randn(like.shape, generator=stream) * 0.02).half()
    return torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0).half()
