"""How the judge is trained: new images in every step, with the flaws of generated ones, their labels, and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from miniature.judge_model import CELLS, NONE, WHOLE, Logits, SceneNetwork, erase
from miniature.scenery.render import as_tensor, render_batch
from miniature.scenery.scenes import (
    ALL_KINDS,
    ALL_STYLES,
    ANY_PAIR,
    BACKGROUNDS,
    COLOURS,
    GROUNDS,
    PLACES,
    SIDE,
    Box,
    Scene,
)
from runtime.images import to_float
from runtime.seeds import derived_seed
from training.draws import Draws

IGNORED = -100  # label of a question that has no answer here


@dataclass(frozen=True)
class Truth:
    """Labels of N images and M boxes; IGNORED where a question has no answer."""

    whole: dict[str, Tensor]  # {question: [N] long}
    cells: dict[str, Tensor]  # {question: [N,16,16] long}
    boxes: Tensor  # [M,4] float, pixels
    rows: Tensor  # [M], the image of each box
    boxed: dict[str, Tensor]  # {question: [M] long}
    erased: Tensor  # [N,4] float: the box to paint over
    which: Tensor  # [N] bool: the images in which it is painted over


def truth_of(scenes: Sequence[Scene], erased: Sequence[int | None], random: Random) -> Truth:
    """Return the labels of scenes, where object `erased[i]` of scene i is painted over (None = none); boxes are displaced a little."""
    cases = list(zip(scenes, erased, strict=True))
    labels = [_labels(scene, missing) for scene, missing in cases]
    labelled = [(row, *box) for row, case in enumerate(cases) for box in _boxes(*case, random)]
    rows, boxes, kinds, colours = zip(*labelled, strict=True)
    return Truth(
        {question: torch.tensor([label[question] for label in labels]) for question in WHOLE},
        _cells(scenes, erased),
        torch.tensor(boxes),
        torch.tensor(rows),
        {"kind": torch.tensor(kinds), "colour": torch.tensor(colours)},
        torch.tensor([scene.things[missing or 0].box for scene, missing in cases]).float(),
        torch.tensor([missing is not None for missing in erased]),
    )


def _boxes(scene: Scene, missing: int | None, random: Random) -> list[tuple[list[float], int, int]]:
    """Return (box, kind, colour) of every object and, if one of three random boxes is free, of an empty box.

    The boxes of objects are displaced a little. The erased object `missing` has the kind NONE.
    """
    boxes = []
    for index, thing in enumerate(scene.things):
        answer = (ALL_KINDS.index(thing.kind), list(COLOURS).index(thing.colour))
        boxes.append((_jittered(thing.box, random), *(answer if index != missing else (NONE, IGNORED))))
    room = [box for box in (_anywhere(random) for _ in range(3)) if not _touches(box, scene)]
    return boxes + [(box, NONE, IGNORED) for box in room[:1]]


def _labels(scene: Scene, missing: int | None) -> dict[str, int]:
    """Return the answers to the questions of WHOLE about a scene without its object `missing`."""
    left = [thing for index, thing in enumerate(scene.things) if index != missing]
    single = left[0] if len(left) == 1 else None
    return {
        "kind": ALL_KINDS.index(single.kind) if single else IGNORED,
        "colour": list(COLOURS).index(single.colour) if single else IGNORED,
        "style": ALL_STYLES.index(scene.style),
        "background": list(BACKGROUNDS).index(scene.background.colour),
        "ground": GROUNDS.index(scene.background.ground),
        "place": PLACES.index(single.place) if single else IGNORED,
    }


def _cells(scenes: Sequence[Scene], erased: Sequence[int | None]) -> dict[str, Tensor]:
    """Label the cells by kind and colour: near an object's centre as the object, far from all as NONE, in between IGNORED."""
    kinds = torch.full((len(scenes), CELLS, CELLS), NONE)
    colours = torch.full((len(scenes), CELLS, CELLS), IGNORED)
    centres = (torch.arange(CELLS) + 0.5) * (SIDE / CELLS)
    for row, (scene, missing) in enumerate(zip(scenes, erased, strict=True)):
        for index, thing in enumerate(scene.things):
            if index == missing:
                continue
            right, down = ((centres - (thing.box[a] + thing.box[a + 2]) / 2).abs() / thing.size for a in (0, 1))
            far = torch.maximum(down[:, None], right[None])
            kinds[row][(far >= 0.2) & (far < 0.35)] = IGNORED
            kinds[row][far < 0.2] = ALL_KINDS.index(thing.kind)
            colours[row][far < 0.2] = list(COLOURS).index(thing.colour)
    return {"kind": kinds, "colour": colours}


