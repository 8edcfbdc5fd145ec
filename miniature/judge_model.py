"""The judge: a network that classifies object, colour, style, background and place, of whole 64x64 images and of boxes in them.

miniature/judge.py is the command that trains and grades it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digits.classifier import Block
from miniature.classifier_files import ClassifierFormat
from miniature.scenery.scenes import ALL_KINDS, ALL_STYLES, BACKGROUNDS, COLOURS, GROUNDS, PLACES, SIDE
from runtime.device import to_channels_last
from runtime.files import ROOT
from runtime.images import to_float

KIND = "miniature judge"
SHIPPED = ROOT / "checkpoints" / "miniature" / "judge.safetensors"
BATCH = 250  # images per forward pass
NONE = len(ALL_KINDS)  # "kind" of a box without an object

# Questions about a whole image, and their possible answers. Kind, colour and place have one if there is a single object
WHOLE = {
    "kind": ALL_KINDS,
    "colour": tuple(COLOURS),
    "style": ALL_STYLES,
    "background": tuple(BACKGROUNDS),
    "ground": GROUNDS,
    "place": PLACES,
}
BOXED = {"kind": (*ALL_KINDS, "none"), "colour": tuple(COLOURS)}  # about a box, and about each cell of the map
FILES = ClassifierFormat(
    KIND,
    {"whole": WHOLE, "boxed": BOXED},
    "judge of the miniature",
    "another vocabulary",
    "python miniature/judge.py train",
)
SCALES = (0.8, 1.0, 1.2)  # half the side of a box, relative to the square root of the area of the object's cells
SURE = 0.8  # a cell counts if P(object) is above this; it and SCALES were set on images of seed 9
SMALLEST = 18  # side of the world's smallest objects in pixels
CELLS = 16  # cells along each side of the map; each is 4x4 pixels
Logits = dict[str, Tensor]


# ---------------------------------------------------------------- the network


@dataclass(frozen=True)
class SceneClassifierConfig:
    """Layout of the network."""

    stem: int = 16
    channels: tuple[int, ...] = (32, 64, 128)  # at 16x16, 8x8, 4x4 positions
    blocks: tuple[int, ...] = (1, 2, 2)
    fused: int = 64  # channels of the 16x16 map
    hidden: int = 160
    crop: int = 5  # positions along each side of a box


class SceneNetwork(nn.Module):
    """Residual features at three resolutions, added up on one 16x16 map (Lin et al. 2017, "Feature Pyramid Networks").

    Three heads classify the whole image, each cell of the map, and boxes cut out of the map.
    """

    def __init__(self, config: SceneClassifierConfig = SceneClassifierConfig()):
        super().__init__()
        self.config, width = config, config.stem
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, padding=1), nn.ReLU())
        self.levels, self.laterals = nn.ModuleList(), nn.ModuleList()
        for channels, blocks in zip(config.channels, config.blocks, strict=True):
            steps = [Block(width if not b else channels, channels, 1 if b else 2) for b in range(blocks)]
            self.levels.append(nn.Sequential(*steps))
            self.laterals.append(nn.Conv2d(channels, config.fused, 1))
            width = channels
        self.norm = nn.BatchNorm2d(config.fused)
        self.gather = nn.Conv2d(config.fused, 2 * config.fused, 1)
        self.cells = nn.Conv2d(2 * config.fused, sum(map(len, BOXED.values())), 1)
        self.whole = _head(4 * config.fused, config.hidden, WHOLE)
        self.boxed = _head(config.fused * config.crop**2, config.hidden, BOXED)

    def features(self, x: Tensor) -> Tensor:
        """Return the feature map [N,fused,16,16] of images [N,3,64,64] in -1..1."""
        h, total = self.stem(x), torch.zeros(())
        for level, lateral in zip(self.levels, self.laterals, strict=True):
            h = level(h)
            part = lateral(h)
            total = total + F.interpolate(part, scale_factor=SIDE / 4 / part.shape[-1], mode="nearest")
        return F.relu(self.norm(total))

    def classify(self, features: Tensor) -> tuple[Logits, Logits]:
        """Return {question: logits [N,answers]} of whole images and {question: logits [N,answers,16,16]} of cells."""
        gathered = F.relu(self.gather(features))
        pooled = torch.cat([gathered.amax((2, 3)), gathered.mean((2, 3))], 1)
        return _split(self.whole(pooled), WHOLE), _split(self.cells(gathered), BOXED)

    def classify_boxes(self, features: Tensor, boxes: Tensor, rows: Tensor) -> Logits:
        """Return {question: logits [M,answers]} of boxes [M,4] (left, top, right, bottom in pixels); `rows` [M] are their images."""
        from torchvision.ops import roi_align  # slow to import

        regions = torch.cat([rows[:, None].to(boxes), boxes], 1)
        cut = roi_align(features, regions, self.config.crop, 0.25, sampling_ratio=2, aligned=True)
        return _split(self.boxed(cut.flatten(1)), BOXED)


def _head(inputs: int, hidden: int, questions: dict[str, tuple[str, ...]]) -> nn.Sequential:
    answers = sum(map(len, questions.values()))
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, answers))


def _split(logits: Tensor, questions: dict[str, tuple[str, ...]]) -> Logits:
    return dict(zip(questions, logits.split([len(answers) for answers in questions.values()], 1), strict=True))


# ---------------------------------------------------------------- the judge


class SceneClassifier(nn.Module):
    """The judge: a frozen network that answers in probabilities, on its device.

    Images are [N,3,64,64] uint8, boxes [N,4] in pixels: left, top, right, bottom.
    """

    def __init__(self, network: SceneNetwork):
        super().__init__()
        self.network = network
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def whole(self, images: Tensor) -> dict[str, Tensor]:
        """Return {question of WHOLE: probabilities [N,answers]}, and probabilities about all objects of an image.

        "present" [N,16]: an object of each kind is there. "paints" [N,8]: an object of each colour is there.
        "pairs" [N,16,8]: an object of each kind and colour is there.
        """
        parts = []
        for chunk in _checked(images).split(BATCH):
            features = self._features(chunk)
            whole, cells = self.network.classify(features)
            answers = {question: x.float().softmax(1) for question, x in whole.items()}
            parts.append(answers | self._present(features, cells))
        return {question: torch.cat([part[question] for part in parts]) for question in parts[0]}

    def _present(self, features: Tensor, cells: Logits) -> dict[str, Tensor]:
        """Return "present", "paints" and "pairs" of `whole`. Each object found is classified in three boxes, of which the surest counts."""
        boxes, rows = _spotted(1 - cells["kind"].float().softmax(1)[:, NONE])
        logits = self.network.classify_boxes(features, boxes.flatten(0, 1), rows.repeat_interleave(boxes.shape[1]))
        kind, colour = (logits[question].float().softmax(1).unflatten(0, boxes.shape[:2]) for question in BOXED)
        kind = kind[..., :NONE]
        surest = kind.amax(2).argmax(1, keepdim=True)[..., None]
        kind, colour = (x.take_along_dim(surest, 1)[:, 0] for x in (kind, colour))
        pairs = {
            "present": kind,
            "paints": kind.sum(1, keepdim=True) * colour,
            "pairs": kind[..., None] * colour[:, None],
        }
        return {name: _most(x, rows, len(features)) for name, x in pairs.items()}

    @torch.inference_mode()
    def boxed(self, images: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """Classify one box per image: probabilities {"kind": [N,17], the last one "none"; "colour": [N,8]}."""
        parts = []
        for chunk, box in zip(_checked(images).split(BATCH), boxes.float().split(BATCH), strict=True):
            rows = torch.arange(len(chunk))
            parts.append(self.network.classify_boxes(self._features(chunk), box.to(self.device), rows.to(self.device)))
        return {question: torch.cat([part[question] for part in parts]).float().softmax(1) for question in BOXED}

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def _features(self, images: Tensor) -> Tensor:
        x = to_float(images.to(self.device))
        return self.network.features(x.contiguous(memory_format=torch.channels_last))

    # ------------------------------------------------ the benchmarks' questions: [N] bool each, on the judge's device

    def agrees(self, images: Tensor, **expected: Sequence[str]) -> Tensor:
        """Return [N] bool: whether the most probable answers are as expected. Keywords: questions of WHOLE, one word per image each."""
        return _agree(self.whole(images), expected, WHOLE)

    def inside(
        self, images: Tensor, boxes: Tensor, kinds: Sequence[str], colours: Sequence[str] | None = None
    ) -> Tensor:
        """Return [N] bool: whether box i of image i holds an object of kind `kinds[i]` and, unless None, colour `colours[i]`."""
        expected = {"kind": kinds} | ({"colour": colours} if colours else {})
        return _agree(self.boxed(images, boxes), expected, BOXED)

    def leaked(
        self, images: Tensor, boxes: Tensor, kinds: Sequence[str], colours: Sequence[str] | None = None
    ) -> Tensor:
        """Return [N] bool: whether `kinds[i]`, or `colours[i]` unless None, is found in image i with box i painted over.

        Other objects that belong in the image must have other kinds and colours.
        """
        x = erase(_checked(images).to(self.device).float(), boxes.to(self.device))
        outside = self.whole(x.round().to(torch.uint8))
        leaks = _answer(outside["present"], kinds, ALL_KINDS) > 0.5
        return leaks | (_answer(outside["paints"], colours, tuple(COLOURS)) > 0.5) if colours else leaks

    def objects(self, images: Tensor) -> list[frozenset[tuple[str, str]]]:
        """Return for each image the set of (kind, colour) of the objects found in it."""
        rows = [(pairs > 0.5).nonzero().tolist() for pairs in self.whole(images)["pairs"]]
        return [frozenset((ALL_KINDS[kind], list(COLOURS)[colour]) for kind, colour in row) for row in rows]


def _spotted(filled: Tensor) -> tuple[Tensor, Tensor]:
    """Find the M objects in N images. Return boxes [M,3,4] of three sizes about each, and the index [M] of the image it is in.

    `filled` [N,16,16] is P(object) per cell. Neighbouring cells above SURE form an object, one cell alone does not. A box has about twice
    the width and height of its object's cells, as in training.
    """
    from scipy import ndimage  # slow to import

    plane = ndimage.generate_binary_structure(2, 1)[None]  # neighbours share a side, within one image
    patches, count = ndimage.label((filled > SURE).cpu().numpy(), np.concatenate([0 * plane, plane, 0 * plane]))
    cells = torch.from_numpy(patches).to(filled.device).long().flatten()  # patch of each cell; 0 = none
    axis = (torch.arange(CELLS, device=filled.device) + 0.5) * (SIDE / CELLS)
    values = torch.stack([filled, filled * axis, filled * axis[:, None]], -1).flatten(0, 2)
    sums = values.new_zeros(count + 1, 3).index_add(0, cells, values)[1:]
    rows = cells.new_zeros(count + 1).scatter(0, cells, torch.arange(len(cells), device=cells.device) // CELLS**2)[1:]
    sums, rows = sums[sums[:, 0] > 1.5], rows[sums[:, 0] > 1.5]
    area, centre = sums[:, :1], sums[:, 1:] / sums[:, :1]
    half = (area.sqrt() * (SIDE / CELLS) * torch.tensor(SCALES, device=filled.device)).clamp(min=SMALLEST / 2)
    corners = (centre[:, None] - half[..., None], centre[:, None] + half[..., None])
    return torch.cat(corners, 2).clamp(0, SIDE), rows


def _most(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return [count,..]: the largest of the values [M,..] of each image, 0 without any; `rows` [M] are the values' images."""
    index = rows.view(-1, *[1] * (values.dim() - 1)).expand_as(values)
    return values.new_zeros(count, *values.shape[1:]).scatter_reduce(0, index, values, "amax")


