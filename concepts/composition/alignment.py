"""Layout alignment: a reference image's layout, without its content, by gradient steps on the latent.

After Concept Conductor (arXiv 2408.03632). DDIM inversion gives the reference's latent at every step. At a step, this latent and the one
that is being sampled go through the U-Net up to one self-attention layer, whose keys depend on where things are. The sampled latent moves
so that its keys come closer to the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from concepts.composition.layout import Layout, prompts_by_region
from concepts.sampling import StableDiffusionSampler
from diffusion.samplers import Nudge, ddim_invert, unchanged


def align_to_references(
    sampler: StableDiffusionSampler, layouts: Sequence[Layout], weight: float, align_steps: range
) -> Nudge:
    """Return a nudge (see `StableDiffusionSampler.solve`) that moves the latents [B,4,h,w] against the gradient of `key_distance`.

    It acts in `align_steps` of the sampler, with step size `weight`. If any of the layouts has no reference, it does nothing.
    """
    distinct = list({id(layout): layout for layout in layouts}.values())
    images = [layout.reference for layout in distinct if layout.reference is not None]
    if not weight or not align_steps or len(images) < len(distinct):
        return unchanged

    size = [side * sampler.pipe.vae_scale_factor for side in sampler.shape[1:]]
    x0 = torch.stack([F.interpolate(image[None] / 127.5 - 1, size, mode="area")[0] for image in images])
    prompts = sampler.text([layout.reference_prompt or layout.prompt for layout in distinct])
    inverted = invert_references(sampler, sampler.encode(x0), prompts)

    index = {id(layout): row for row, layout in enumerate(distinct)}
    rows = torch.tensor([index[id(layout)] for layout in layouts], device=prompts.device)
    texts = sampler.text(prompts_by_region(layouts)).unflatten(0, (-1, len(layouts)))
    # `key_distance` is a mean, so that its gradients are about 1e-6: in fp16 they would round to zero
    scale = 4096.0 if sampler.pipe.unet.dtype == torch.float16 else 1.0

    def nudge(x: Tensor, t: int) -> Tensor:
        step = sampler.step_of(t)
        if step not in align_steps:
            return x
        expected = attention_keys(sampler, inverted[step][rows], t, prompts[rows])
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            keys = attention_keys(sampler, x.repeat(len(texts), 1, 1, 1), t, texts.flatten(0, 1))
            (gradient,) = torch.autograd.grad(key_distance(keys, expected) * scale, x)
        return x.detach() - weight * gradient / scale

    return nudge


def key_distance(keys: Tensor, expected: Tensor) -> Tensor:
    """Return the distance, a scalar, of keys [(1 + N) B,P,C] of base and N concept branches to the reference's [B,P,C].

    A branch's distance is the squared difference, averaged over positions and channels, summed over images.
    The result is the base branch's distance plus the mean of the concept branches'.
    """
    branches: Tensor = keys.unflatten(0, (-1, len(expected)))
    distances: Tensor = (branches - expected).square().mean((2, 3)).sum(1)
    return distances[0] + (distances[1:].mean() if len(distances) > 1 else 0)


class _KeysReached(Exception):
    """Ends a call of the U-Net."""


def attention_keys(sampler: StableDiffusionSampler, x: Tensor, t: int, text: Tensor) -> Tensor:
    """Return a self-attention layer's keys [rows,positions,channels] float32 for x [rows,4,h,w] at t and text [rows,77,width].

    The layer is the first one in the second up block, or in the first up block if the second has none.
    """
    blocks = sampler.pipe.unet.up_blocks
    block: Any = next(block for block in (*blocks[1:2], blocks[0]) if getattr(block, "attentions", None))
    outputs: list[Tensor] = []

    def stop(_: object, __: object, out: Tensor) -> None:
        # diffusers can't run a part of its U-Net: an exception saves the upper half of its up blocks, in every step and with gradients
        outputs.append(out)
        raise _KeysReached

    hook = block.attentions[0].transformer_blocks[0].attn1.to_k.register_forward_hook(stop)
    try:
        with suppress(_KeysReached):
            sampler.network(x, t, text)
    finally:
        hook.remove()
    return outputs[0].float()


def invert_references(sampler: StableDiffusionSampler, x0: Tensor, prompts: Tensor) -> list[Tensor]:
    """Invert clean latents x0 [B,4,h,w] by DDIM without guidance. Return their latents at every step of the sampler, noisiest first.

    eps is predicted at the timestep that x has, not at the one that it moves to. For clean x0, which has none, the latter is taken.
    """
    times = [t for t, _ in sampler.grid.pairs]
    current = dict(zip(times, [*times[1:], times[-1]], strict=True))

    def denoise(x: Tensor, t: int) -> Tensor:
        return sampler.network(x, current[t], prompts)

    states = ddim_invert(denoise, x0, sampler.schedule, sampler.grid)
    return [states[t] for t in times]
