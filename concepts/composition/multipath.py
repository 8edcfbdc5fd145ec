"""Several learned concepts in one image, from their embeddings alone.

joint      all tokens in one prompt; nothing keeps the concepts apart
regional   inside a concept's mask, cross-attention attends only to that concept's prompt
conductor  regional and multipath: a base branch and one branch per concept share one latent. Inside a concept's mask, the up blocks of the
           base branch take their outputs from that concept's branch (after Concept Conductor, arXiv 2408.03632)

All branches have the same weights, so they go through the U-Net as one batch (routing.py). The level `conductor` has three stages:

base       the scene from the base prompt. The first noise holds a sketch of the layout (first_noise.py). In the first steps only a blur is
           kept outside the regions
collage    each thing (a concept that is no style), sampled alone, is pasted into its region (collage.py)
conduct    all branches, on the remaining steps

With a reference image the stages before `conduct` are left out, and the latent follows the reference's layout (alignment.py).
Masks can be refined to the shapes that appear in them (refinement.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from concepts.composition.alignment import align_to_references
from concepts.composition.collage import MIDDLE, paste
from concepts.composition.first_noise import predicted_background, with_sketch
from concepts.composition.layout import Layout, Region, prompts_by_region, stack_soft_masks
from concepts.composition.masks import is_placed, mask_seed, outside
from concepts.composition.refinement import record_self_attention, refine_masks
from concepts.composition.routing import BranchRouting, Piece, RegionMasks, routed
from concepts.sampling import Request, StableDiffusionSampler
from diffusion.guidance import Denoise
from diffusion.noise import draw, generators
from diffusion.schedule import Schedule, add_noise
from runtime.cli import BadInput, check_fractions, check_not_negative
from runtime.seeds import derived_seed

Level = Literal["joint", "regional", "conductor"]
BLUR_GRID = 3  # a blur of the background is enlarged from this many means along each side


@dataclass(frozen=True)
class ConductorConfig:
    """Options of the level `conductor`; the defaults did best on the miniature, a small model (docs/results.md)."""

    inject: tuple[Piece, ...] = ("attention", "features", "noise")
    """What the base branch takes from a concept's branch inside its mask. attention = outputs of the up blocks' attention layers,
    features = outputs of their residual blocks, noise = the predicted noise."""
    focus: bool = True
    """Let a concept's branch attend to the base prompt outside its mask, so that the concept stays inside."""
    sketch: float = 4.0
    """Strength of the sketch of the regions in the first noise's low frequencies, as a multiple of the signal that the schedule leaves at
    its last step. 0 = no sketch."""
    background_steps: float = 0.4
    """Fraction of the steps, from the first one, in which only a blur is kept outside the regions, so that objects stay inside.
    0 = none. A detailed background needs a smaller fraction."""
    collage: float = 0.56
    """Fraction of the steps that sample only the scene. Then things, sampled alone, are pasted into their regions and the branches start.
    0, or a reference to align to = no collage, branches from the first step on."""
    align: float = 10.0
    """Step size of the gradient that brings the latent's layout to the reference's. 0 = off."""
    refine: bool = False
    """Refine the masks to the shapes that self-attention shows in them."""

    ALONE_STEPS: ClassVar[int] = 10
    """The most steps in which things are sampled alone."""
    ALIGN: ClassVar[float] = 0.3
    """Fraction of the steps, from the first one, in which the latent is aligned."""
    REFINE: ClassVar[tuple[float, float]] = (0.25, 0.4)
    """Masks are refined between these fractions of a stage's steps."""

    def check(self) -> None:
        """Raise BadInput for a strength out of range, and for an empty `inject`."""
        check_not_negative(self, "sketch", "align")
        check_fractions(self, "background_steps", "collage")
        if not self.inject:
            raise BadInput("--inject: give at least one of attention, features, noise")


@dataclass(frozen=True)
class LayoutRequest:
    """One image to compose: its layout and the seed of its noise."""

    layout: Layout
    seed: int


# ---------------------------------------------------------------- the stages


