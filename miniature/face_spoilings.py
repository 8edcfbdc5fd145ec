"""Ways to spoil faces of the face world, which the test of valid faces must refuse.

Each renders faces from their factors [N,14], spoils them with random numbers, and returns images [N,3,64,64] in -1..1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from miniature.face_world import COLUMN, SIDE, FaceRenderer
from miniature.judge_model import erase
from miniature.judge_training import bend
from runtime.images import to_float
from training.draws import Draws

EYES, MOUTH = ((26.2, 35.0), (37.8, 35.0)), (32.0, 45.5)  # centres in pixels of a face that looks ahead
EYE, LIPS = (5.0, 4.5), (7.0, 4.0)  # half of the width and height of an eye, and of the mouth
TURN = 2.1  # pixels by which eyes and mouth move in a turned face

Spoiling = Callable[[FaceRenderer, Tensor, Draws], Tensor]


def join_left_and_right(renderer: FaceRenderer, rows: Tensor, draws: Draws) -> Tensor:
    """Join the left half of each face and the right half of the previous face in the batch."""
    x = to_float(renderer(rows))
    return torch.cat([x[..., : SIDE // 2], x.roll(1, 0)[..., SIDE // 2 :]], 3)


def join_top_and_bottom(renderer: FaceRenderer, rows: Tensor, draws: Draws) -> Tensor:
    """Join the upper half of each face and the lower half of the previous face in the batch."""
    x = to_float(renderer(rows))
    return torch.cat([x[:, :, : SIDE // 2], x.roll(1, 0)[:, :, SIDE // 2 :]], 2)


def erase_eye(renderer: FaceRenderer, rows: Tensor, draws: Draws) -> Tensor:
    """Paint one eye, chosen at random, over with the mean colour around it."""
    eyes = torch.tensor(EYES, device=rows.device)[(draws.uniform() < 0.5).long().to(rows.device)]
    return erase(to_float(renderer(rows)), _boxes(rows, eyes, EYE))


def erase_mouth(renderer: FaceRenderer, rows: Tensor, draws: Draws) -> Tensor:
    """Return the faces of `rows` [N,14] with the mouth painted over in the mean colour around it: [N,3,64,64] in -1..1."""
    mouths = torch.tensor(MOUTH, device=rows.device).expand(len(rows), 2)
    return erase(to_float(renderer(rows)), _boxes(rows, mouths, LIPS))


def warp(renderer: FaceRenderer, rows: Tensor, draws: Draws) -> Tensor:
    """Warp the face smoothly, by about two pixels."""
    x = to_float(renderer(rows))
    return bend(x, draws, x.new_full((len(x), 1, 1, 1), 2.0))


def blur(renderer: FaceRenderer, rows: Tensor, draws: Draws) -> Tensor:
    """Average over 5 x 5 pixels."""
    return F.avg_pool2d(F.pad(to_float(renderer(rows)), (2, 2, 2, 2), mode="replicate"), 5, 1)


def exchange_colours(renderer: FaceRenderer, rows: Tensor, draws: Draws) -> Tensor:
    """Give the skin the hair's colour and the hair the skin's."""
    colours = renderer.colours_of(rows)
    colours["skin"], colours["hair colour"] = colours["hair colour"], colours["skin"]
    return to_float(renderer.compose(rows, colours))


SPOILINGS: dict[str, Spoiling] = {
    "left and right of two faces": join_left_and_right,
    "top and bottom of two faces": join_top_and_bottom,
    "an eye erased": erase_eye,
    "the mouth erased": erase_mouth,
    "warped": warp,
    "blurred": blur,
    "skin and hair colours exchanged": exchange_colours,
}


def _boxes(rows: Tensor, centres: Tensor, half: tuple[float, float]) -> Tensor:
    """Return boxes [N,4] (left, top, right, bottom) around points of N faces.

    `centres` [N,2] are the points in faces that look straight ahead. They move by the turn of each face, one of its factors in `rows`.
    """
    moved = centres.clone()
    moved[:, 0] += TURN * (rows[:, COLUMN["turn"]].float() - 1)
    reach = torch.tensor(half, device=rows.device)
    return torch.cat([moved - reach, moved + reach], 1)
