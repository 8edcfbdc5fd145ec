"""A layout in the first noise.

Stable Diffusion's schedule ends before all signal is gone: at its last step 7 % of the latent's amplitude is left (sqrt(abar_T) = 0.068),
so in training even the noisiest pictures tell by their low frequencies where something is (Lin et al. 2023, arXiv 2305.08891). Drawing
starts from noise alone, and where things end up is an accident of that noise's own low frequencies. A sketch, a soft spot of colour per
region, takes their place and says where things belong. Spots stand out from the ground that the prompt promises: red on "a red background"
would say that nothing is there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from concepts.composition.layout import key_of
from concepts.sampling import StableDiffusionSampler
from diffusion.noise import generators
from runtime.seeds import derived_seed

CHOICE = 4  # random colours of a spot, of which the one farthest from the ground is taken
LOW = 4.0  # periods along each side: what is coarser than that places things
FLAT = 8  # latents along each side of the one-coloured pictures that are encoded


@torch.no_grad()
def with_sketch(
    noise: Tensor,
    painter: StableDiffusionSampler,
    shares: Tensor,
    seeds: Sequence[int],
    ground: Tensor,
    strength: float,
) -> Tensor:
    """noise [B,4,h,w] with `strength` times a sketch in the place of its low frequencies; shares [N,B,h,w]: how much of each position
    belongs to a region, ground [B,4]: the latent of what is around them. A picture whose regions are empty or cover all of it keeps its
    noise, bit for bit."""
    drawn = placed(shares).any(0)
    if not drawn.any():
        return noise
    sketched = without_low(noise) + strength * sketches(painter, shares, seeds, ground)
    return torch.where(drawn[:, None, None, None], sketched, noise)


def without_low(noise: Tensor) -> Tensor:
    """[B,4,h,w] without its frequencies up to LOW."""
    height, width = noise.shape[-2:]
    down, across = torch.fft.fftfreq(height, 1 / height)[:, None], torch.fft.fftfreq(width, 1 / width)
    high = (down**2 + across**2 > LOW**2).to(noise)
    return torch.fft.ifft2(torch.fft.fft2(noise) * high).real


def sketches(painter: StableDiffusionSampler, shares: Tensor, seeds: Sequence[int], ground: Tensor) -> Tensor:
    """[B,4,h,w] of mean 0, so that the picture as a whole gets no tint, in the amplitude that training leaves at its last step. Colours
    follow from each picture's seed and each region's shape."""
    spots = _spots(shares)[:, :, None] * apart(painter, shares, seeds, ground)[..., None, None]
    drawn = spots.sum(0)
    left = math.sqrt(painter.schedule.alpha_bar_at(len(painter.schedule) - 1))
    return left * (drawn - drawn.mean((2, 3), keepdim=True))


def apart(painter: StableDiffusionSampler, shares: Tensor, seeds: Sequence[int], ground: Tensor) -> Tensor:
    """[N,B,4], by what each region's colour differs from the ground's: of some random ones the farthest away."""
    colours = torch.stack([_colours(shares[:, row].cpu(), seed) for row, seed in enumerate(seeds)], 2)
    away = _latents(painter, colours).to(shares) - ground  # [N,CHOICE,B,4]
    farthest = away.square().sum(3).argmax(1)[:, None, :, None]
    return away.gather(1, farthest.expand_as(away[:, :1]))[:, 0]


def placed(shares: Tensor) -> Tensor:
    """[N,B,h,w] -> [N,B]: whether a region is somewhere rather than nowhere or everywhere."""
    return shares.amax((2, 3)) > shares.amin((2, 3))


def _spots(shares: Tensor) -> Tensor:
    """[N,B,h,w] -> the same, 0..1: a Gaussian of each region's centre and spread, so that a box doesn't ask for something square."""
    height, width = shares.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([y, x], -1).view(-1, 2).to(shares)  # [P,2]
    weight = shares.flatten(2) / shares.flatten(2).sum(2, keepdim=True).clamp(min=1e-6)  # [N,B,P]
    away = places - (weight @ places)[:, :, None]  # [N,B,P,2]
    spread = (
        torch.einsum("nbp,nbpi,nbpj->nbij", weight, away, away) + torch.eye(2).to(shares) / 12
    )  # at least a position's own
    distance = torch.einsum("nbpi,nbij,nbpj->nbp", away, torch.linalg.inv(spread), away)
    return (-distance / 2).exp().view_as(shares) * placed(shares)[..., None, None]


def _colours(shares: Tensor, seed: int) -> Tensor:
    """[N,h,w] -> [N,CHOICE,3] in 0..1."""
    keys = [derived_seed(seed, key_of(share)) for share in shares]
    return torch.stack([torch.rand(CHOICE, 3, generator=stream) for stream in generators(keys)])


def _latents(painter: StableDiffusionSampler, colours: Tensor) -> Tensor:
    """[..,3] -> [..,4], in the U-Net's scale: the mean of what the encoder makes of a picture of that colour."""
    side = FLAT * painter.pipe.vae_scale_factor
    flat = (colours.flatten(0, -2) * 2 - 1)[..., None, None].expand(-1, -1, side, side)
    return painter.encode(flat).mean((2, 3)).view(*colours.shape[:-1], -1)
