"""Scenes, drawn from a seed: what an image of the world shows. One to three objects in boxes, a background and a style.

A kind is a sort of object, such as a star. A ground is the pattern of a background. Held-out kinds and styles are in training images,
but no caption names them. Held-out (colour, kind) pairs are in no training image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal

SIDE = 64  # pixels, height and width of every image

KINDS = ("three", "four", "seven", "square", "triangle", "star", "heart", "ring", "cross", "house", "tree", "moon")
HELD_OUT_KINDS = ("key", "fish", "mushroom", "cup")  # in training images, but no caption names them
ALL_KINDS = KINDS + HELD_OUT_KINDS
STYLES = ("flat", "outline", "hatched", "dots", "mosaic", "watercolour")
HELD_OUT_STYLES = ("relief", "ripple")  # in training images, but no caption names them
ALL_STYLES = STYLES + HELD_OUT_STYLES
GROUNDS = ("plain", "gradient", "textured")
PLACES = ("left", "right", "above", "below", "centre")

COLOURS = {
    "red": (214, 30, 36),
    "orange": (250, 136, 10),
    "yellow": (252, 222, 40),
    "green": (30, 158, 62),
    "blue": (34, 78, 222),
    "purple": (148, 40, 204),
    "pink": (252, 128, 190),
    "white": (252, 252, 252),
}
BACKGROUNDS = {
    "red": (176, 46, 50),
    "yellow": (236, 208, 100),
    "green": (88, 148, 96),
    "blue": (92, 132, 206),
    "purple": (126, 84, 158),
    "brown": (106, 70, 44),
    "grey": (134, 136, 140),
    "white": (240, 240, 236),
}
CONTRAST = 132.0  # least distance of an object's colour to its background's, see `distance`

# One colour that each named kind never has in training images
HELD_OUT_PAIRS = tuple((tuple(COLOURS)[(3 * i + 1) % len(COLOURS)], kind) for i, kind in enumerate(KINDS))
Pairs = Literal["trained", "held_out", "any"]

MIRRORED = {"moon"}  # may face left or right; other kinds are symmetric, or face one way as digits do
ANGLES = (-8, -4, 0, 4, 8)  # degrees clockwise
SIZES = {1: (24, 44), 2: (18, 28), 3: (18, 18)}  # least and largest side in pixels (even), by number of objects
SHARES = (0.6, 0.28, 0.12)  # of images with one, two, three objects
GROUND_SHARE = (0.5, 0.25, 0.25)  # of GROUNDS
TINT = 10  # grey levels by which each channel of a drawn colour differs at most from its value above
OFF_CENTRE = 6  # an object is in the centre if its centre is fewer pixels than this from the image's

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom exclusive
Tint = tuple[int, int, int]


@dataclass(frozen=True)
class Thing:
    """One object and the square box that it fills."""

    kind: str
    colour: str
    box: Box
    angle: int = 0
    mirrored: bool = False
    tint: Tint = (0, 0, 0)

    @property
    def size(self) -> int:
        """The box's side in pixels."""
        return self.box[2] - self.box[0]

    @property
    def place(self) -> str:
        """Where it lies: the direction in which its centre is farthest from the image's, or "centre" below 6 pixels."""
        right, down = (self.box[0] + self.box[2] - SIDE) / 2, (self.box[1] + self.box[3] - SIDE) / 2
        if max(abs(right), abs(down)) < OFF_CENTRE:
            return "centre"
        if abs(right) >= abs(down):
            return "right" if right > 0 else "left"
        return "below" if down > 0 else "above"


@dataclass(frozen=True)
class Background:
    """The background's colour and ground."""

    colour: str
    ground: str = "plain"
    tint: Tint = (0, 0, 0)


@dataclass(frozen=True)
class Scene:
    """Everything about an image; `noise_seed` chooses the variant of the style's pattern and of the background's ground."""

    things: tuple[Thing, ...]
    background: Background
    style: str = "flat"
    noise_seed: int = 0


def distance(first: Sequence[int], second: Sequence[int]) -> float:
    """Return how different two colours (RGB, 0..255) look, by the "redmean" approximation; 0 = equal."""
    mean = (first[0] + second[0]) / 2
    red, green, blue = (a - b for a, b in zip(first, second, strict=True))
    return float(((2 + mean / 256) * red**2 + 4 * green**2 + (2 + (255 - mean) / 256) * blue**2) ** 0.5) / 1.5


@cache
def fits(colour: str, background: str) -> bool:
    """Return whether an object of this colour stands out from that background."""
    return colour != background and distance(COLOURS[colour], BACKGROUNDS[background]) >= CONTRAST


