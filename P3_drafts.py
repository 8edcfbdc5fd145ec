"""Which noise draws a layout well: several are tried in a few steps, and the best one is drawn in full.

With a solver without randomness the noise decides what a picture shows, and six steps tell much of it. A CLIP chooses, by what is inside
the masks: likeness to a concept's pictures where there are any, else its words.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from P3_concepts import read_pictures
from P3_layout import Layout
from P3_scores import TEXT_WEIGHT, Scorer

STEPS = 6  # of a draft's solver
GREY = 127

Rate = Callable[[Layout, Tensor], Tensor]
"""(layout, [K,3,H,W] uint8) -> [K], how well these pictures of it came out."""


def rate_by(scorer: Scorer) -> Rate:
    """The mean over the regions: image scores where they name pictures, else text scores with the course's weight."""

    def rate(layout: Layout, images: Tensor) -> Tensor:
        found = region_scores(scorer, layout, images)
        return torch.stack([scores.get("image", TEXT_WEIGHT * scores["text"]) for scores in found]).mean(0)

    return rate


def region_scores(scorer: Scorer, layout: Layout, images: Tensor) -> list[dict[str, Tensor]]:
    """Per region, [K] each of pictures [K,3,H,W] uint8: "text", how well what is inside the mask fits the region's prompt in ordinary
    words, and, where it names pictures, "image", the mean of 100 x cosine to them."""
    found = []
    for region, mask in zip(layout.regions, layout.masks(*images.shape[2:]), strict=True):
        features = scorer.encode(cut_out(images, mask))
        scores = {"text": scorer.text_scores(features, region.plain)}
        if region.images:
            scores["image"] = scorer.image_scores(features, scorer.encode(read_pictures(region.images)))
        found.append(scores)
    return found


def cut_out(images: Tensor, mask: Tensor) -> Tensor:
    """[N,3,h,w] uint8: twice the mask's [H,W] bounding box, grey where the mask isn't: a CLIP knows objects best with room around."""
    rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
    window = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    inside = images[:, :, window[0], window[1]]
    height, width = inside.shape[2:]
    cut = torch.full((len(images), 3, height + height // 2 * 2, width + width // 2 * 2), GREY, dtype=torch.uint8)
    grey = torch.tensor(GREY, dtype=torch.uint8)
    top, left = height // 2, width // 2
    cut[:, :, top : top + height, left : left + width] = torch.where(mask[window] > 0, inside, grey)
    return cut
