"""A collage: things that were sampled alone, cut out and shrunk into their regions.

A model renders a thing in the middle of an image better than a small thing among others, which covers few latent positions. So each thing
is sampled alone and large, and the scene from a prompt in ordinary words. Pasted together, encoded and noised to a middle step, the image
is sampled on from there (as SDEdit does with strokes, Meng et al. 2022, arXiv 2108.01073; as Collage Diffusion does with layers,
Sarukkai et al. 2023, arXiv 2303.00262). Cutting out needs no further model: a thing is what differs in colour from its surroundings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from concepts.composition.masks import bounds, box_mask

GRID = 64  # positions along each side in which things are cut out
EDGE = 7 / 32  # of an image's side: distance from the border to a thing that is sampled alone
MIDDLE = box_mask((EDGE, EDGE, 1 - EDGE, 1 - EDGE))
RING = 10  # positions along the border that surely show the surroundings
SEAM = 3  # positions, odd: a thing's mask is widened by half of it
BLUR = 8.0  # positions, standard deviation of the blur that covers the regions
# For colours in -1..1: a thing is farther from its surroundings than a limit. It is NEAR, or more for patterned ones, at most FAR
NEAR, FAR = 0.5, 1.2
STANDS_OUT = 1.3  # the limit is this times the distance from the mean colour within which 97 % of the surroundings lie


def thing_masks(images: Tensor) -> Tensor:
    """Return masks [N,GRID,GRID], 0 or 1, of the thing in each image [N,3,H,W] in -1..1: what differs in colour from the border.

    If nothing differs, the mask is a square in the middle.
    """
    small = F.interpolate(images, (GRID, GRID), mode="area")
    ring = torch.ones(GRID, GRID, dtype=torch.bool)
    ring[RING:-RING, RING:-RING] = False
    distance = (small - small[..., ring].mean(2)[..., None, None]).norm(dim=1)
    limit = (STANDS_OUT * distance[:, ring].quantile(0.97, dim=1)).clamp(NEAR, FAR)
    masks = (distance > limit[:, None, None]).float()[:, None]
    dense = F.avg_pool2d(masks, 3, 1, 1) > 0.5
    masks = (masks * F.max_pool2d(dense.float(), 3, 1, 1))[:, 0]
    middle = F.interpolate(MIDDLE[None, None], (GRID, GRID))[0]
    return torch.where(masks.any(2).any(1)[:, None, None], masks, middle)


def cut_to_fit(image: Tensor, thing: Tensor, height: int, width: int) -> Tensor:
    """Return [4,height,width], colours in -1..1 and opacity in 0..1: the image's thing, centred, as large as fits, with a soft edge.

    image [3,S,S] in -1..1, thing [GRID,GRID] its mask.
    """
    from torchvision.transforms.functional import resize

    side = image.shape[1]
    (top, bottom), (left, right) = ((part.start * side / GRID, part.stop * side / GRID) for part in bounds(thing))
    scale = max((bottom - top) / height, (right - left) / width) / 2
    soft = F.interpolate(F.max_pool2d(thing[None, None], SEAM, 1, SEAM // 2), (side, side), mode="bilinear")
    # Half of the window that is cut out, which may reach over the image's border
    half_height, half_width = round(scale * height), round(scale * width)
    margins = (half_width, half_width, half_height, half_height)
    layers = torch.cat([F.pad(image[None], margins, mode="replicate"), F.pad(soft, margins)], 1)[0]
    y, x = half_height + (top + bottom) / 2, half_width + (left + right) / 2
    rows = slice(round(y - scale * height), round(y + scale * height))
    columns = slice(round(x - scale * width), round(x + scale * width))
    window: Tensor = resize(layers[:, rows, columns], [height, width], antialias=True)
    return window


def clear_regions(images: Tensor, inside: Tensor) -> Tensor:
    """Return images [B,3,S,S] in which the parts where `inside` [B,1,S,S] is above 0 are replaced by a blur of the rest."""
    from torchvision.transforms.functional import gaussian_blur

    size = GRID, GRID
    outside = 1 - F.interpolate(inside, size, mode="area")
    total, weight = (
        gaussian_blur(part, [4 * int(BLUR) - 1] * 2, [BLUR] * 2)
        for part in (F.interpolate(images, size, mode="area") * outside, outside)
    )
    blur = F.interpolate(total / weight.clamp(min=1e-3), images.shape[2:], mode="bilinear")
    return torch.where(inside > 0, blur, images)


def paste(scenes: Tensor, alone: Sequence[Tensor], masks: Tensor) -> Tensor:
    """Return scenes [B,3,S,S] in -1..1 with N things pasted inside the masks [N,B,S,S]. What was there is cleared before.

    `alone` holds N tensors [B,3,S,S], images of one thing each. A thing is as large as its mask's bounding box allows.
    """
    images = clear_regions(scenes, masks.amax(0)[:, None]).clone()
    for sources, regions in zip(alone, masks, strict=True):
        for image, source, thing, mask in zip(images, sources, thing_masks(sources), regions, strict=True):
            if not mask.any():
                continue
            box = bounds(mask)
            layers, under = cut_to_fit(source, thing, *mask[box].shape), image[(slice(None), *box)]
            under += layers[3] * mask[box] * (layers[:3] - under)
    return images