def _jittered(box: Box, random: Random) -> list[float]:
    """Return a box moved by up to an eighth of its size, scaled by 0.9 to 1.4, and cut at the image's edges."""
    size = box[2] - box[0]
    centres = [(box[axis] + box[axis + 2]) / 2 + size * random.uniform(-0.125, 0.125) for axis in (0, 1)]
    halves = [size / 2 * random.uniform(0.9, 1.4) for _ in range(2)]
    corners = [
        *(c - h for c, h in zip(centres, halves, strict=True)),
        *(c + h for c, h in zip(centres, halves, strict=True)),
    ]
    return [min(float(SIDE), max(0.0, corner)) for corner in corners]


def _anywhere(random: Random) -> list[float]:
    size = random.uniform(12, 36)
    left, top = random.uniform(0, SIDE - size), random.uniform(0, SIDE - size)
    return [left, top, left + size, top + size]


def _touches(box: Sequence[float], scene: Scene) -> bool:
    """Return whether a box overlaps the box of an object by more than two pixels along both axes."""
    return any(
        min(box[2], thing.box[2]) - max(box[0], thing.box[0]) > 2
        and min(box[3], thing.box[3]) - max(box[1], thing.box[1]) > 2
        for thing in scene.things
    )


# ---------------------------------------------------------------- images and loss


def worsen(x: Tensor, draws: Draws) -> Tensor:
    """Return the images [N,3,64,64] in -1..1 with flaws of generated images: bent, softened, of other contrast and tint, noisy."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * draws.uniform()[:, None, None, None]

    x = bend(x, draws, between(0, 1.3))
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, between(0, 1).square())
    coarse = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = torch.where(between(0, 1) < 0.2, torch.lerp(x, coarse, between(0.3, 0.9)), x)
    grey = x.mean(1, keepdim=True)
    x = (grey + between(0.8, 1.15) * (x - grey)) * between(0.85, 1.1) + 0.05 * draws.normal(3, 1, 1)
    x = x + between(0, 0.09) * draws.normal(3, SIDE, SIDE)
    return x.clamp(-1, 1)


def bend(x: Tensor, draws: Draws, strength: Tensor) -> Tensor:
    """Distort images [N,3,64,64]: every point moves by about `strength` pixels, neighbours move alike."""
    field = F.interpolate(draws.normal(2, 9, 9), size=(SIDE, SIDE), mode="bicubic", align_corners=True)
    axis = (torch.arange(SIDE, device=x.device) + 0.5) * (2 / SIDE) - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    shift = (field * strength * (2 / SIDE)).permute(0, 2, 3, 1)
    return F.grid_sample(x, grid + shift, padding_mode="border", align_corners=False)


def loss_of(network: SceneNetwork, x: Tensor, truth: Truth) -> Tensor:
    """Return the sum of all questions' mean losses. Cells with an object are few, so cells with and without one have a mean each."""
    features = network.features(x)
    whole, cells = network.classify(features)
    boxed = network.classify_boxes(features, truth.boxes.to(x), truth.rows.to(x.device))
    kinds = truth.cells["kind"]
    objects = torch.where(kinds == NONE, IGNORED, kinds)
    empty = torch.where(kinds == NONE, NONE, IGNORED)
    around = _loss(cells, truth.cells | {"kind": objects}) + _loss({"kind": cells["kind"]}, {"kind": empty})
    return _loss(whole, truth.whole) + _loss(boxed, truth.boxed) + around


def _loss(logits: Logits, labels: dict[str, Tensor]) -> Tensor:
    total = torch.zeros((), device=next(iter(logits.values())).device)
    for question, logit in logits.items():
        label = labels[question].to(total.device)
        if (label != IGNORED).any():
            total = total + F.cross_entropy(logit.float(), label, ignore_index=IGNORED)
    return total


def make_batch(seed: int, step: int, count: int, share: float, device: torch.device) -> tuple[Tensor, Truth]:
    """Return new images [count,3,64,64] in -1..1, a `share` of them with an object painted over, and their labels."""
    rendered = render_batch([derived_seed(seed, step, index) for index in range(count)], ANY_PAIR)
    random = Random(derived_seed(seed, step))
    erased = [random.randrange(len(s.things)) if random.random() < share else None for s in rendered.scenes]
    truth = truth_of(rendered.scenes, erased, random)
    x = to_float(as_tensor(rendered.images).to(device))
    return erase(x, truth.erased.to(device), truth.which.to(device)), truth
