"""A layout in the first noise.

Stable Diffusion's schedule ends before all signal is gone: at its last step 7 % of the latent's amplitude is left (sqrt(abar_T) = 0.068),
so in training even the noisiest pictures tell by their low frequencies where something is (Lin et al. 2023, arXiv 2305.08891). Drawing
starts from noise alone, and where things end up is that noise's accident. A sketch, one flat colour per region on another, added to the
first noise in that proportion, says where they belong.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.noise import generators
from P3_drawing import Painter
from runtime.generation import derived_seed

APART = 0.35  # least distance of a region's colour to the ground's in every channel, of 1
FLAT = 8  # latents along each side of the one-coloured pictures that are encoded


@torch.no_grad()
def sketches(painter: Painter, shares: Tensor, seeds: Sequence[int]) -> Tensor:
    """[B,4,h,w] to be added to standard normal noise, of mean 0 so that the picture as a whole gets no tint; shares [N,B,h,w], how much of
    each position belongs to a region. Colours follow from each picture's seed and each region's shape."""
    colours = torch.stack([_colours(shares[:, row].cpu(), seed) for row, seed in enumerate(seeds)], 1)
    ground, *regions = _latents(painter, colours).to(shares)[..., None, None].unbind(0)
    drawn = (shares[:, :, None] * (torch.stack(regions) - ground)).sum(0)
    left = math.sqrt(painter.schedule.alpha(len(painter.schedule) - 1))
    return left * (drawn - drawn.mean((2, 3), keepdim=True))


def _colours(shares: Tensor, seed: int) -> Tensor:
    """[N,h,w] -> [1 + N,3] in 0..1: the ground's colour, and regions' that stand out from it."""
    keys = [derived_seed(seed, zlib.crc32(share.numpy().tobytes())) for share in shares]
    ground, *away = (torch.rand(3, generator=stream) for stream in generators([derived_seed(seed), *keys]))
    return torch.stack([ground, *((ground + APART + (1 - 2 * APART) * step) % 1 for step in away)])


def _latents(painter: Painter, colours: Tensor) -> Tensor:
    """[1 + N,B,3] -> [1 + N,B,4], in the U-Net's scale: the mean of what the encoder makes of a picture of that colour."""
    vae, side = painter.pipe.vae, FLAT * painter.pipe.vae_scale_factor
    flat = (colours.flatten(0, 1) * 2 - 1).to(vae.device, vae.dtype)[..., None, None].expand(-1, -1, side, side)
    means = vae.encode(flat).latent_dist.mean.float().mean((2, 3)) * vae.config.scaling_factor
    return means.unflatten(0, colours.shape[:2])
