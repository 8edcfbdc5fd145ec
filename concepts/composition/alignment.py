"""Layout alignment: a reference picture's layout, without its content, by gradient steps on the latent.

After Concept Conductor (arXiv 2408.03632). The reference is inverted by DDIM (Song et al. 2021, eq. 12 backwards) on the sampler's own
grid, once; its latent at a step and ours go through the U-Net as far as one self-attention layer, whose keys hold where things are. The
latent moves towards equal keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from concepts.composition.layout import Layout
from concepts.sampling import StableDiffusionSampler


@dataclass(frozen=True)
class Alignment:
    """References at every timestep, and the branches' prompts."""

    painter: StableDiffusionSampler
    references: dict[int, Tensor]
    """Timestep -> [B,4,h,w]."""
    prompts: Tensor
    """[B,77,width], of the references."""
    texts: Tensor
    """[1 + N,B,77,width], of base and concepts."""
    weight: float

    @classmethod
    def of(
        cls, painter: StableDiffusionSampler, layouts: Sequence[Layout], texts: Tensor, weight: float
    ) -> Alignment | None:
        """None where the layouts name no reference; each reference is inverted once."""
        different = list({id(layout): layout for layout in layouts}.values())
        pictures = [layout.reference for layout in different]
        if not all(picture is not None for picture in pictures):
            return None
        side = painter.shape[1] * painter.pipe.vae_scale_factor, painter.shape[2] * painter.pipe.vae_scale_factor
        x = torch.stack([F.interpolate(p[None] / 127.5 - 1, side, mode="area")[0] for p in pictures if p is not None])
        prompts = painter.text([layout.reference_prompt or layout.prompt for layout in different])
        known = inverted(painter, painter.encode(x), prompts)
        place = {id(layout): row for row, layout in enumerate(different)}
        rows = torch.tensor([place[id(layout)] for layout in layouts], device=texts.device)
        return cls(painter, {t: latents[rows] for t, latents in known.items()}, prompts[rows], texts, weight)

    def aligned(self, x: Tensor, t: int) -> Tensor:
        """x [B,4,h,w] - weight * gradient of the loss: the squared difference of keys to the reference's, of the base branch and, on
        average, of the concepts' (mean over positions and channels)."""
        unet, network = self.painter.pipe.unet, self.painter.network
        branches, count = self.texts.shape[:2]
        wanted = keys(unet, lambda: network(self.references[t], t, self.prompts))
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            found = keys(unet, lambda: network(x.repeat(branches, 1, 1, 1), t, self.texts.flatten(0, 1)))
            loss = (found.unflatten(0, (branches, count)) - wanted).square().mean((2, 3)).sum(1)
            (gradient,) = torch.autograd.grad(loss[0] + (loss[1:].mean() if branches > 1 else 0), x)
        return x.detach() - self.weight * gradient


class _Enough(Exception):
    """Ends a call of the U-Net."""


def keys(unet: Any, call: Callable[[], object]) -> Tensor:
    """[rows,positions,channels] float32 of the first self-attention in the second up block, or in the first where that has none, during
    `call`, which goes no further."""
    block = next(x for x in (*unet.up_blocks[1:2], unet.up_blocks[0]) if getattr(x, "attentions", None))
    found: list[Tensor] = []

    def stop(_: object, __: object, out: Tensor) -> None:
        found.append(out)
        raise _Enough

    hook = block.attentions[0].transformer_blocks[0].attn1.to_k.register_forward_hook(stop)
    try:
        with suppress(_Enough):
            call()
    finally:
        hook.remove()
    return found[0].float()


def inverted(painter: StableDiffusionSampler, x: Tensor, prompts: Tensor) -> dict[int, Tensor]:
    """{t: latent} for every timestep of the sampler's grid, from clean latents x [B,4,h,w] and their prompts [B,77,width], without
    guidance."""
    schedule, alpha = painter.schedule, 1.0
    grid, known = [t for t, _ in reversed(painter.grid.pairs)], {}
    for t, before in zip(grid, [grid[0], *grid], strict=False):
        eps = painter.network(x, before, prompts)
        x0 = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
        alpha = schedule.alpha_bar_at(t)
        x = known[t] = math.sqrt(alpha) * x0 + math.sqrt(1 - alpha) * eps
    return known
