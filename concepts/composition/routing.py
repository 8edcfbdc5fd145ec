"""What the U-Net does for each branch: which prompt attends where, and which outputs the base branch takes from the concept branches.

One call holds all branches as rows of a batch: base, concept 1..N, unconditional, B images each. Without concept branches (`regional`)
the rows are base and unconditional. Attention processors and forward hooks change what the layers return.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from concepts.composition.masks import hard_masks

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

Piece = Literal["attention", "features", "noise"]


class RegionMasks:
    """Soft masks of N concepts in B images. They can be resized to any layer's resolution, then with values 0 or 1."""

    def __init__(self, soft: Tensor):
        self.soft = soft
        """[N,B,h,w] in 0..1 at the latents' resolution: how much of each position belongs to a concept."""
        self._resized: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def like(self, layer_output: Tensor) -> Tensor:
        """Return masks, 0 or 1, that broadcast with a layer's output.

        [N,B,positions,1] for [rows,positions,channels], [N,B,1,h,w] for [rows,channels,h,w].
        """
        key = (layer_output.shape[1:], layer_output.dtype)
        if key not in self._resized:
            height, width = self.soft.shape[2:]
            if layer_output.dim() == 4:
                masks = hard_masks(self.soft, *layer_output.shape[2:])[:, :, None]
            else:
                downscale = round((height * width / layer_output.shape[1]) ** 0.5)
                masks = hard_masks(self.soft, -(-height // downscale), -(-width // downscale)).flatten(2)[..., None]
            self._resized[key] = masks.to(layer_output)
        return self._resized[key]


@dataclass(frozen=True)
class BranchRouting:
    """Routing state read by attention processors and hooks during one U-Net call."""

    masks: RegionMasks
    region_texts: Tensor
    """[N,B,77,width], the concepts' prompts. Inside a concept's mask, the base branch's cross-attention attends only to that concept's."""
    base_text: Tensor | None = None
    """[B,77,width], the base prompts, to which concept branches attend outside their masks. None = to their own prompts everywhere."""
    inject: tuple[Piece, ...] = ()
    """What the base branch takes from the concept branches inside their masks; () = there are no concept branches."""

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the rows of a batch into base [B,..], concepts [N,B,..] ([0,B,..] without concept branches) and unconditional [B,..]."""
        batch = self.region_texts.shape[1]
        return rows[:batch], rows[batch:-batch].unflatten(0, (-1, batch)), rows[-batch:]

    def blend(self, base: Tensor, concepts: Tensor) -> Tensor:
        """Return base [B,..], replaced inside each concept's mask by that concept's row of [N,B,..]. Elsewhere it stays, bit for bit."""
        masks = self.masks.like(base)
        return torch.where(masks.sum(0) > 0, (masks * concepts).sum(0), base)

    def inject_concepts(self, rows: Tensor) -> Tensor:
        """Return the rows, with the concept branches' outputs in the base branch inside the masks."""
        base, concepts, _ = self.split(rows)
        return torch.cat([self.blend(base, concepts), rows[len(base) :]])


class RoutedAttention:
    """An attention processor: the layer's original one, then the routing.

    With `injects` it also puts the concept branches' outputs into the base branch.
    """

    def __init__(self, routing: BranchRouting, injects: bool, processor: Any):
        self.routing, self.injects, self.processor = routing, injects, processor

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Return [rows,positions,channels], after the output projection."""
        out: Tensor = self.processor(attn, hidden_states, encoder_hidden_states, **options)
        if encoder_hidden_states is not None:
            out = self._route_text(attn, hidden_states, out)
        return self.routing.inject_concepts(out) if self.injects else out

    def _route_text(self, attn: Attention, hidden_states: Tensor, out: Tensor) -> Tensor:
        """Let the base branch attend to each concept's prompt inside its mask, and concept branches to the base prompt outside."""
        routing = self.routing
        base_out, concepts_out, uncond_out = routing.split(out)
        base, concepts, _ = routing.split(hidden_states)
        count = len(routing.region_texts)
        regions = self.processor(attn, base.repeat(count, 1, 1), routing.region_texts.flatten(0, 1))
        base_out = routing.blend(base_out, regions.unflatten(0, (count, -1)))
        if len(concepts) and routing.base_text is not None:
            scene = self.processor(attn, concepts.flatten(0, 1), routing.base_text.repeat(count, 1, 1))
            inside = routing.masks.like(hidden_states) > 0
            concepts_out = torch.where(inside, concepts_out, scene.unflatten(0, (count, -1)))
        return torch.cat([base_out, concepts_out.flatten(0, 1), uncond_out])


@contextmanager
def routed(unet: Any, routing: BranchRouting) -> Iterator[None]:
    """Apply the routing to the U-Net's calls within the block, by attention processors and by hooks on residual blocks of the up blocks."""
    from diffusers.models.resnet import ResnetBlock2D

    original = dict(unet.attn_processors)
    attention = "attention" in routing.inject
    processors = {
        name: RoutedAttention(routing, attention and name.startswith("up_blocks"), processor)
        for name, processor in original.items()
    }
    with ExitStack() as stack:
        stack.callback(unet.set_attn_processor, original)
        unet.set_attn_processor(processors)
        if "features" in routing.inject:
            for module in unet.up_blocks.modules():
                if isinstance(module, ResnetBlock2D):
                    hook = module.register_forward_hook(lambda _, __, out: routing.inject_concepts(out))
                    stack.callback(hook.remove)
        yield
