"""Masks from self-attention: positions that attend alike belong together, so clusters of them show where a concept has appeared.

After Concept Conductor (arXiv 2408.03632): maps of the base branch and of the concept's branch are clustered into several numbers of
parts; of each, the cluster most like the old mask is taken, both are united, and what two concepts claim stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from concepts.composition.layout import inside

LEAST = 0.3  # overlap (intersection over union) with the old mask below which its bounding box is taken instead
RESTARTS, ROUNDS = 10, 20  # of k-means


@dataclass
class Watched:
    """What a self-attention layer computed in a call of the U-Net."""

    heads: int
    states: dict[str, Tensor] = field(default_factory=dict)

    def probabilities(self) -> Tensor:
        """[rows,positions,positions] float32, how much each position attends to each other, the mean over heads; in steps, for memory."""
        query, key = (self.states[name].float().unflatten(2, (self.heads, -1)).transpose(1, 2) for name in ("q", "k"))
        scale = query.shape[-1] ** -0.5
        rows = [(q @ k.mT * scale).softmax(-1).mean(0) for q, k in zip(query, key, strict=True)]
        return torch.stack(rows)


@contextmanager
def watched(unet: Any) -> Iterator[Watched]:
    """Looks at the last self-attention at half the latents' resolution (32x32 for pictures of 512 pixels)."""
    layer = unet.up_blocks[-2].attentions[-1].transformer_blocks[-1].attn1
    seen = Watched(layer.heads)
    hooks = [
        part.register_forward_hook(lambda _, __, out, name=name: seen.states.__setitem__(name, out))
        for name, part in (("q", layer.to_q), ("k", layer.to_k))
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def fitted(shares: Tensor, base: Tensor, concepts: Tensor) -> Tensor:
    """Refined shares [N,B,h,w], 0 or 1, which never overlap: from the old ones and attention maps base [B,P,P], concepts [N,B,P,P]."""
    height, width = shares.shape[2:]
    shrunk = round((height * width / base.shape[1]) ** 0.5)
    size = (-(-height // shrunk), -(-width // shrunk))
    old = inside(shares, *size).flatten(2) > 0
    claimed = torch.stack([_claimed(old[:, b], base[b], concepts[:, b], size) for b in range(len(base))], 1)
    contested = claimed.sum(0) > 1
    new = torch.where(contested, old, claimed)
    new = torch.where(new.any(2, keepdim=True), new, old & ~new.any(0))  # none may vanish
    return F.interpolate(new.unflatten(2, size).float(), size=(height, width), mode="nearest")


def _claimed(old: Tensor, base: Tensor, concepts: Tensor, size: tuple[int, int]) -> Tensor:
    """[N,P] bool for one picture: where each concept appears in the base branch's map or in its own."""
    counts = range(len(old) + 1, 2 * len(old) + 2)
    in_base = _clusters(base, counts)
    claims = []
    for mask, own in zip(old, concepts, strict=True):
        claims.append(_alike(in_base, mask, size) | _alike(_clusters(own, counts), mask, size))
    return torch.stack(claims)


def _alike(clusters: Tensor, mask: Tensor, size: tuple[int, int]) -> Tensor:
    """[P] bool: the cluster that overlaps most with the mask, or the mask's bounding box where none does enough."""
    overlap = (clusters & mask).sum(1) / (clusters | mask).sum(1).clamp(min=1)
    best = int(overlap.argmax())
    return clusters[best] if overlap[best] >= LEAST else bounding_box(mask, size)


def bounding_box(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """[P] bool, of a mask [P] bool on a grid of this height and width."""
    grid = mask.unflatten(0, size)
    rows, columns = grid.any(1), grid.any(0)
    between = [(x.cumsum(0) > 0) & (x.flip(0).cumsum(0).flip(0) > 0) for x in (rows, columns)]
    return (between[0][:, None] & between[1]).flatten()


def _clusters(rows: Tensor, counts: range) -> Tensor:
    """[sum of counts, P] bool: k-means of the rows [P,D] for every number of clusters."""
    labels = [(kmeans(rows, count), count) for count in counts]
    return torch.cat([label == torch.arange(count, device=rows.device)[:, None] for label, count in labels])


def kmeans(rows: Tensor, count: int) -> Tensor:
    """[P] int64, the cluster of each row of [P,D] (Lloyd 1982): the best of some starts at random rows, the same in every run."""
    stream = torch.Generator().manual_seed(count)
    starts = torch.stack([torch.randperm(len(rows), generator=stream)[:count] for _ in range(RESTARTS)])
    centres = rows[starts.to(rows.device)]
    for _ in range(ROUNDS):
        labels = torch.cdist(rows.expand(RESTARTS, -1, -1), centres).argmin(2)
        member = F.one_hot(labels, count).to(rows)
        sizes = member.sum(1)[..., None]
        centres = torch.where(sizes > 0, member.mT @ rows / sizes.clamp(min=1), centres)
    nearest, labels = torch.cdist(rows.expand(RESTARTS, -1, -1), centres).min(2)
    return labels[int(nearest.square().sum(1).argmin())]
