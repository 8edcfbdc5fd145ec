"""The outlines of the world's objects as signed distance functions (negative inside), and sprites made of them.

Coordinates: x to the right, y down, every outline fills the square -1 .. 1. Distances to segments and circles are exact, after
I. Quilez, "2D distance functions". An outline is one distance per part: body, dark, light.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Point = tuple[float, float]

MARGIN = 6  # pixels around a sprite's box, for contours and shadows
SOFT = 1.0  # width in pixels of an antialiased edge


# ---------------------------------------------------------------- distances


def circle(p: Array, x: float, y: float, radius: float) -> Array:
    """Return the signed distances of points p [2,...] to a disc."""
    distance: Array = np.hypot(p[0] - x, p[1] - y) - np.float32(radius)
    return distance


def stroke(p: Array, points: Sequence[Point], radius: float) -> Array:
    """Return the signed distances of points p [2,...] to a line through `points`, drawn with a round pen of this radius."""
    nearest: Array = np.minimum.reduce([_segment(p, a, b) for a, b in zip(points, points[1:], strict=False)])
    return nearest - np.float32(radius)


def _segment(p: Array, a: Point, b: Point) -> Array:
    x, y, u, v = p[0] - a[0], p[1] - a[1], b[0] - a[0], b[1] - a[1]
    along = np.clip((x * u + y * v) / max(u * u + v * v, 1e-9), 0, 1)
    distance: Array = np.hypot(x - along * u, y - along * v)
    return distance


def polygon(p: Array, points: Sequence[Point]) -> Array:
    """Return the signed distances of points p [2,...] to a filled polygon (even-odd rule)."""
    closed = [*points, points[0]]
    inside = np.zeros(p.shape[1:], bool)
    for (ax, ay), (bx, by) in zip(closed, closed[1:], strict=False):
        if ay != by:
            inside ^= ((p[1] < ay) != (p[1] < by)) & (p[0] < (p[1] - ay) * ((bx - ax) / (by - ay)) + ax)
    edge = stroke(p, closed, 0)
    return np.where(inside, -edge, edge)


def bar(p: Array, left: float, top: float, right: float, bottom: float) -> Array:
    """Return the signed distances of points p [2,...] to a filled rectangle."""
    return polygon(p, [(left, top), (right, top), (right, bottom), (left, bottom)])


def ellipse(x: float, y: float, wide: float, high: float, start: float = 0, end: float = 360) -> list[Point]:
    """Return 21 points on an ellipse, or a part of it, with half axes `wide` and `high`; angles in degrees clockwise from the right."""
    turns = [math.radians(start + (end - start) * i / 20) for i in range(21)]
    return [(x + wide * math.cos(t), y + high * math.sin(t)) for t in turns]


def arc(x: float, y: float, radius: float, start: float, end: float) -> list[Point]:
    """Return 21 points on a part of a circle; angles as in `ellipse`."""
    return ellipse(x, y, radius, radius, start, end)


# ---------------------------------------------------------------- outlines: {"body": .., "dark": .., "light": ..}

Parts = dict[str, Array]
PEN = 0.2  # radius of a digit's stroke


def three(p: Array) -> Parts:
    upper, lower = arc(0, -0.4, 0.4, -165, 88), arc(0, 0.4, 0.42, -88, 165)
    return {"body": np.minimum(stroke(p, upper, PEN), stroke(p, lower, PEN))}


def four(p: Array) -> Parts:
    return {"body": stroke(p, [(0.28, 0.8), (0.28, -0.8), (-0.6, 0.3), (0.66, 0.3)], PEN)}


def seven(p: Array) -> Parts:
    return {"body": stroke(p, [(-0.58, -0.78), (0.58, -0.78), (-0.1, 0.8)], PEN)}


def square(p: Array) -> Parts:
    return {"body": bar(p, -0.84, -0.84, 0.84, 0.84)}


def triangle(p: Array) -> Parts:
    return {"body": polygon(p, [(0, -0.9), (0.98, 0.8), (-0.98, 0.8)])}


def star(p: Array) -> Parts:
    turns = [math.radians(-90 + 36 * i) for i in range(10)]
    reach = [1.0 if i % 2 == 0 else 0.42 for i in range(10)]
    return {"body": polygon(p, [(r * math.cos(t), 0.06 + r * math.sin(t)) for r, t in zip(reach, turns, strict=True)])}


def heart(p: Array) -> Parts:
    """Return the signed distances of points p to a heart, the well-known curve of cosines."""
    points = []
    for i in range(48):
        t = 2 * math.pi * i / 48
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3 / 17, -(y + 2.5) / 16))
    return {"body": polygon(p, points)}


def ring(p: Array) -> Parts:
    """Return the signed distances of points p to a circle with a wide hole."""
    return {"body": np.abs(circle(p, 0, 0, 0.7)) - np.float32(0.26)}


def cross(p: Array) -> Parts:
    """Return the signed distances of points p to an upright cross of four equal arms."""
    return {"body": np.minimum(bar(p, -0.3, -0.95, 0.3, 0.95), bar(p, -0.95, -0.3, 0.95, 0.3))}


def house(p: Array) -> Parts:
    """Return the signed distances of points p to a house: wide roof, chimney, dark door and light window."""
    walls, roof = bar(p, -0.7, -0.1, 0.7, 0.95), polygon(p, [(0, -0.98), (1, 0.02), (-1, 0.02)])
    chimney = bar(p, 0.42, -0.95, 0.7, -0.3)
    door, window = bar(p, -0.42, 0.3, -0.04, 0.95), bar(p, 0.16, 0.28, 0.5, 0.62)
    return {"body": np.minimum(np.minimum(walls, roof), chimney), "dark": door, "light": window}


def tree(p: Array) -> Parts:
    """Return the signed distances of points p to a fir: three tiers and a dark trunk."""
    tiers = [(-0.98, -0.3, 0.5), (-0.6, 0.16, 0.72), (-0.2, 0.64, 0.95)]
    crown = np.minimum.reduce([polygon(p, [(0, top), (w, low), (-w, low)]) for top, low, w in tiers])
    trunk = bar(p, -0.18, 0.6, 0.18, 0.98)
    return {"body": np.minimum(crown, trunk), "dark": np.maximum(trunk, -crown)}


def moon(p: Array) -> Parts:
    """Return the signed distances of points p to a crescent, open to the right."""
    outer, inner = arc(0.14, 0, 0.94, 47, 295), arc(0.66, -0.08, 0.78, 261, 81)  # angles at which the two circles meet
    return {"body": polygon(p, outer + inner)}


def key(p: Array) -> Parts:
    """Return the signed distances of points p to a key that lies aslant: a ring, a shaft and two teeth."""
    s = np.float32(math.sqrt(0.5))
    q = np.stack([s * (p[0] - p[1]), s * (p[0] + p[1])])  # coordinates in which the shaft runs along y
    head = np.abs(circle(q, 0, -0.6, 0.4)) - np.float32(0.17)
    shaft, teeth = bar(q, -0.13, -0.3, 0.13, 1.02), [bar(q, 0, 0.78, 0.4, 1.02), bar(q, 0, 0.36, 0.36, 0.58)]
    return {"body": np.minimum.reduce([head, shaft, *teeth])}


def fish(p: Array) -> Parts:
    """Return the signed distances of points p to a fish that swims to the left: lens, tail, fin, dark eye."""
    body = np.maximum(circle(p, -0.1, 0.56, 1.05), circle(p, -0.1, -0.56, 1.05))
    tail = polygon(p, [(0.45, 0), (0.98, -0.62), (0.82, 0), (0.98, 0.62)])
    fin = polygon(p, [(-0.4, -0.38), (0.2, -0.84), (0.32, -0.3)])
    return {"body": np.minimum.reduce([body, tail, fin]), "dark": circle(p, -0.6, -0.08, 0.13)}


def mushroom(p: Array) -> Parts:
    """Return the signed distances of points p to a mushroom: a round cap with light spots on a light stem."""
    cap = polygon(p, ellipse(0, 0.12, 0.97, 1.05, -180, 0))
    stem = polygon(p, [(-0.26, 0.05), (0.26, 0.05), (0.36, 0.95), (-0.36, 0.95)])
    spots = [circle(p, -0.42, -0.28, 0.17), circle(p, 0.1, -0.52, 0.2), circle(p, 0.52, -0.14, 0.16)]
    return {"body": np.minimum(cap, stem), "light": np.minimum.reduce([*spots, np.maximum(stem, -cap)])}


def cup(p: Array) -> Parts:
    """Return the signed distances of points p to a mug: tapered body, handle on the right, dark opening."""
    body = polygon(p, [(-0.95, -0.62), (0.4, -0.62), (0.28, 0.85), (-0.83, 0.85)])
    handle = np.maximum(np.abs(circle(p, 0.42, 0.02, 0.42)) - np.float32(0.14), np.float32(0.2) - p[0])
    rim, hole = polygon(p, ellipse(-0.275, -0.62, 0.675, 0.28)), polygon(p, ellipse(-0.275, -0.62, 0.45, 0.17))
    return {"body": np.minimum.reduce([body, handle, rim]), "dark": hole}


OUTLINES: dict[str, Callable[[Array], Parts]] = {
    outline.__name__: outline
    for outline in (three, four, seven, square, triangle, star, heart, ring, cross, house, tree, moon, key, fish, mushroom, cup)
}  # fmt: skip


# ---------------------------------------------------------------- sprites


@dataclass(frozen=True)
class Sprite:
    """One object at one size: arrays [size + 2 MARGIN, size + 2 MARGIN], pixels of the image."""

    distance: Array  # pixels to the outline, negative inside
    alpha: Array  # 0..1, how much of the pixel is object
    gain: Array  # the object's colour * gain + lift is the pixel's colour: parts are darker or lighter
    lift: Array
    bevel: Array  # -1 (edge to the lower right) .. 1 (edge to the upper left), 0 on flat parts


def coverage(distance: Array) -> Array:
    """Return the share of each pixel that is inside an outline, 0..1, from its signed distance in pixels."""
    inside: Array = np.clip(np.float32(0.5) - distance / np.float32(SOFT), 0, 1)
    return inside


@lru_cache(maxsize=4096)
def sprite(kind: str, size: int, angle: int, mirrored: bool) -> Sprite:
    """Return the sprite of `kind` in a box of `size` pixels, turned clockwise by `angle` degrees; raise KeyError for an unknown kind."""
    axis = (np.arange(size + 2 * MARGIN, dtype=np.float32) + np.float32(0.5 - MARGIN - size / 2)) * np.float32(2 / size)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    room = np.float32(1 + 0.6 * abs(s))  # a turned outline is drawn smaller, to stay in its box
    turned = np.stack([c * x + s * y, c * y - s * x]).astype(np.float32) * room
    if mirrored:
        turned[0] = -turned[0]
    pixels = np.float32(size / 2) / room
    parts = {name: (d * pixels).astype(np.float32) for name, d in OUTLINES[kind](turned).items()}
    body = parts["body"]
    dark, light = (coverage(parts[name]) if name in parts else np.zeros_like(body) for name in ("dark", "light"))
    gain, lift = ((1 - 0.6 * dark) * (1 - 0.6 * light)).astype(np.float32), (255 * 0.6 * light).astype(np.float32)
    return Sprite(body, coverage(body), gain, lift, _bevel(body))


def _bevel(distance: Array) -> Array:
    down, right = np.gradient(distance)
    slope = (-down - right) / np.float32(math.sqrt(2))  # the outline's normal against light from the upper left
    rim: Array = np.clip(1 - np.abs(distance + 1.6) / np.float32(1.8), 0, 1)
    return (slope * rim).astype(np.float32)
