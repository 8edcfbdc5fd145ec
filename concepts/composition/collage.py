"""A collage: things that were drawn alone, cut out and shrunk into their regions.

A model draws one thing in the middle of a picture better than a small one among others, aside: the latents of a small one are few. So each
is drawn alone, as large as it likes, and what is around the things without them; pasted together, encoded and noised to a middle step,
the picture is drawn on from there (as SDEdit does with strokes, Meng et al. 2022, arXiv 2108.01073; as Collage Diffusion does with layers,
Sarukkai et al. 2023, arXiv 2303.00262). Cutting out takes no further model: a thing is what differs in colour from what surrounds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur, resize

from concepts.composition.layout import bounds, box_mask

GRID = 64  # positions along each side in which things are told from their surroundings
EDGE = 7 / 32  # of a picture's side: what is drawn alone keeps that far from the border
MIDDLE = box_mask((EDGE, EDGE, 1 - EDGE, 1 - EDGE))
RING = 10  # positions along the border that surely show the surroundings
SEAM = 3  # positions, odd: a thing keeps of its surroundings what lies within half of it
BLUR = 8.0  # positions, standard deviation of what is laid over the regions
# Distance of colours in -1..1 from which on a position is of the thing; in between the surroundings say it
LEAST, MOST = 0.5, 1.2
STANDS_OUT = 1.3  # times as far as nearly all (97 %) of them are from their mean colour


def things(pictures: Tensor) -> Tensor:
    """[N,3,H,W] in -1..1 -> [N,GRID,GRID], 0 or 1: what differs from the surroundings; the middle where nothing does."""
    small = F.interpolate(pictures, (GRID, GRID), mode="area")
    ring = torch.ones(GRID, GRID, dtype=torch.bool)
    ring[RING:-RING, RING:-RING] = False
    distance = (small - small[..., ring].mean(2)[..., None, None]).norm(dim=1)
    least = (STANDS_OUT * distance[:, ring].quantile(0.97, dim=1)).clamp(LEAST, MOST)
    found = (distance > least[:, None, None]).float()[:, None]
    dense = F.avg_pool2d(found, 3, 1, 1) > 0.5
    found = (found * F.max_pool2d(dense.float(), 3, 1, 1))[:, 0]
    middle = F.interpolate(MIDDLE[None, None], (GRID, GRID))[0]
    return torch.where(found.any(2).any(1)[:, None, None], found, middle)


def cut_to_fit(picture: Tensor, thing: Tensor, height: int, width: int) -> Tensor:
    """A picture [3,S,S] and what in it is the thing [GRID,GRID] -> [4,height,width], colours and opacity: the thing in the middle, as large
    as fits, with a soft seam of its surroundings."""
    side = picture.shape[1]
    (top, bottom), (left, right) = ((found.start * side / GRID, found.stop * side / GRID) for found in bounds(thing))
    scale = max((bottom - top) / height, (right - left) / width) / 2
    soft = F.interpolate(F.max_pool2d(thing[None, None], SEAM, 1, SEAM // 2), (side, side), mode="bilinear")
    # Half of what is cut out, which may reach over the picture
    above, beside = round(scale * height), round(scale * width)
    margins = (beside, beside, above, above)
    layers = torch.cat([F.pad(picture[None], margins, mode="replicate"), F.pad(soft, margins)], 1)[0]
    y, x = above + (top + bottom) / 2, beside + (left + right) / 2
    window = layers[
        :, round(y - scale * height) : round(y + scale * height), round(x - scale * width) : round(x + scale * width)
    ]
    return resize(window, [height, width], antialias=True)


def cleared(pictures: Tensor, inside: Tensor) -> Tensor:
    """[B,3,S,S], with a blur of what is around over what is inside [B,1,S,S]."""
    size = GRID, GRID
    outside = 1 - F.interpolate(inside, size, mode="area")
    total, weight = (
        gaussian_blur(part, [4 * int(BLUR) - 1] * 2, [BLUR] * 2)
        for part in (F.interpolate(pictures, size, mode="area") * outside, outside)
    )
    blur = F.interpolate(total / weight.clamp(min=1e-3), pictures.shape[2:], mode="bilinear")
    return torch.where(inside > 0, blur, pictures)


def pasted(backdrops: Tensor, alone: Sequence[Tensor], masks: Tensor) -> Tensor:
    """[B,3,S,S] in -1..1: backdrops without what they have inside the masks [N,B,S,S], and there the things of `alone`, N times
    [B,3,S,S], each as large as its mask's bounding box lets it be."""
    made = cleared(backdrops, masks.amax(0)[:, None]).clone()
    for pictures, regions in zip(alone, masks, strict=True):
        for picture, whole, thing, mask in zip(made, pictures, things(pictures), regions, strict=True):
            if not mask.any():
                continue
            box = bounds(mask)
            layers, under = cut_to_fit(whole, thing, *mask[box].shape), picture[(slice(None), *box)]
            under += layers[3] * mask[box] * (layers[:3] - under)
    return made
