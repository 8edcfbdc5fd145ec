"""Shape fidelity: how well an object's silhouette in an image agrees with that of its kind, so that a malformed object fails.

The scene classifier names the kind that an object resembles most. It can't tell a fish from a fish without a tail. Silhouettes can:
the object is separated from its background, scaled to one size, and compared with the kind's outline in every pose of the world.

fidelity = IoU - 2 * part, at least 0. IoU is the intersection over union of the two silhouettes in the best pose. `part` is the largest
connected error (a missing tail, a second handle) as a share of the silhouette's area. Rounding of a contour gives no connected error.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miniature.scenery.scenes import MIRRORED
from miniature.scenery.shapes import sprite

GRID = 48  # pixels along each side of a normalised silhouette
AREA = 0.3  # share of these pixels that the silhouette fills
SIDE = 60  # pixels of the reference sprites
ANGLES = range(-16, 17, 4)  # degrees; the world turns objects by up to 8
SHIFTS = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]  # pixels, tried for the best match
NEIGHBOURHOOD = 5  # pixels; the largest difference in it is that of a pixel's part of the object
BORDER = 3  # pixels along the image's edges that show background
LEAST = 12.0  # least difference of an object from its background, in grey levels
ALIKE = 0.75  # a part may be missed below this share of the object's difference from the background
PASSING = 0.9  # an image passes with this share of the fidelity of renders that went through the autoencoder


class Segmented(NamedTuple):
    """The largest object of each of N images."""

    masks: Tensor  # [N,H,W], 0..1
    colours: Tensor  # [N,3], the object's mean colour in grey levels
    backgrounds: Tensor  # [N,3], the background's mean colour behind it


def shape_fidelity(images: Tensor, kinds: Sequence[str]) -> Tensor:
    """Return [N], 0..1: how well the largest object of image i, [N,3,H,W] uint8, has the shape of `kinds[i]`; 0 without an object."""
    masks, colours, backgrounds = segment(images)
    (normalised,) = normalise(masks)
    values = [
        best_match(mask, *references(kind, hidden_parts(colour, background)))
        for mask, kind, colour, background in zip(normalised, kinds, colours, backgrounds, strict=True)
    ]
    return torch.tensor(values)


# ---------------------------------------------------------------- the object in the image


def segment(images: Tensor) -> Segmented:
    """Separate the largest object of each image [N,3,H,W] uint8 from its background; without an object the mask is 0."""
    from scipy import ndimage  # slow to import

    x = images.float()
    plane = background_plane(x)
    distance = (x - plane).norm(dim=1).numpy()
    border = border_of(*distance.shape[1:]).numpy()
    masks = np.zeros_like(distance)
    for mask, levels in zip(masks, distance, strict=True):
        texture = 1.5 * np.quantile(levels[border], 0.9)
        # the difference of the part that a pixel belongs to: a light stem, a red cap
        level = ndimage.maximum_filter(levels, NEIGHBOURHOOD)
        edge = levels / np.maximum(level, 1e-6)  # 0.5 where a pixel is half object
        labels, count = ndimage.label((edge > 0.5) & (levels > max(LEAST, texture)))
        if count:
            largest = labels == 1 + np.argmax(ndimage.sum_labels(levels, labels, range(1, count + 1)))
            mask[:] = np.clip(2 * edge - 0.5, 0, 1) * ndimage.binary_dilation(largest)
    weights = torch.from_numpy(masks)[:, None]
    total = weights.sum((2, 3)).clamp(min=1e-6)
    colours, backgrounds = ((weights * each).sum((2, 3)) / total for each in (x, plane))
    return Segmented(weights[:, 0], colours, backgrounds)


def border_of(height: int, width: int) -> Tensor:
    """Return [height,width] bool: the three pixels along each edge."""
    border = torch.ones(height, width, dtype=torch.bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    return border


def background_plane(x: Tensor) -> Tensor:
    """Return the background [N,3,H,W] of images, estimated by a plane per channel through the border's colours.

    A plane also fits a gradient. The fit is by reweighted least squares, so an object at the border has little effect.
    """
    height, width = x.shape[2:]
    down, right = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    basis = torch.stack([torch.ones_like(right), right, down], -1)
    border = border_of(height, width)
    points, values = basis[border], x[:, :, border]
    weights = torch.ones(len(x), 1, len(points))
    for _ in range(4):
        weighted = points.T * weights
        plane = torch.linalg.solve(weighted @ points + 1e-4 * torch.eye(3), weighted @ values.transpose(1, 2))
        errors = (values - (points @ plane).transpose(1, 2)).norm(dim=1, keepdim=True)
        weights = 1 / (1 + (errors / (2 * errors.median(2, keepdim=True).values + 3)) ** 4)
    return torch.einsum("hwk,nkc->nchw", basis, plane)


def hidden_parts(colour: Tensor, background: Tensor) -> tuple[str, ...]:
    """Return which parts, "dark" and "light", of an object of this colour [3] may be too similar to this background [3] to be found."""
    reach = ALIKE * (colour - background).norm()
    parts = {"dark": 0.4 * colour, "light": 0.4 * colour + 0.6 * 255}  # as scenery/shapes.py paints them
    return tuple(name for name, part in parts.items() if (part - background).norm() < reach)


# ---------------------------------------------------------------- comparison


def normalise(masks: Tensor, *others: Tensor) -> list[Tensor]:
    """Return silhouettes [N,H,W] as [N,48,48], of equal areas with the centre of mass in the middle; `others` [N,H,W] move likewise."""
    count, height, width = masks.shape
    x = (torch.arange(width) + 0.5) / width * 2 - 1
    y = (torch.arange(height) + 0.5) / height * 2 - 1
    area = masks.sum((1, 2)).clamp(min=1)
    side = (area / AREA).sqrt()  # of the window, pixels
    zoom = torch.zeros(count, 2, 3)
    zoom[:, 0, 0], zoom[:, 1, 1] = side / width, side / height
    zoom[:, 0, 2], zoom[:, 1, 2] = (masks * x).sum((1, 2)) / area, (masks * y[:, None]).sum((1, 2)) / area
    grid = F.affine_grid(zoom, [count, 1, GRID, GRID], align_corners=False)
    return [F.grid_sample(each[:, None], grid, align_corners=False)[:, 0] for each in (masks, *others)]


@lru_cache(maxsize=256)
def references(kind: str, hidden: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Return the silhouettes [M,48,48] of a kind in every pose, and which of their pixels count [M,48,48], 0 or 1.

    Each of the `hidden` parts, "dark" or "light", may be missing in an image. So there are also silhouettes without one or both of them,
    in which the pixels of the missing parts don't count.
    """
    masks, parts = [], []
    for angle in ANGLES:
        for mirrored in (False, True) if kind in MIRRORED else (False,):
            figure = sprite(kind, SIDE, angle, mirrored)
            inner = {"dark": (figure.gain < 0.7) & (figure.lift < 60), "light": figure.lift > 60}
            for count in range(len(hidden) + 1):
                for names in combinations(hidden, count):
                    part = (
                        np.any([inner[name] for name in names], axis=0) if names else np.zeros_like(figure.alpha, bool)
                    )
                    masks.append(torch.from_numpy(np.where(part, 0, figure.alpha).astype(np.float32)))
                    parts.append(torch.from_numpy(part.astype(np.float32)))
    silhouettes, without = normalise(torch.stack(masks), torch.stack(parts))
    return silhouettes, 1 - F.max_pool2d((without > 0.5).float()[:, None], 3, 1, 1)[:, 0]


def best_match(mask: Tensor, candidates: Tensor, counting: Tensor) -> float:
    """Return the fidelity of a silhouette [48,48] to the candidate [M,48,48] and the shift (up to 2 pixels) that agree most."""
    shifted = torch.stack([mask.roll(shift, (0, 1)) for shift in SHIFTS])[:, None]
    common = (torch.minimum(shifted, candidates) * counting).sum((2, 3))
    iou = common / (torch.maximum(shifted, candidates) * counting).sum((2, 3)).clamp(min=1)
    best = int(iou.argmax())
    row = best % len(candidates)
    wrong = (shifted[best // len(candidates), 0] - candidates[row]).abs() * counting[row]
    return max(0.0, float(iou.max()) - 2 * _largest_part(wrong) / float(candidates[row].sum()))


def _largest_part(wrong: Tensor) -> float:
    """Return the area in pixels of the largest connected error; errors one pixel thin, as along contours, give 0."""
    from scipy import ndimage  # slow to import

    labels, count = ndimage.label(ndimage.binary_opening((wrong > 0.5).numpy(), np.ones((2, 2))))
    return float(np.bincount(labels.ravel())[1:].max()) if count else 0.0