# ---------------------------------------------------------------- drawing a scene


class StableRandom:
    """Random choices from one seed (0 or more), made of `Random.random`: the one sequence that Python promises never to change."""

    def __init__(self, seed: int):
        self.uniform = Random(seed).random

    def below(self, count: int) -> int:
        """Draw an integer in 0 .. count - 1."""
        return int(self.uniform() * count)

    def between(self, low: int, high: int) -> int:
        """Draw an integer in low .. high, both included; `low` where the range is empty."""
        return low + self.below(max(1, high - low + 1))

    def pick(self, options: Sequence[str]) -> str:
        """Draw one of the options."""
        return options[self.below(len(options))]

    def weighted(self, shares: Sequence[float]) -> int:
        """Draw an index, with probabilities in proportion to `shares`."""
        left = self.uniform() * sum(shares)
        for index, share in enumerate(shares):
            left -= share
            if left < 0:
                return index
        return len(shares) - 1

    def chance(self, share: float) -> bool:
        """Return True with probability `share`."""
        return self.uniform() < share


@dataclass(frozen=True)
class SceneSpec:
    """What a scene must hold; a field that is None is drawn at random.

    `kinds`, `colours` and `boxes` have one entry per object, in the same order.
    """

    count: int | None = None
    kinds: tuple[str, ...] | None = None
    colours: tuple[str, ...] | None = None
    boxes: tuple[Box, ...] | None = None
    place: str | None = None  # of a single object
    style: str | None = None
    background: str | None = None
    ground: str | None = None
    pairs: Pairs = "trained"  # (colour, kind) pairs to draw from; a pair that is fixed is always taken
    among: tuple[str, ...] = ALL_KINDS  # kinds to draw from
    shares: tuple[float, float, float] = SHARES  # of one, two, three objects, if no field fixes the number
    min_size: int = SIZES[1][0]  # smallest box of a single object, in pixels

    def __post_init__(self) -> None:
        """Raise ValueError for unknown words, fields that contradict each other, and unusable boxes."""
        for word, vocabulary in self._words():
            if word is not None and word not in vocabulary:
                raise ValueError(f"{word} is not one of {', '.join(vocabulary)}")
        lengths = {len(each) for each in (self.kinds, self.colours, self.boxes) if each is not None}
        if len(lengths | ({self.count} if self.count else set())) > 1:
            raise ValueError("count, kinds, colours and boxes must agree in length")
        if not all(1 <= length <= 3 for length in lengths | {self.count or 1}):
            raise ValueError("a picture holds one to three objects")
        if self.place and lengths | {self.count or 1} != {1}:
            raise ValueError("a place can be fixed for a single object only; give boxes for several")
        if self.background in (self.colours or ()):
            raise ValueError(f"a {self.background} object on a {self.background} background can't be seen")
        for box in self.boxes or ():
            if min(box) < 0 or max(box) > SIDE or min_side(box) < 12:
                raise ValueError(f"box {box} must lie within 0 .. {SIDE} and measure 12 pixels or more")

    def _words(self) -> list[tuple[str | None, Sequence[str]]]:
        many: list[tuple[str | None, Sequence[str]]] = [
            (kind, ALL_KINDS) for kind in (*(self.kinds or ()), *self.among)
        ]
        many += [(colour, tuple(COLOURS)) for colour in self.colours or ()]
        single = [(self.style, ALL_STYLES), (self.background, tuple(BACKGROUNDS)), (self.ground, GROUNDS)]
        return [*many, *single, (self.place, PLACES)]


FREE = SceneSpec()
ANY_PAIR = SceneSpec(pairs="any")  # the judge and the autoencoder learn the held-out pairs as well


def min_side(box: Box) -> int:
    """Return the length of the box's shorter side in pixels."""
    return min(box[2] - box[0], box[3] - box[1])


def sample_scene(seed: int, spec: SceneSpec = FREE) -> Scene:
    """Draw the scene of this seed (0 or more); raise ValueError if none fits `spec`.

    Drawn kinds and colours differ within a scene, and drawn colours contrast with the background.
    """
    random = StableRandom(seed)
    fixed = spec.kinds or spec.colours or spec.boxes or ((spec.place,) if spec.place else ())
    by_shares = random.weighted(spec.shares) + 1  # also drawn if unused, so that no other draw changes
    count = spec.count or len(fixed) or by_shares
    kinds = spec.kinds or _kinds(random, spec, count)
    background, colours = _colours(random, spec, kinds)
    boxes = [_square(box) for box in spec.boxes] if spec.boxes else _boxes(random, count, spec)
    things = tuple(
        Thing(
            kind, colour, box, ANGLES[random.below(len(ANGLES))], kind in MIRRORED and random.chance(0.5), _tint(random)
        )
        for kind, colour, box in zip(kinds, colours, boxes, strict=True)
    )
    ground, style = GROUNDS[random.weighted(GROUND_SHARE)], random.pick(ALL_STYLES)
    laid = Background(background, spec.ground or ground, _tint(random))
    return Scene(things, laid, spec.style or style, random.below(2**31))


