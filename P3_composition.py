"""Several learned concepts in one picture, from their vectors alone.

joint      all tokens in one prompt: nothing keeps the concepts apart
regional   cross-attention hears, inside a concept's mask, that concept's prompt only
conductor  regional, and multipath: branches share one latent, the base branch and one per concept; inside a concept's mask the attention
           outputs of the base branch's up blocks are those of the concept's branch (after Concept Conductor, arXiv 2408.03632)

All branches have the same weights, so they go through the U-Net as one batch: base, concepts, unconditional. The latter needs no branches
of its own: without words all branches are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from diffusion.noise import draw, generators
from P3_drawing import Painter
from P3_layout import Layout

Level = Literal["joint", "regional", "conductor"]


@dataclass
class Composition:
    """What the attention processors go by during one call of the U-Net on rows [base B, concept 1 B, .., concept N B, unconditional B];
    without branches on [base B, unconditional B]."""

    layout: Layout
    count: int
    """B, pictures."""
    shape: tuple[int, int]
    """Height and width of the latents."""
    branches: bool
    """Whether the concepts have rows of their own."""
    regional: Tensor | None = None
    """[N,77,width], the concepts' texts, where cross-attention goes by regions."""
    _masks: dict[tuple[int, torch.device, torch.dtype], Tensor] = field(default_factory=dict)

    def masks(self, like: Tensor) -> Tensor:
        """[N,1,positions,1] for attention states [rows,positions,channels]."""
        key = (like.shape[1], like.device, like.dtype)
        if key not in self._masks:
            height, width = self.shape
            shrunk = round((height * width / like.shape[1]) ** 0.5)
            found = self.layout.masks(-(-height // shrunk), -(-width // shrunk))
            self._masks[key] = found.flatten(1)[:, None, :, None].to(like)
        return self._masks[key]

    def blended(self, base: Tensor, others: Tensor) -> Tensor:
        """base [B,P,C], but others [N,B,P,C] inside the masks; where no mask is, base as it is, bit for bit."""
        masks = self.masks(base)
        inside = masks.sum(0) > 0
        return torch.where(inside, (masks * others).sum(0), base)


class ComposedAttention:
    """diffusers' attention, then what the composition asks for; `injects`: this layer is in an up block."""

    def __init__(self, composition: Composition, injects: bool):
        self.composition, self.injects, self.plain = composition, injects, AttnProcessor2_0()

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
        base = out[: now.count]
        if encoder_hidden_states is not None and now.regional is not None:
            base = now.blended(base, self._by_region(attn, hidden_states[: now.count], now.regional))
        if self.injects and now.branches:
            base = now.blended(base, out[now.count : -now.count].unflatten(0, (-1, now.count)))
        return torch.cat([base, out[now.count :]])

    def _by_region(self, attn: Attention, hidden: Tensor, texts: Tensor) -> Tensor:
        """[N,B,P,C]: what the base branch would hear of each concept's text alone."""
        concepts, count = len(texts), len(hidden)
        heard = self.plain(attn, hidden.repeat(concepts, 1, 1), texts.repeat_interleave(count, 0))
        return heard.unflatten(0, (concepts, count))


@contextmanager
def composed(unet: Any, composition: Composition) -> Iterator[None]:
    """The U-Net with these processors; its own are back afterwards."""
    before = dict(unet.attn_processors)
    made = {name: ComposedAttention(composition, name.startswith("up_blocks")) for name in before}
    unet.set_attn_processor(dict(made))
    try:
        yield
    finally:
        unet.set_attn_processor(before)


# ---------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Composed:
    """One picture to draw: where what is, and the seed of its noise."""

    layout: Layout
    seed: int


@torch.inference_mode()
def compose(painter: Painter, layout: Layout, seeds: Sequence[int], level: Level) -> Tensor:
    """[N,3,H,W] uint8: pictures of one layout."""
    unet = painter.pipe.unet
    x = draw(generators(seeds), painter.shape, unet.device)
    base = layout.joint if level == "joint" else layout.prompt
    texts = painter.text([base, *layout.prompts[1:], painter.manner.negative])
    branches, regional = level == "conductor", level in ("regional", "conductor")
    composition = Composition(layout, len(seeds), painter.shape[1:], branches, texts[1:-1] if regional else None)
    rows = texts if branches else texts[[0, -1]]
    text = rows.repeat_interleave(len(seeds), 0)

    def denoise(x: Tensor, t: int) -> Tensor:
        out = painter.network(x.repeat(len(rows), 1, 1, 1), t, text)
        base, nothing = out[: len(x)], out[-len(x) :]
        return nothing + painter.manner.guidance.scale * (base - nothing)

    with composed(unet, composition):
        return painter.decode(painter.solve(denoise, x))
