"""What became of a layout: scores of each concept inside its mask, and all levels side by side with the masks drawn in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from concepts.clip_scores import Scorer
from concepts.composition.layout import Layout, bounds
from concepts.composition.multipath import ConductorConfig, LayoutRequest, Level, compose
from concepts.dataset import read_images
from concepts.sampling import StableDiffusionSampler
from runtime.images import labelled_grid

Scores = dict[str, float]
COLOURS = ((228, 87, 86), (84, 162, 75), (76, 120, 168), (238, 202, 59), (178, 121, 162), (114, 183, 178))
SHOWN = 256  # pixels along each side of a picture in figures
MOST = 4  # pictures in the figure
GREY = 127  # around what is cut out


def scores_inside(scorer: Scorer, layout: Layout, images: Tensor) -> list[dict[str, Scores]]:
    """Per picture of [N,3,H,W] uint8 and per region, by token: "text", how well what is inside the mask fits the region's prompt in
    ordinary words, and, where it names pictures, "image", the mean of 100 x cosine to them."""
    found: list[dict[str, Scores]] = [{} for _ in images]
    masks = layout.masks(*images.shape[2:])
    for number, (region, mask) in enumerate(zip(layout.regions, masks, strict=True)):
        features = scorer.encode(cut_out(images, mask))
        columns = {"text": scorer.text_scores(features, region.plain)}
        if region.images:
            columns["image"] = scorer.image_scores(features, scorer.encode(read_images(region.images)))
        name = region.token if region.token not in found[0] else f"{region.token} {number}"
        for row, scores in enumerate(found):
            scores[name] = {kind: round(float(column[row]), 3) for kind, column in columns.items()}
    return found


def cut_out(images: Tensor, mask: Tensor) -> Tensor:
    """[N,3,h,w] uint8: twice the mask's [H,W] bounding box, grey where the mask isn't: a CLIP knows objects best with room around."""
    window = bounds(mask)
    grey = torch.tensor(GREY, dtype=torch.uint8)
    inside = torch.where(mask[window] > 0, images[:, :, window[0], window[1]], grey)
    above, beside = (side // 2 for side in inside.shape[2:])
    return F.pad(inside, (beside, beside, above, above), value=GREY)


def means_of(scores: Sequence[dict[str, Scores]]) -> dict[str, Scores]:
    """Over pictures."""
    return {
        token: {kind: round(sum(row[token][kind] for row in scores) / len(scores), 3) for kind in kinds}
        for token, kinds in scores[0].items()
    }


# ---------------------------------------------------------------- pictures


def layout_picture(layout: Layout, side: int = SHOWN) -> Tensor:
    """[3,side,side] uint8: each region in a colour of its own with its token, on grey."""
    masks = layout.masks(side, side).numpy() > 0
    pixels = np.full((side, side, 3), 210, np.uint8)
    for number, mask in enumerate(masks):
        pixels[mask] = COLOURS[number % len(COLOURS)]
    picture = Image.fromarray(pixels)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(10, side // 16))
    for region, mask in zip(layout.regions, masks, strict=True):
        rows, columns = (mask.any(axis).nonzero()[0] for axis in (1, 0))
        if len(rows):
            place = (int(columns[0]) + 3, int(rows[0]) + 1)
            pen.text(place, region.token, "white", font, stroke_width=1, stroke_fill="black")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def with_outlines(images: Tensor, layout: Layout, side: int = SHOWN) -> Tensor:
    """[N,3,H,W] uint8 -> [N,3,side,side] at least that large: the pictures with the borders of the regions in their colours."""
    scale = max(1, side // images.shape[2])
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    for number, mask in enumerate(layout.masks(*large.shape[2:])):
        inner = -F.max_pool2d(-mask[None], 5, 1, 2)[0]
        border = (mask > 0) & (inner <= 0)
        colour = torch.tensor(COLOURS[number % len(COLOURS)], dtype=torch.uint8)
        large = torch.where(border, colour[:, None, None], large)
    return large


def levels_figure(
    path: Path, painter: StableDiffusionSampler, layout: Layout, seeds: Sequence[int], means: ConductorConfig
) -> None:
    """A row per seed, of the first four: layout, joint, regional, conductor."""
    seeds, levels = seeds[:MOST], get_args(Level)
    orders = [LayoutRequest(layout, seed) for seed in seeds]
    drawn = [with_outlines(compose(painter, orders, level, means), layout) for level in levels]
    plan = layout_picture(layout, drawn[0].shape[2])
    cells = torch.stack([image for row in zip(*drawn, strict=True) for image in (plan, *row)])
    rows = [f"picture {number}" for number in range(len(seeds))]
    labelled_grid(path, cells, rows, ["layout", *levels], layout.joint.replace("$", r"\$"), inch=1.8)
