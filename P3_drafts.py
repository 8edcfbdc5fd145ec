"""Which noise draws a layout well: several are tried in a few steps, and the best one is drawn in full.

With a solver without randomness the noise decides what a picture shows, and six steps tell much of it. A CLIP chooses, by what is inside
the masks: likeness to a concept's pictures where there are any, else its words.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from P3_concepts import read_pictures
from P3_layout import Layout, Region
from P3_scores import TEXT_WEIGHT, Scorer

STEPS = 6  # of a draft's solver
GREY = 127

Rate = Callable[[Layout, Tensor], Tensor]
"""(layout, [K,3,H,W] uint8) -> [K], how well these pictures of it came out."""


def rate_by(scorer: Scorer) -> Rate:
    """The mean over the regions: image scores where they name pictures, else text scores with the course's weight."""

    @cache
    def references(folder: Path) -> Tensor:
        return scorer.encode(read_pictures(folder))

    def rate(layout: Layout, images: Tensor) -> Tensor:
        scores = [
            scorer.image_scores(features, references(region.images))
            if region.images
            else TEXT_WEIGHT * scorer.text_scores(features, region.plain)
            for region, features in features_inside(scorer, layout, images)
        ]
        return torch.stack(scores).mean(0)

    return rate


def features_inside(scorer: Scorer, layout: Layout, images: Tensor) -> list[tuple[Region, Tensor]]:
    """Every region, and the features [K,D] of what pictures [K,3,H,W] uint8 hold inside its mask."""
    masks = zip(layout.regions, layout.masks(*images.shape[2:]), strict=True)
    return [(region, scorer.encode(cut_out(images, mask))) for region, mask in masks]


def cut_out(images: Tensor, mask: Tensor) -> Tensor:
    """[N,3,h,w] uint8: twice the mask's [H,W] bounding box, grey where the mask isn't: a CLIP knows objects best with room around."""
    rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
    window = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    grey = torch.tensor(GREY, dtype=torch.uint8)
    inside = torch.where(mask[window] > 0, images[:, :, window[0], window[1]], grey)
    above, beside = (side // 2 for side in inside.shape[2:])
    return F.pad(inside, (beside, beside, above, above), value=GREY)