@torch.no_grad()
def compose(
    sampler: StableDiffusionSampler,
    requests: Sequence[LayoutRequest],
    level: Level,
    config: ConductorConfig = ConductorConfig(),
) -> Tensor:
    """Sample an image per request, [B,3,H,W] uint8 on the CPU.

    The layouts may differ, but all must have the same number of regions.
    """
    layouts = [request.layout for request in requests]
    if level == "joint" or not layouts[0].regions:
        prompts = [layout.joint if level == "joint" else layout.prompt for layout in layouts]
        seeds = [request.seed for request in requests]
        return sampler.sample_images([Request(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)])

    if level == "regional":
        denoise, noise = MultipathDenoiser.of(sampler, layouts), first_noise(sampler, requests)
        return sampler.decode(sampler.solve(denoise, noise, step_generators(requests)))

    sampler.text(prompts_by_region(layouts))  # one call of the text encoder for all stages
    start = collage_step(layouts, sampler.config.steps, config)
    if start:
        x, x0 = base(sampler, requests, config, start)
        x = collage(sampler, requests, config, x, x0, start)
    else:
        x = sketched_noise(sampler, requests, config, soft_masks_of(sampler, layouts))
    return sampler.decode(conduct(sampler, requests, config, x, start))


def collage_step(layouts: Sequence[Layout], steps: int, config: ConductorConfig) -> int:
    """Return the step before which the collage is made; 0 = no collage.

    There is none with a reference to align to, nor where a layout has no thing or one whose region is everywhere.
    """
    if config.align and any(layout.reference is not None for layout in layouts):
        return 0
    masks = [[region.mask for region in layout.only(things=True).regions] for layout in layouts]
    possible = all(things and is_placed(torch.stack(things)[:, None]).all() for things in masks)
    return min(round(config.collage * steps), steps - 1) if possible else 0


def base(
    sampler: StableDiffusionSampler, requests: Sequence[LayoutRequest], config: ConductorConfig, stop: int
) -> tuple[Tensor, Tensor]:
    """Sample the scenes from the base prompts up to step `stop`. Return x and the x0 predicted there, both [B,4,h,w]."""
    keep_inside = soft_masks_of(sampler, [request.layout.only(things=True) for request in requests])
    scenes = [request.layout.only(things=False) for request in requests]
    denoise = stage_denoiser(sampler, scenes, config, range(stop), keep_inside)
    noise = sketched_noise(sampler, requests, config, keep_inside)
    x = sampler.solve(denoise, noise, step_generators(requests), span=slice(stop))
    t = sampler.grid.pairs[stop][0]
    x0, _ = sampler.schedule.x0_and_eps(denoise(x, t), x, t)
    return x, x0


def collage(
    sampler: StableDiffusionSampler,
    requests: Sequence[LayoutRequest],
    config: ConductorConfig,
    x: Tensor,
    x0: Tensor,
    start: int,
) -> Tensor:
    """Sample each thing alone and paste it into its region. Return the latents [B,4,h,w] at step `start`.

    x and x0 are the scene's, from `base`. Outside the regions x is kept.
    """
    things = [request.layout.only(things=True) for request in requests]
    keep_inside = soft_masks_of(sampler, things)
    free = outside(keep_inside)
    background_latent = (x0 * free).sum((2, 3)) / free.sum((2, 3)).clamp(min=1e-3)
    alone = []
    for regions in zip(*(layout.regions for layout in things), strict=True):
        seeds = [derived_seed(r.seed, mask_seed(region.mask)) for r, region in zip(requests, regions, strict=True)]
        prompts = [Request(region.prompt, seed) for region, seed in zip(regions, seeds, strict=True)]
        alone.append(sample_alone(sampler, prompts, config, background_latent))

    scenes = sampler.decode(x0) / 127.5 - 1
    pasted = sampler.encode(
        paste(scenes, alone, torch.stack([layout.masks(*scenes.shape[2:]) for layout in things], 1))
    )
    alpha_bar = torch.tensor(sampler.schedule.alpha_bar_at(sampler.grid.pairs[start][0]))
    noised = add_noise(pasted, first_noise(sampler, requests), alpha_bar)
    return torch.where(keep_inside.amax(0)[:, None] > 0, noised, x)