def _checked(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or images.shape[1:] != (3, SIDE, SIDE):
        raise ValueError(f"the judge takes [N,3,{SIDE},{SIDE}] uint8, not {list(images.shape)} {images.dtype}")
    return images


def _answer(probabilities: Tensor, words: Sequence[str], answers: Sequence[str]) -> Tensor:
    """Return [N]: the probability of `words[i]` for image i."""
    columns = torch.tensor([answers.index(word) for word in words], device=probabilities.device)
    return probabilities.gather(1, columns[:, None])[:, 0]


def _agree(answers: Logits, expected: dict[str, Sequence[str]], questions: dict[str, tuple[str, ...]]) -> Tensor:
    agreed = [_answer(answers[q], words, questions[q]) >= answers[q].amax(1) for q, words in expected.items()]
    return torch.stack(agreed).all(0)


def erase(x: Tensor, boxes: Tensor, which: Tensor | None = None) -> Tensor:
    """Return images [N,3,64,64] float, box i of image i filled with the mean colour around it, one pixel more on each side.

    `which` [N] bool: only in these images; None = in all.
    """
    axis = torch.arange(SIDE, device=x.device) + 0.5
    left, top, right, bottom = (boxes + torch.tensor([-1, -1, 1, 1], device=x.device)).T[:, :, None]
    columns, rows = (axis > left) & (axis < right), (axis > top) & (axis < bottom)
    inside: Tensor = (rows[:, None, :, None] & columns[:, None, None, :]).float()
    if which is not None:
        inside = inside * which[:, None, None, None]
    ring = F.max_pool2d(inside, 5, 1, 2) - inside
    fill = (x * ring).sum((2, 3), keepdim=True) / ring.sum((2, 3), keepdim=True).clamp(min=1)
    return x + inside * (fill - x)


# ---------------------------------------------------------------- files


def save_scene_classifier(path: Path, network: SceneNetwork, origin: dict[str, Any]) -> None:
    """Write one safetensors file: weights, and a JSON header with layout, vocabulary and `origin`, how it was trained."""
    FILES.save(path, network, network.config, origin)


def load_scene_classifier(device: torch.device | str = "cpu", path: Path = SHIPPED) -> SceneClassifier:
    """Return a file's judge (default: the shipped one); raise BadInput for a file of another kind or vocabulary."""
    network = FILES.load(path, lambda layout: SceneNetwork(SceneClassifierConfig(**layout)))
    return SceneClassifier(to_channels_last(network, device))
