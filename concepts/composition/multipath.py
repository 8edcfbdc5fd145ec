"""Several learned concepts in one picture, from their vectors alone.

joint      all tokens in one prompt: nothing keeps the concepts apart
regional   cross-attention hears, inside a concept's mask, that concept's prompt only
conductor  regional, and multipath: branches share one latent, the base branch and one per concept; inside a concept's mask what the up
           blocks of the base branch compute is taken from the concept's branch (after Concept Conductor, arXiv 2408.03632)

All branches have the same weights, so they go through the U-Net as one batch: base, concepts, unconditional. The latter needs no branches
of its own: without words all branches are the same. The first noise holds a sketch of the layout (first_noise.py), and in the first steps
nothing forms outside the regions. The branches start from a collage half way (collage.py). With a reference picture the latent follows
that one's layout (alignment.py); masks can be fitted to what appears in them (refinement.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from concepts.composition.alignment import Alignment
from concepts.composition.collage import MIDDLE, pasted
from concepts.composition.first_noise import placed, with_sketch
from concepts.composition.layout import Layout, Region, inside, key_of
from concepts.composition.refinement import fitted, watched
from concepts.sampling import Request, StableDiffusionSampler
from diffusion.noise import draw, generators
from diffusion.schedule import Schedule, add_noise
from runtime.cli import BadInput, check_fractions, check_not_negative
from runtime.seeds import derived_seed

Level = Literal["joint", "regional", "conductor"]
Piece = Literal["attention", "features", "noise"]
COARSE = 3  # means along each side that are left of what is outside the regions


@dataclass(frozen=True)
class ConductorConfig:
    """What the level `conductor` does; the defaults are what did best on the miniature (README)."""

    inject: tuple[Piece, ...] = ("attention", "features", "noise")
    """What is taken from a concept's branch inside its mask: outputs of the attention layers of all up blocks, outputs of their residual
    blocks (at full latent resolution too), the predicted noise."""
    focus: bool = True
    """Outside its mask a concept's branch hears the base prompt, so that it puts the concept where it belongs."""
    sketch: float = 4.0
    """Strength of the sketch of the regions that takes the place of the first noise's low frequencies, in multiples of the signal that
    the schedule leaves at its last step; 0: no sketch."""
    background_steps: float = 0.4
    """Share of the steps, from the first one, in which no more than a blur of what is predicted outside the regions is kept, so that
    objects stay within them; 0: none. A busy background wants less."""
    collage: float = 0.56
    """Share of the steps after which things that were drawn alone are pasted into their regions, and the branches start; 0, or with a
    reference to align to: no collage, branches from the first step on."""
    align: float = 10.0
    """Step along the gradient that brings the latent's layout to the reference's, where the layout names one; 0: not at all."""
    refine: bool = False
    """Masks follow what the self-attention sees in them."""

    ALONE: ClassVar[int] = 10
    """Steps in which things are drawn alone, at most."""
    GUIDED: ClassVar[float] = 0.3
    """Share of the steps, from the first one, in which the latent is aligned."""
    FITTED: ClassVar[tuple[float, float]] = (0.25, 0.4)
    """Shares of the branches' steps between which masks are refined."""

    def check(self) -> None:
        """Raises BadInput for strengths that make no sense, and where nothing is injected."""
        check_not_negative(self, "sketch", "align")
        check_fractions(self, "background_steps", "collage")
        if not self.inject:
            raise BadInput("--inject: give at least one of attention, features, noise")


@dataclass(frozen=True)
class LayoutRequest:
    """One picture to draw: where what is, and the seed of its noise."""

    layout: Layout
    seed: int