def _kinds(random: StableRandom, spec: SceneSpec, count: int) -> tuple[str, ...]:
    """Draw different kinds. If the spec fixes colours, each kind must be allowed in its colour."""
    kinds: list[str] = []
    for index in range(count):
        free = [k for k in spec.among if k not in kinds]
        if spec.colours:
            free = [k for k in free if allowed(spec.colours[index], k, spec.pairs)]
        if not free:
            raise ValueError(f"{count} objects of different kinds can't be drawn from {', '.join(spec.among)}")
        kinds.append(random.pick(free))
    return tuple(kinds)


def _tint(random: StableRandom) -> Tint:
    return random.between(-TINT, TINT), random.between(-TINT, TINT), random.between(-TINT, TINT)


def _colours(random: StableRandom, spec: SceneSpec, kinds: Sequence[str]) -> tuple[str, list[str]]:
    """Draw a background and, for each kind, a colour that contrasts with it.

    If the spec fixes the colours, the background is drawn to contrast with them where that is possible.
    """
    if spec.colours:
        contrast = [b for b in BACKGROUNDS if all(fits(c, b) for c in spec.colours)]
        contrast = contrast or [b for b in BACKGROUNDS if b not in spec.colours]
        return spec.background or random.pick(contrast), list(spec.colours)
    options = [spec.background] if spec.background else list(BACKGROUNDS)
    while options:
        background = options.pop(random.below(len(options)))
        colours: list[str] = []
        for kind in kinds:
            free = [c for c in COLOURS if c not in colours and fits(c, background) and allowed(c, kind, spec.pairs)]
            if not free:
                break
            colours.append(random.pick(free))
        else:
            return background, colours
    raise ValueError(f"no {spec.pairs} colours are left for {', '.join(kinds)}")


def allowed(colour: str, kind: str, pairs: Pairs) -> bool:
    """Return whether (colour, kind) is among `pairs`: the trained ones, the held-out ones, or any."""
    return pairs == "any" or ((colour, kind) in HELD_OUT_PAIRS) == (pairs == "held_out")


def _square(box: Box) -> Box:
    """Return the largest even square in the middle of a box."""
    size = min_side(box) // 2 * 2
    left, top = box[0] + (box[2] - box[0] - size) // 2, box[1] + (box[3] - box[1] - size) // 2
    return left, top, left + size, top + size


# ---------------------------------------------------------------- places


def _boxes(random: StableRandom, count: int, spec: SceneSpec) -> list[Box]:
    """Draw boxes that don't overlap: one at the spec's place (None = any), or a row or column of several."""
    least, most = (spec.min_size if count == 1 else SIZES[count][0]), SIZES[count][1]
    sizes = [2 * random.between(least // 2, most // 2) for _ in range(count)]
    if count == 1:
        return [_single(random, sizes[0], spec.place or random.pick(PLACES))]
    return _line(random, sizes, column=random.chance(0.5))


def _single(random: StableRandom, size: int, place: str) -> Box:
    """Draw a box clearly in its place: 8 pixels or more off the image's centre along one axis, at most 4 along the other.

    For "centre" it is at most 3 off along both.
    """
    along, across = random.between(8, (SIDE - size) // 2 - 2), random.between(-4, 4)
    right, down = {
        "left": (-along, across),
        "right": (along, across),
        "above": (across, -along),
        "below": (across, along),
        "centre": (across * 3 // 4, random.between(-3, 3)),
    }[place]
    left, top = (SIDE - size) // 2 + right, (SIDE - size) // 2 + down
    return left, top, left + size, top + size


def _line(random: StableRandom, sizes: Sequence[int], column: bool) -> list[Box]:
    """Draw boxes in a row or column: each in one of equal slots, up to 5 pixels off the middle of the other axis."""
    slot, boxes = SIDE / len(sizes), []
    for index, size in enumerate(sizes):
        room = int(slot) - size - 2
        start = int(index * slot) + 1 + random.between(0, room)
        aside = (SIDE - size) // 2 + random.between(-5, 5)
        left, top = (aside, start) if column else (start, aside)
        boxes.append((left, top, left + size, top + size))
    return boxes
