"""Results of a layout: scores of each concept inside its mask, and figures that compare the levels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from concepts.attention import AttentionSampler
from concepts.clip_scores import Scorer
from concepts.composition.layout import Layout
from concepts.composition.masks import bounds
from concepts.composition.multipath import ConductorConfig, LayoutRequest, Level, compose
from concepts.dataset import read_images
from concepts.sampling import StableDiffusionSampler
from runtime.images import pixel_grid

Scores = dict[str, float]
COLOURS = ((228, 87, 86), (84, 162, 75), (76, 120, 168), (238, 202, 59), (178, 121, 162), (114, 183, 178))
SHOWN = 256  # pixels along each side of an image in figures
FIGURE_ROWS = 4
GREY = 127  # around what is cut out


def scores_inside(scorer: Scorer, layout: Layout, images: Tensor) -> list[dict[str, Scores]]:
    """Return per image of [N,3,H,W] uint8 {token: scores} of what is inside each region's mask.

    "text" is the score with the region's prompt in ordinary words.
    "image" is the mean of 100 x cosine to the region's images, if it has any. A repeated token has a number added.
    """

    scores: list[dict[str, Scores]] = [{} for _ in images]
    masks = layout.masks(*images.shape[2:])
    for number, (region, mask) in enumerate(zip(layout.regions, masks, strict=True)):
        features = scorer.encode(cut_out(images, mask))
        columns = {"text": scorer.text_scores(features, region.plain_prompt)}
        if region.images:
            columns["image"] = scorer.image_scores(features, scorer.encode(read_images(region.images)))
        name = region.token if region.token not in scores[0] else f"{region.token} {number}"
        for row, of_image in enumerate(scores):
            of_image[name] = {kind: round(float(column[row]), 3) for kind, column in columns.items()}
    return scores


def cut_out(images: Tensor, mask: Tensor) -> Tensor:
    """Return [N,3,h,w] uint8: what is inside the mask [H,W], with grey around it.

    h and w are twice the mask's bounding box, since CLIP scores objects best with a margin.
    """
    window = bounds(mask)
    grey = torch.tensor(GREY, dtype=torch.uint8)
    inside = torch.where(mask[window] > 0, images[:, :, window[0], window[1]], grey)
    vertical, horizontal = (side // 2 for side in inside.shape[2:])
    return F.pad(inside, (horizontal, horizontal, vertical, vertical), value=GREY)


def mean_scores(scores: Sequence[dict[str, Scores]]) -> dict[str, Scores]:
    """Return the scores of `scores_inside`, as means over images."""
    return {
        token: {kind: round(sum(row[token][kind] for row in scores) / len(scores), 3) for kind in kinds}
        for token, kinds in scores[0].items()
    }


# ---------------------------------------------------------------- figures


def draw_layout(layout: Layout, side: int = SHOWN) -> Tensor:
    """Return [3,side,side] uint8: each region in its colour with its token, on grey."""
    masks = layout.masks(side, side).numpy() > 0
    pixels = np.full((side, side, 3), 210, np.uint8)
    for number, mask in enumerate(masks):
        pixels[mask] = COLOURS[number % len(COLOURS)]
    image = Image.fromarray(pixels)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=max(10, side // 16))
    for region, mask in zip(layout.regions, masks, strict=True):
        rows, columns = (mask.any(axis).nonzero()[0] for axis in (1, 0))
        if len(rows):
            corner = (int(columns[0]) + 3, int(rows[0]) + 1)
            pen.text(corner, region.token, "white", font, stroke_width=1, stroke_fill="black")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def draw_outlines(images: Tensor, layout: Layout, side: int = SHOWN) -> Tensor:
    """Return the images [N,3,H,W] uint8, enlarged to about `side` pixels, with the borders of the regions in their colours."""
    scale = max(1, side // images.shape[2])
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    for number, mask in enumerate(layout.masks(*large.shape[2:])):
        inner = -F.max_pool2d(-mask[None], 5, 1, 2)[0]
        border = (mask > 0) & (inner <= 0)
        colour = torch.tensor(COLOURS[number % len(COLOURS)], dtype=torch.uint8)
        large = torch.where(border, colour[:, None, None], large)
    return large


def levels_figure(
    path: Path, sampler: StableDiffusionSampler, layout: Layout, seeds: Sequence[int], config: ConductorConfig
) -> None:
    """Sample the layout at every level and write a figure: a row for each of the first four seeds, columns for layout and levels."""
    seeds, levels = seeds[:FIGURE_ROWS], get_args(Level)
    requests = [LayoutRequest(layout, seed) for seed in seeds]
    columns = [draw_outlines(compose(sampler, requests, level, config), layout) for level in levels]
    plan = draw_layout(layout, columns[0].shape[2])
    cells = torch.stack([image for row in zip(*columns, strict=True) for image in (plan, *row)])
    pixel_grid(path, cells, [""] * len(seeds), ["layout", *levels], layout.joint)


def attention_figure(
    path: Path,
    sampler: AttentionSampler,
    layout: Layout,
    seed: int,
    levels: Sequence[Level],
    config: ConductorConfig,
) -> None:
    """Sample the layout at these levels with one seed, and write a figure with a row per level.

    A row shows the image, and where it attends to each word, with the regions' borders.
    """
    cells = []
    for level in levels:
        images = compose(sampler, [LayoutRequest(layout, seed)], level, config)
        cells.append(draw_outlines(sampler.with_maps(images)[0], layout))
    pixel_grid(path, torch.cat(cells), list(levels), ["image", *sampler.words], layout.joint)