@dataclass
class BranchRouting:
    """What processors and hooks go by during one call of the U-Net on rows [base B, concept 1 B, .., concept N B, unconditional B];
    without branches on [base B, unconditional B]."""

    shares: Tensor
    """[N,B,h,w] at the latents' resolution: how much of each position belongs to a concept, 0..1."""
    branches: bool
    """Whether the concepts have rows of their own."""
    inject: tuple[Piece, ...] = ()
    base: Tensor | None = None
    """[B,77,width], the base prompts, where branches hear them outside their masks."""
    regional: Tensor | None = None
    """[N,B,77,width], the concepts' prompts, where the base branch's cross-attention goes by regions."""
    _masks: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """B, pictures."""
        return self.shares.shape[1]

    def masks(self, like: Tensor) -> Tensor:
        """[N,B,positions,1] for attention states [rows,positions,channels], [N,B,1,h,w] for maps [rows,channels,h,w]; 0 or 1."""
        key = (tuple(like.shape[1:]), like.device, like.dtype)
        if key not in self._masks:
            height, width = self.shares.shape[2:]
            if like.dim() == 4:
                self._masks[key] = inside(self.shares, *like.shape[2:])[:, :, None].to(like)
            else:
                shrunk = round((height * width / like.shape[1]) ** 0.5)
                found = inside(self.shares, -(-height // shrunk), -(-width // shrunk))
                self._masks[key] = found.flatten(2)[..., None].to(like)
        return self._masks[key]

    def blended(self, base: Tensor, others: Tensor) -> Tensor:
        """base [B,..], but others [N,B,..] inside the masks; where no mask is, base as it is, bit for bit."""
        masks = self.masks(base)
        return torch.where(masks.sum(0) > 0, (masks * others).sum(0), base)

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Base [B,..], concepts [N,B,..] (N is 0 without branches), unconditional [B,..]."""
        concepts = rows[self.count : -self.count]
        return rows[: self.count], concepts.unflatten(0, (-1, self.count)), rows[-self.count :]

    def injected(self, rows: Tensor) -> Tensor:
        """rows, those of the base branch with the concepts' inside the masks."""
        base, concepts, _ = self.parts(rows)
        return torch.cat([self.blended(base, concepts), rows[self.count :]])


class RoutedAttention:
    """A layer's own attention, then what the composition asks for; `up`: the layer is in an up block."""

    def __init__(self, composition: BranchRouting, up: bool, plain: Any):
        self.composition, self.up, self.plain = composition, up, plain

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **more: Any,
    ) -> Tensor:
        """[rows,positions,channels], after the output projection."""
        now = self.composition
        out = self.plain(attn, hidden_states, encoder_hidden_states, *args, **more)
        if encoder_hidden_states is not None:
            out = self._by_region(attn, hidden_states, out)
        return now.injected(out) if self.up and now.branches and "attention" in now.inject else out

    def _by_region(self, attn: Attention, hidden: Tensor, out: Tensor) -> Tensor:
        """The base branch hears each concept's prompt inside its mask; each concept's branch hears the base prompt outside of it."""
        now = self.composition
        heard, concepts, nothing = now.parts(out)
        own, others, _ = now.parts(hidden)
        if now.regional is not None:
            count = len(now.regional)
            regions = self.plain(attn, own.repeat(count, 1, 1), now.regional.flatten(0, 1))
            heard = now.blended(heard, regions.unflatten(0, (count, -1)))
        if now.branches and now.base is not None:
            plain = self.plain(attn, others.flatten(0, 1), now.base.repeat(len(others), 1, 1))
            concepts = torch.where(now.masks(hidden) > 0, concepts, plain.unflatten(0, (len(others), -1)))
        return torch.cat([heard, concepts.flatten(0, 1), nothing])


@contextmanager
def routed(unet: Any, composition: BranchRouting) -> Iterator[None]:
    """The U-Net with these processors, and hooks on the residual blocks of its up blocks; as it was afterwards."""
    before = dict(unet.attn_processors)
    made = {name: RoutedAttention(composition, name.startswith("up_blocks"), own) for name, own in before.items()}
    with ExitStack() as stack:
        stack.callback(unet.set_attn_processor, before)
        unet.set_attn_processor(dict(made))
        if composition.branches and "features" in composition.inject:
            for module in unet.up_blocks.modules():
                if isinstance(module, ResnetBlock2D):
                    hook = module.register_forward_hook(lambda _, __, out: composition.injected(out))
                    stack.callback(hook.remove)
        yield


# ---------------------------------------------------------------- drawing


@torch.no_grad()
def compose(
    painter: StableDiffusionSampler,
    orders: Sequence[LayoutRequest],
    level: Level,
    means: ConductorConfig = ConductorConfig(),
) -> Tensor:
    """[B,3,H,W] uint8; the layouts may differ, but all have as many regions."""
    layouts, seeds = [order.layout for order in orders], [order.seed for order in orders]
    if level == "joint" or not layouts[0].regions:
        prompts = [layout.joint if level == "joint" else layout.prompt for layout in layouts]
        return painter.sample_images([Request(text, seed) for text, seed in zip(prompts, seeds, strict=True)])
    x, steps = draw(generators(seeds), painter.shape, painter.pipe.unet.device), painter.manner.steps
    start = collage_step(layouts, steps, means) if level == "conductor" else 0
    together = MultipathDenoiser(painter, layouts, level, means, range(start, steps))
    x = collage(painter, layouts, seeds, means, x, start) if start else together.sketched(x, seeds)
    return painter.decode(together.solve(x))


def collage_step(layouts: Sequence[Layout], steps: int, means: ConductorConfig) -> int:
    """The step before which the collage is made; 0 where there is none, as with a region that is all of the picture, or with a reference,
    which says itself how things lie."""
    if means.align and any(layout.reference is not None for layout in layouts):
        return 0
    masks = [[region.mask for region in layout.only(True).regions] for layout in layouts]
    pastes = all(own and placed(torch.stack(own)[:, None]).all() for own in masks)
    return min(round(means.collage * steps), steps - 1) if pastes else 0


def collage(
    painter: StableDiffusionSampler,
    layouts: Sequence[Layout],
    seeds: Sequence[int],
    means: ConductorConfig,
    noise: Tensor,
    start: int,
) -> Tensor:
    """[B,4,h,w] at step `start`: around the things as the base prompts want it, in their regions what was drawn of them alone."""
    things, rest = ([layout.only(thing) for layout in layouts] for thing in (True, False))
    around = MultipathDenoiser(painter, rest, "conductor", means, range(start), soft_masks_of(painter, things))
    x, t = around.solve(around.sketched(noise, seeds)), painter.grid.pairs[start][0]
    clean, _ = painter.schedule.x0_and_eps(around.denoise(x, t), x, t)
    backdrops, free = painter.decode(clean) / 127.5 - 1, outside(around.held)
    ground = (clean * free).sum((2, 3)) / free.sum((2, 3)).clamp(min=1e-3)
    alone = [
        drawn_alone(
            painter,
            [layout.regions[number].prompt for layout in things],
            [derived_seed(s, key_of(layout.regions[number].mask)) for s, layout in zip(seeds, things, strict=True)],
            means,
            ground,
        )
        for number in range(len(things[0].regions))
    ]
    masks = torch.stack([layout.masks(*backdrops.shape[2:]) for layout in things], 1)
    made = painter.encode(pasted(backdrops, alone, masks))
    noised = add_noise(made, noise, torch.tensor(painter.schedule.alpha_bar_at(t)))
    return torch.where(around.held.amax(0)[:, None] > 0, noised, x)


def drawn_alone(
    painter: StableDiffusionSampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    means: ConductorConfig,
    ground: Tensor,
) -> Tensor:
    """[B,3,H,W] in -1..1: each prompt's thing in the middle, in a few steps, on the ground [B,4] that it will lie on, so that it stands out
    from that."""
    steps = min(means.ALONE, painter.manner.steps)
    quick = replace(painter, manner=replace(painter.manner, steps=steps))
    middle = soft_masks_of(painter, [Layout(prompt, (Region("", prompt, MIDDLE),)) for prompt in prompts])
    alone = MultipathDenoiser(
        quick, [Layout(prompt, ()) for prompt in prompts], "conductor", means, range(steps), middle, ground
    )
    x = alone.sketched(draw(generators(seeds), painter.shape, painter.pipe.unet.device), seeds)
    return painter.decode(alone.solve(x)) / 127.5 - 1


def soft_masks_of(painter: StableDiffusionSampler, layouts: Sequence[Layout]) -> Tensor:
    """[N,B,h,w], how much of each latent belongs to each region."""
    shares = torch.stack([layout.shares(*painter.shape[1:]) for layout in layouts], 1)
    return shares.to(painter.pipe.unet.device)


def passes(layout: Layout, level: Level, steps: int, means: ConductorConfig) -> int:
    """Rows that a picture takes of the U-Net, all steps together."""
    branches = len(layout.regions) if level == "conductor" else 0
    start, rest = collage_step([layout], steps, means) if branches else 0, len(layout.only(False).regions)
    before = (start + 1) * (2 + rest) + (branches - rest) * 2 * min(means.ALONE, steps) if start else 0
    return before + (steps - start) * (2 + branches)


class MultipathDenoiser:
    """The branches of a batch of pictures on their way from noise to latents, or on these steps of it. `held` [N,B,h,w]: outside of these
    regions nothing forms; none given: the layouts' own. `ground` [B,4]: what is to be there; none given: a blur of what would be."""

    def __init__(
        self,
        painter: StableDiffusionSampler,
        layouts: Sequence[Layout],
        level: Level,
        means: ConductorConfig,
        steps: range,
        held: Tensor | None = None,
        ground: Tensor | None = None,
    ):
        self.painter, self.means, count = painter, means, len(layouts)
        prompts = [prompt for same in zip(*(layout.prompts for layout in layouts), strict=True) for prompt in same]
        texts, shares = painter.text(prompts).unflatten(0, (-1, count)), soft_masks_of(painter, layouts)
        self.conducts, regions = level == "conductor", bool(layouts[0].regions)
        branches = self.conducts and regions
        base = texts[0] if branches and means.focus else None
        self.now = BranchRouting(
            shares, branches, means.inject if branches else (), base, texts[1:] if regions else None
        )
        self.held, self.ground = shares if held is None else held, ground
        rows = texts if branches else texts[:1]
        self.text = torch.cat([rows.flatten(0, 1), painter.text([painter.manner.negative]).repeat(count, 1, 1)])
        self.steps, self.step, total = steps, steps.start, painter.manner.steps
        self.guided = range(round(means.GUIDED * total) if self.conducts and means.align else 0)
        first, last = (steps.start + round(share * len(steps)) for share in means.FITTED)
        self.fitted = range(first, last) if branches and means.refine else range(0)
        self.contained = range(round(means.background_steps * total) if self.conducts else 0)
        self.alignment = Alignment.of(painter, layouts, texts, means.align) if steps.start in self.guided else None

    def solve(self, x: Tensor) -> Tensor:
        """[B,4,h,w] through all steps."""
        span = slice(self.steps.start, self.steps.stop)
        return self.painter.solve(self.denoise, x, nudge=self.nudge, span=span)

    def sketched(self, noise: Tensor, seeds: Sequence[int]) -> Tensor:
        """The noise [B,4,h,w] with a sketch of the regions, where there is to be one."""
        if not self.conducts or not self.means.sketch:
            return noise
        ground = self.promised(noise) if self.ground is None else self.ground
        return with_sketch(noise, self.painter, self.held, seeds, ground, self.means.sketch)

    def promised(self, noise: Tensor) -> Tensor:
        """[B,4]: the mean of the latents that the base prompts promise at the first step, in which hardly more than colours show."""
        schedule = self.painter.schedule
        first = len(schedule) - 1
        eps = self.painter.network(noise, first, self.text[: self.now.count])
        return schedule.x0_and_eps(eps, noise, first)[0].mean((2, 3))

    def nudge(self, x: Tensor, t: int) -> Tensor:
        """The latents [B,4,h,w] a step nearer to the reference's layout, in the first steps."""
        if self.alignment and self.step in self.guided:
            return self.alignment.aligned(x, t)
        return x

    def denoise(self, x: Tensor, t: int) -> Tensor:
        """The guided noise of the base branch, contained in the first steps; masks are refined on the way."""
        now, unet = self.now, self.painter.pipe.unet
        rows = x.repeat(len(self.text) // len(x), 1, 1, 1)
        with ExitStack() as stack:
            seen = stack.enter_context(watched(unet)) if self.step in self.fitted else None
            stack.enter_context(routed(unet, now))
            out = self.painter.network(rows, t, self.text)
        if seen:
            base, concepts, _ = now.parts(seen.probabilities())
            self.now = replace(now, shares=fitted(now.shares, base, concepts), _masks={})
        base, concepts, plain = now.parts(out)
        if "noise" in now.inject:
            base = now.blended(base, concepts)
        eps = plain + self.painter.manner.guidance.scale * (base - plain)
        if self.step in self.contained:
            eps = keep_inside_regions(x, eps, t, self.painter.schedule, self.held, self.ground)
        self.step += 1
        return eps


def keep_inside_regions(
    x: Tensor, eps: Tensor, t: int, schedule: Schedule, shares: Tensor, ground: Tensor | None = None
) -> Tensor:
    """eps [B,4,h,w] at step t, changed so that outside the regions, shares [N,B,h,w], it predicts the ground [B,4]; none given: a blur of
    what it did, means of a coarse grid, of the outside alone. A picture whose regions are empty or cover all of it keeps its eps, bit for
    bit."""
    free = outside(shares)
    clean, _ = schedule.x0_and_eps(eps, x, t)
    if ground is None:
        total, weight = (
            F.interpolate(F.adaptive_avg_pool2d(part, COARSE), x.shape[2:], mode="bilinear")
            for part in (clean * free, free)
        )
        target = total / weight.clamp(min=1e-3)
    else:
        target = ground[:, :, None, None]
    alpha = schedule.alpha_bar_at(t)
    return eps + math.sqrt(alpha / (1 - alpha)) * free * (clean - target)


def outside(shares: Tensor) -> Tensor:
    """[N,B,h,w] -> [B,1,h,w], how much of each position belongs to no region; nothing does where regions are empty or cover all."""
    return ((1 - shares.sum(0)).clamp(0, 1) * placed(shares).any(0)[:, None, None])[:, None]
