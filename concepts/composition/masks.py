"""Masks of regions: from boxes, at any resolution, and what lies outside of them.

Soft masks are [N,B,h,w] in 0..1 for N regions of B images: the share of each position that belongs to a region.
"""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[float, float, float, float]  # left, top, right, bottom as fractions of the image
MASK_SIZE = 512  # positions along each side in which masks are kept


def hard_masks(soft_masks: Tensor, height: int, width: int) -> Tensor:
    """Resize soft masks [N,B,h,w] to [N,B,height,width] float32, 0 or 1; no two overlap.

    A position belongs to the region with the largest share of it, if that is more than half of the region's best share anywhere.
    So a region smaller than a position keeps the one that it fills best.
    """
    shares = F.interpolate(soft_masks, size=(height, width), mode="area")
    first, second = torch.cat([shares, shares.new_zeros(2, *shares.shape[1:])]).topk(2, 0).values
    masks: Tensor = (shares == first) & (first > second) & (shares > shares.amax((2, 3), keepdim=True) / 2)
    return masks.float()


def is_placed(soft_masks: Tensor) -> Tensor:
    """Return [N,B] bool for soft masks [N,B,h,w]: False for a region that is the same everywhere, such as empty or full."""
    return soft_masks.amax((2, 3)) > soft_masks.amin((2, 3))


def outside(soft_masks: Tensor) -> Tensor:
    """Return [B,1,h,w] for [N,B,h,w]: the share of each position that belongs to no region.

    It is 0 for an image without a region that `is_placed`.
    """
    return ((1 - soft_masks.sum(0)).clamp(0, 1) * is_placed(soft_masks).any(0)[:, None, None])[:, None]


def bounds(mask: Tensor) -> tuple[slice, slice]:
    """Return the rows and columns of the bounding box of a mask [H,W] that isn't empty."""
    rows, columns = (mask.any(axis).nonzero() for axis in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def mask_seed(mask: Tensor) -> int:
    """Return a seed that depends on the mask [H,W] alone. So a region's randomness doesn't depend on the order of concepts."""
    return zlib.crc32(mask.numpy().tobytes())


def box_mask(box: Box) -> Tensor:
    """Return [512,512] float32: 1 where a position's middle lies in the box."""
    middles = (torch.arange(MASK_SIZE) + 0.5) / MASK_SIZE
    left, top, right, bottom = box
    return ((middles >= top) & (middles < bottom)).float()[:, None] * ((middles >= left) & (middles < right)).float()
