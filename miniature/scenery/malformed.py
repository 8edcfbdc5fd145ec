"""Malformed outlines of the held-out kinds, such as a fish without a tail, and blobs. A measure of shape must reject them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from miniature.scenery import shapes
from miniature.scenery.shapes import Array, Parts, bar, circle, ellipse, polygon

Outline = Callable[[Array], Parts]  # points [2,...] -> signed distances to the parts


def cup_with_two_handles(p: Array) -> Parts:
    parts = shapes.cup(p)
    handle = np.maximum(np.abs(circle(p, -0.98, 0.02, 0.42)) - np.float32(0.14), p[0] + np.float32(0.75))
    return {**parts, "body": np.minimum(parts["body"], handle)}


def cup_without_handle(p: Array) -> Parts:
    body = polygon(p, [(-0.95, -0.62), (0.4, -0.62), (0.28, 0.85), (-0.83, 0.85)])
    rim = polygon(p, ellipse(-0.275, -0.62, 0.675, 0.28))
    return {"body": np.minimum(body, rim), "dark": shapes.cup(p)["dark"]}


def _fish_body(p: Array) -> Array:
    body: Array = np.maximum(circle(p, -0.1, 0.56, 1.05), circle(p, -0.1, -0.56, 1.05))
    return body


def fish_without_tail(p: Array) -> Parts:
    fin = polygon(p, [(-0.4, -0.38), (0.2, -0.84), (0.32, -0.3)])
    return {"body": np.minimum(_fish_body(p), fin), "dark": shapes.fish(p)["dark"]}


def fish_without_fin(p: Array) -> Parts:
    tail = polygon(p, [(0.45, 0), (0.98, -0.62), (0.82, 0), (0.98, 0.62)])
    return {"body": np.minimum(_fish_body(p), tail), "dark": shapes.fish(p)["dark"]}


def fish_with_two_fins(p: Array) -> Parts:
    parts = shapes.fish(p)
    fin = polygon(p, [(-0.4, 0.38), (0.2, 0.84), (0.32, 0.3)])
    return {**parts, "body": np.minimum(parts["body"], fin)}


def _along_the_key(p: Array) -> Array:
    s = np.float32(math.sqrt(0.5))
    return np.stack([s * (p[0] - p[1]), s * (p[0] + p[1])])


def key_without_teeth(p: Array) -> Parts:
    q = _along_the_key(p)
    return {"body": np.minimum(np.abs(circle(q, 0, -0.6, 0.4)) - np.float32(0.17), bar(q, -0.13, -0.3, 0.13, 1.02))}


def key_without_hole(p: Array) -> Parts:
    return {"body": np.minimum(shapes.key(p)["body"], circle(_along_the_key(p), 0, -0.6, 0.5))}


def key_that_is_a_ring(p: Array) -> Parts:
    return {"body": np.abs(circle(_along_the_key(p), 0, -0.6, 0.4)) - np.float32(0.17)}


def mushroom_without_stem(p: Array) -> Parts:
    return {"body": polygon(p, ellipse(0, 0.12, 0.97, 1.05, -180, 0)), "light": shapes.mushroom(p)["light"]}


def mushroom_on_two_stems(p: Array) -> Parts:
    cap = polygon(p, ellipse(0, 0.12, 0.97, 1.05, -180, 0))
    return {"body": np.minimum.reduce([cap, bar(p, -0.8, 0.05, -0.5, 0.95), bar(p, 0.5, 0.05, 0.8, 0.95)])}


def blob(seed: int) -> Outline:
    """Return the outline of a smooth random blob."""
    waves = np.random.default_rng(seed).normal(size=(2, 4)) * np.array([0.2, 0.15, 0.1, 0.06])

    def blob(p: Array) -> Parts:
        angle, reach = np.arctan2(p[1], p[0]), np.full(p.shape[1:], 0.7)
        for order, (a, b) in enumerate(waves.T, start=2):
            reach = reach + a * np.cos(order * angle) + b * np.sin(order * angle)
        return {"body": (0.8 * (np.hypot(p[0], p[1]) - reach.clip(0.25, 1))).astype(np.float32)}

    return blob


MALFORMED: dict[str, tuple[Outline, ...]] = {
    "key": (key_without_teeth, key_without_hole, key_that_is_a_ring, blob(0)),
    "fish": (fish_without_tail, fish_without_fin, fish_with_two_fins, blob(1)),
    "mushroom": (mushroom_without_stem, mushroom_on_two_stems, blob(2)),
    "cup": (cup_with_two_handles, cup_without_handle, blob(3)),
}


@contextmanager
def drawn_as(kind: str, outline: Outline) -> Iterator[None]:
    """Draw objects of `kind` with another outline inside the `with` block."""
    original = shapes.OUTLINES[kind]
    shapes.OUTLINES[kind] = outline
    shapes.sprite.cache_clear()
    try:
        yield
    finally:
        shapes.OUTLINES[kind] = original
        shapes.sprite.cache_clear()
