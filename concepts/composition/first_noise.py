"""A sketch of the layout in the first noise.

Stable Diffusion's schedule ends before all signal is gone: at its last step 7 % of the latent's amplitude is left (sqrt(abar_T) = 0.068).
So in training, low frequencies show where things are even at the last step (Lin et al. 2023, arXiv 2305.08891). Sampling starts from pure
noise, whose own low frequencies place things at random. A sketch replaces them: one soft spot of colour per region. The spots differ from
the background that the prompt implies, since red on "a red background" would show nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from concepts.composition.masks import is_placed, mask_seed
from concepts.sampling import StableDiffusionSampler
from diffusion.noise import generators
from runtime.seeds import derived_seed

CANDIDATES = 4  # random colours for a spot; the one farthest from the background is taken
LOW = 4.0  # periods along each side: coarser structures decide where things are placed
FLAT = 8  # latent positions along each side of the one-coloured images that are encoded


@torch.no_grad()
def with_sketch(
    noise: Tensor,
    sampler: StableDiffusionSampler,
    soft_masks: Tensor,
    seeds: Sequence[int],
    background_latent: Tensor,
    strength: float,
) -> Tensor:
    """Return noise [B,4,h,w] with its low frequencies replaced by `strength` times a sketch of the regions.

    soft_masks [N,B,h,w] are the regions, background_latent [B,4] is the mean latent around them.
    An image whose regions are empty or cover everything keeps its noise, bit for bit.
    """
    has_regions = is_placed(soft_masks).any(0)
    if not has_regions.any() or not strength:
        return noise
    sketched = remove_low(noise) + strength * sketch(sampler, soft_masks, seeds, background_latent)
    return torch.where(has_regions[:, None, None, None], sketched, noise)


def predicted_background(sampler: StableDiffusionSampler, prompts: Sequence[str], noise: Tensor) -> Tensor:
    """Return [B,4]: the mean over positions of the x0 that is predicted from noise [B,4,h,w] at the last timestep.

    There a prediction shows hardly more than colours.
    """
    t = len(sampler.schedule) - 1
    eps = sampler.network(noise, t, sampler.text(prompts))
    return sampler.schedule.x0_and_eps(eps, noise, t)[0].mean((2, 3))


def remove_low(noise: Tensor) -> Tensor:
    """Return noise [B,4,h,w] without its frequencies up to LOW periods per side."""
    height, width = noise.shape[-2:]
    down, across = torch.fft.fftfreq(height, 1 / height)[:, None], torch.fft.fftfreq(width, 1 / width)
    high = (down**2 + across**2 > LOW**2).to(noise)
    filtered: Tensor = torch.fft.ifft2(torch.fft.fft2(noise) * high)
    return filtered.real


def sketch(
    sampler: StableDiffusionSampler, soft_masks: Tensor, seeds: Sequence[int], background_latent: Tensor
) -> Tensor:
    """Return a sketch [B,4,h,w]: a soft spot per region, of the region's colour minus `background_latent` [B,4].

    Its mean is 0, so that the image gets no tint. Its amplitude is sqrt(abar_T), the signal that training leaves at the last step.
    Image seed and region shape give random colours; the one farthest from the background is taken.
    """
    contrast = spot_contrast(sampler, soft_masks, seeds, background_latent)
    spots = (_spots(soft_masks)[:, :, None] * contrast[..., None, None]).sum(0)
    signal = math.sqrt(sampler.schedule.alpha_bar_at(len(sampler.schedule) - 1))
    return signal * (spots - spots.mean((2, 3), keepdim=True))


def spot_contrast(
    sampler: StableDiffusionSampler, soft_masks: Tensor, seeds: Sequence[int], background_latent: Tensor
) -> Tensor:
    """Return [N,B,4], each region's colour minus the background, as latents. Of some random colours the farthest is taken."""
    colours = torch.stack([_colours(soft_masks[:, row].cpu(), seed) for row, seed in enumerate(seeds)], 2)
    contrast = _latents(sampler, colours).to(soft_masks) - background_latent  # [N,CANDIDATES,B,4]
    farthest = contrast.square().sum(3).argmax(1)[:, None, :, None]
    return contrast.gather(1, farthest.expand_as(contrast[:, :1]))[:, 0]


def _spots(soft_masks: Tensor) -> Tensor:
    """Return [N,B,h,w] in 0..1: a Gaussian with each region's centre and spread, so that a box doesn't imply something square."""
    height, width = soft_masks.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.stack([y, x], -1).view(-1, 2).to(soft_masks)  # [P,2]
    weight = soft_masks.flatten(2) / soft_masks.flatten(2).sum(2, keepdim=True).clamp(min=1e-6)  # [N,B,P]
    offset = positions - (weight @ positions)[:, :, None]  # [N,B,P,2]
    covariance = torch.einsum("nbp,nbpi,nbpj->nbij", weight, offset, offset)
    covariance = covariance + torch.eye(2).to(soft_masks) / 12  # the extent of a single position
    distance = torch.einsum("nbpi,nbij,nbpj->nbp", offset, torch.linalg.inv(covariance), offset)
    return (-distance / 2).exp().view_as(soft_masks) * is_placed(soft_masks)[..., None, None]


def _colours(soft_masks: Tensor, seed: int) -> Tensor:
    """Draw random colours [N,CANDIDATES,3] in 0..1 for the regions [N,h,w] of one image."""
    seeds = [derived_seed(seed, mask_seed(mask)) for mask in soft_masks]
    return torch.stack([torch.rand(CANDIDATES, 3, generator=generator) for generator in generators(seeds)])


def _latents(sampler: StableDiffusionSampler, colours: Tensor) -> Tensor:
    """Return [..,4] for colours [..,3]: the mean latent of an image of that colour."""
    side = FLAT * sampler.pipe.vae_scale_factor
    flat = (colours.flatten(0, -2) * 2 - 1)[..., None, None].expand(-1, -1, side, side)
    return sampler.encode(flat).mean((2, 3)).view(*colours.shape[:-1], -1)