def sample_alone(
    sampler: StableDiffusionSampler, requests: Sequence[Request], config: ConductorConfig, background_latent: Tensor
) -> Tensor:
    """Return an image per request, [B,3,H,W] in -1..1: its prompt's thing in the middle of the background [B,4]."""
    steps = min(config.ALONE_STEPS, sampler.config.steps)
    sampler = replace(sampler, config=replace(sampler.config, steps=steps))
    prompts, seeds = [request.prompt for request in requests], [request.seed for request in requests]
    middle = soft_masks_of(sampler, [Layout(prompt, (Region("", prompt, MIDDLE),)) for prompt in prompts])
    noise = generators(seeds)
    x = draw(noise, sampler.shape, sampler.device)
    x = with_sketch(x, sampler, middle, seeds, background_latent, config.sketch)
    scenes = [Layout(prompt, ()) for prompt in prompts]
    denoise = stage_denoiser(sampler, scenes, config, range(steps), middle, background_latent)
    return sampler.decode(sampler.solve(denoise, x, noise)) / 127.5 - 1


def conduct(
    sampler: StableDiffusionSampler, requests: Sequence[LayoutRequest], config: ConductorConfig, x: Tensor, start: int
) -> Tensor:
    """Sample with all branches from x [B,4,h,w] at step `start` to the end. Return the latents [B,4,h,w]."""
    layouts = [request.layout for request in requests]
    steps = range(start, sampler.config.steps)
    denoise = stage_denoiser(sampler, layouts, config, steps, soft_masks_of(sampler, layouts))
    align_steps = range(round(config.ALIGN * sampler.config.steps) if start == 0 else 0)
    nudge = align_to_references(sampler, layouts, config.align, align_steps)
    return sampler.solve(denoise, x, step_generators(requests, start), nudge, slice(start, None))


# ---------------------------------------------------------------- what the stages share


def first_noise(sampler: StableDiffusionSampler, requests: Sequence[LayoutRequest]) -> Tensor:
    """Draw the noise [B,4,h,w] that sampling starts from. It depends on the seeds only, so it is the same in every stage."""
    return draw(generators([request.seed for request in requests]), sampler.shape, sampler.device)


def step_generators(requests: Sequence[LayoutRequest], start: int = 0) -> list[torch.Generator]:
    """Return the generators of the noise that a stochastic solver adds from step `start` on. It is independent of the first noise."""
    return generators([derived_seed(request.seed, start) for request in requests])


def sketched_noise(
    sampler: StableDiffusionSampler, requests: Sequence[LayoutRequest], config: ConductorConfig, keep_inside: Tensor
) -> Tensor:
    """Draw the first noise [B,4,h,w] with a sketch of N regions, whose soft masks are `keep_inside` [N,B,h,w].

    It is plain if config.sketch is 0.
    """
    noise = first_noise(sampler, requests)
    if not config.sketch:
        return noise
    background_latent = predicted_background(sampler, [request.layout.prompt for request in requests], noise)
    seeds = [request.seed for request in requests]
    return with_sketch(noise, sampler, keep_inside, seeds, background_latent, config.sketch)


def soft_masks_of(sampler: StableDiffusionSampler, layouts: Sequence[Layout]) -> Tensor:
    """Return the layouts' soft masks [N,B,h,w] at the latents' resolution."""
    return stack_soft_masks(layouts, *sampler.shape[1:]).to(sampler.device)


def passes(layout: Layout, level: Level, steps: int, config: ConductorConfig) -> int:
    """Return how many batch rows the U-Net computes for one image, over all steps."""
    branches = len(layout.regions) if level == "conductor" else 0
    start = collage_step([layout], steps, config) if branches else 0
    scene_branches = len(layout.only(things=False).regions)
    alone = (branches - scene_branches) * 2 * min(config.ALONE_STEPS, steps)
    before = (start + 1) * (2 + scene_branches) + alone if start else 0
    return before + (steps - start) * (2 + branches)


# ---------------------------------------------------------------- the denoiser


