"""The judge's labels of a scene: of the whole image, of cells and of boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from miniature.judge_model import CELLS, NONE, WHOLE
from miniature.scenery.scenes import ALL_KINDS, ALL_STYLES, BACKGROUNDS, COLOURS, GROUNDS, PLACES, SIDE, Box, Scene

IGNORED = -100  # label of a question that has no answer here


@dataclass(frozen=True)
class Truth:
    """Labels of N images and M boxes; IGNORED where a question has no answer."""

    whole: dict[str, Tensor]  # [N] long
    cells: dict[str, Tensor]  # [N,16,16] long
    boxes: Tensor  # [M,4] float, pixels
    rows: Tensor  # [M], the image of each box
    boxed: dict[str, Tensor]  # [M] long
    erased: Tensor  # [N,4] float: the box that is painted over ..
    which: Tensor  # [N] bool: .. if any


def truth_of(scenes: Sequence[Scene], erased: Sequence[int | None], random: Random) -> Truth:
    """Return the labels of these scenes, in each of which object `erased` is painted over; boxes are a little off."""
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
    """Return (box, kind, colour) of every object, and of one empty box where three tries find room for it."""
    boxes = []
    for index, thing in enumerate(scene.things):
        answer = (ALL_KINDS.index(thing.kind), list(COLOURS).index(thing.colour))
        boxes.append((_jittered(thing.box, random), *(answer if index != missing else (NONE, IGNORED))))
    room = [box for box in (_anywhere(random) for _ in range(3)) if not _touches(box, scene)]
    return boxes + [(box, NONE, IGNORED) for box in room[:1]]


def _labels(scene: Scene, missing: int | None) -> dict[str, int]:
    """Return the answers to the questions of WHOLE."""
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
    """Label the cells: those near an object's centre are its, those farther away are empty, those between ignored."""
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
    """Move a box by up to an eighth of its size, and scale it by 0.9 to 1.4."""
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
    """Return whether a box reaches more than two pixels into that of an object."""
    return any(
        min(box[2], thing.box[2]) - max(box[0], thing.box[0]) > 2
        and min(box[3], thing.box[3]) - max(box[1], thing.box[1]) > 2
        for thing in scene.things
    )
