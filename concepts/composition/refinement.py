"""Masks from self-attention: positions that attend alike belong together, so clusters of them show where a concept has appeared.

After Concept Conductor (arXiv 2408.03632): the attention maps of the base branch and of the concept's branch are clustered, for several
numbers of clusters. The new mask is the union of two clusters: in each map, the one most like the old mask. A position that two concepts
claim stays as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from concepts.composition.masks import bounds, hard_masks

MIN_OVERLAP = 0.3  # intersection over union with the old mask, below which its bounding box is taken instead
RESTARTS, ROUNDS = 10, 20  # of k-means


@dataclass
class RecordedAttention:
    """Queries and keys of a self-attention layer in one U-Net call."""

    heads: int
    states: dict[str, Tensor] = field(default_factory=dict)

    def probabilities(self) -> Tensor:
        """Return [rows,positions,positions] float32: how much each position attends to each other, averaged over heads."""
        query, key = (self.states[name].float().unflatten(2, (self.heads, -1)).transpose(1, 2) for name in ("q", "k"))
        scale = query.shape[-1] ** -0.5
        rows = [(q @ k.mT * scale).softmax(-1).mean(0) for q, k in zip(query, key, strict=True)]  # one by one: memory
        return torch.stack(rows)


@contextmanager
def record_self_attention(unet: Any) -> Iterator[RecordedAttention]:
    """While the context is open, record queries and keys of one self-attention layer. Those of the last U-Net call remain.

    It is the last self-attention at half the latents' resolution (32x32 for images of 512 pixels).
    """
    layer = unet.up_blocks[-2].attentions[-1].transformer_blocks[-1].attn1
    attention = RecordedAttention(layer.heads)
    hooks = [
        part.register_forward_hook(lambda _, __, out, name=name: attention.states.__setitem__(name, out))
        for name, part in (("q", layer.to_q), ("k", layer.to_k))
    ]
    try:
        yield attention
    finally:
        for hook in hooks:
            hook.remove()


def refine_masks(soft_masks: Tensor, base: Tensor, concepts: Tensor) -> Tensor:
    """Return new masks [N,B,h,w], 0 or 1, that never overlap, from the old ones `soft_masks` [N,B,h,w].

    They follow the branches' self-attention maps: base [B,P,P], concepts [N,B,P,P].
    """
    height, width = soft_masks.shape[2:]
    downscale = round((height * width / base.shape[1]) ** 0.5)
    size = (-(-height // downscale), -(-width // downscale))
    old = hard_masks(soft_masks, *size).flatten(2) > 0
    claims = torch.stack([_claims(old[:, b], base[b], concepts[:, b], size) for b in range(len(base))], 1)
    new = torch.where(claims.sum(0) > 1, old, claims)
    new = torch.where(new.any(2, keepdim=True), new, old & ~new.any(0))  # none may vanish
    return F.interpolate(new.unflatten(2, size).float(), size=(height, width), mode="nearest")


def _claims(old: Tensor, base: Tensor, concepts: Tensor, size: tuple[int, int]) -> Tensor:
    """Return [N,P] bool for one image: where each concept appears in the base branch's map or in its branch's map."""
    counts = range(len(old) + 1, 2 * len(old) + 2)
    in_base = _clusters(base, counts)
    own = [_clusters(attention, counts) for attention in concepts]
    return torch.stack([_best(in_base, m, size) | _best(c, m, size) for m, c in zip(old, own, strict=True)])


def _best(clusters: Tensor, mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return [P] bool: the cluster that overlaps most with the mask, or the mask's bounding box if none overlaps enough."""
    overlap = (clusters & mask).sum(1) / (clusters | mask).sum(1).clamp(min=1)
    best = int(overlap.argmax())
    return clusters[best] if overlap[best] >= MIN_OVERLAP else bounding_box(mask.unflatten(0, size)).flatten()


def bounding_box(mask: Tensor) -> Tensor:
    """Return the bounding box [H,W] bool of a mask [H,W] bool; all False for an empty one."""
    box = torch.zeros_like(mask)
    if mask.any():
        box[bounds(mask)] = True
    return box


def _clusters(rows: Tensor, counts: range) -> Tensor:
    """Return [sum of counts, P] bool: the clusters of the rows [P,D] for every number of clusters in `counts`."""
    return torch.cat([F.one_hot(kmeans(rows, count), count).T.bool() for count in counts])


def kmeans(rows: Tensor, count: int) -> Tensor:
    """Return each row's cluster [P] int64, for rows [P,D] (Lloyd 1982): the best of RESTARTS random starts, the same in every run."""
    generator = torch.Generator().manual_seed(count)
    starts = torch.stack([torch.randperm(len(rows), generator=generator)[:count] for _ in range(RESTARTS)])
    centres = rows[starts.to(rows.device)]
    for _ in range(ROUNDS):
        labels = torch.cdist(rows.expand(RESTARTS, -1, -1), centres).argmin(2)
        member = F.one_hot(labels, count).to(rows)
        sizes = member.sum(1)[..., None]
        centres = torch.where(sizes > 0, member.mT @ rows / sizes.clamp(min=1), centres)
    nearest, labels = torch.cdist(rows.expand(RESTARTS, -1, -1), centres).min(2)
    return labels[int(nearest.square().sum(1).argmin())]