def stage_denoiser(
    sampler: StableDiffusionSampler,
    layouts: Sequence[Layout],
    config: ConductorConfig,
    steps: range,
    keep_inside: Tensor,
    background_latent: Tensor | None = None,
) -> Denoise:
    """Return the denoiser of the stage that covers these steps of the sampler.

    In the first `background_steps` its eps goes through `contain`, with `keep_inside` [N,B,h,w] and background_latent [B,4].
    """
    contain_steps = range(round(config.background_steps * sampler.config.steps))
    first, last = (steps.start + round(fraction * len(steps)) for fraction in config.REFINE)
    refine_steps = range(first, last) if config.refine else range(0)
    if layouts[0].regions:
        denoise: Denoise = MultipathDenoiser.of(sampler, layouts, config, refine_steps)
    else:
        denoise = sampler.denoiser([layout.prompt for layout in layouts])

    def contained(x: Tensor, t: int) -> Tensor:
        eps = denoise(x, t)
        if sampler.step_of(t) in contain_steps:
            eps = contain(x, eps, t, sampler.schedule, keep_inside, background_latent)
        return eps

    return contained


@dataclass
class MultipathDenoiser:
    """A denoiser (x, t) -> guided eps of the base branch. Inside the masks, the concepts' prompts and branches influence it."""

    sampler: StableDiffusionSampler
    text: Tensor
    """[rows,77,width]: B base prompts, B prompts of each concept 1..N (only with branches), B negative prompts."""
    routing: BranchRouting
    """Replaced when masks are refined."""
    refine_steps: range = range(0)

    @classmethod
    def of(
        cls,
        sampler: StableDiffusionSampler,
        layouts: Sequence[Layout],
        config: ConductorConfig | None = None,
        refine_steps: range = range(0),
    ) -> MultipathDenoiser:
        """Build the denoiser of layouts that have regions. Without `config` there are no concept branches (level regional).

        In `refine_steps` the masks are refined.
        """
        texts = sampler.text(prompts_by_region(layouts)).unflatten(0, (-1, len(layouts)))
        uncond = sampler.text([sampler.config.negative]).repeat(len(layouts), 1, 1)
        masks = RegionMasks(soft_masks_of(sampler, layouts))
        if config is None:
            return cls(sampler, torch.cat([texts[0], uncond]), BranchRouting(masks, texts[1:]))
        routing = BranchRouting(masks, texts[1:], texts[0] if config.focus else None, config.inject)
        return cls(sampler, torch.cat([texts.flatten(0, 1), uncond]), routing, refine_steps)

    def __call__(self, x: Tensor, t: int) -> Tensor:
        """Return the guided eps of x [B,4,h,w] at timestep t."""
        unet, routing, guidance = self.sampler.pipe.unet, self.routing, self.sampler.config.guidance
        rows = x.repeat(len(self.text) // len(x), 1, 1, 1)
        with ExitStack() as stack:
            refines = self.sampler.step_of(t) in self.refine_steps
            attention = stack.enter_context(record_self_attention(unet)) if refines else None
            stack.enter_context(routed(unet, routing))
            out = self.sampler.network(rows, t, self.text)
        if attention:
            base_map, concept_maps, _ = routing.split(attention.probabilities())
            self.routing = replace(routing, masks=RegionMasks(refine_masks(routing.masks.soft, base_map, concept_maps)))

        cond, concepts, uncond = routing.split(out)
        if "noise" in routing.inject:
            cond = routing.blend(cond, concepts)
        return guidance.combine(cond, uncond) if guidance.active(t, len(self.sampler.schedule)) else cond


def contain(
    x: Tensor, eps: Tensor, t: int, schedule: Schedule, keep_inside: Tensor, background_latent: Tensor | None = None
) -> Tensor:
    """Return eps [B,4,h,w], changed so that the x0 it predicts outside the regions [N,B,h,w] is the background [B,4].

    Without a background it is a blur of the x0 predicted there.
    An image whose regions are empty or cover everything keeps its eps, bit for bit.
    """
    free = outside(keep_inside)
    x0, _ = schedule.x0_and_eps(eps, x, t)
    if background_latent is None:
        total, weight = (
            F.interpolate(F.adaptive_avg_pool2d(part, BLUR_GRID), x.shape[2:], mode="bilinear")
            for part in (x0 * free, free)
        )
        target = total / weight.clamp(min=1e-3)
    else:
        target = background_latent[:, :, None, None]
    alpha_bar = schedule.alpha_bar_at(t)
    return eps + math.sqrt(alpha_bar / (1 - alpha_bar)) * free * (x0 - target)
