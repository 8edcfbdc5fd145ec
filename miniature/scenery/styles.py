"""Renders a scene as an image: the background, objects on it, a style over all of it.

In this module an image is [3,64,64] float32 in grey levels 0..255, because numpy is slow where the last axis is short.
Every style leaves the colours recognisable: most of each surface keeps its colour.
"""

from __future__ import annotations

from functools import cache
from types import EllipsisType
from typing import Any

import numpy as np
import numpy.typing as npt

from miniature.scenery.scenes import BACKGROUNDS, COLOURS, SIDE, Scene, Thing
from miniature.scenery.shapes import MARGIN, Array, Sprite, coverage, sprite

INK = np.float32(24)  # grey level of contours
CONTOUR = 1.7  # pixels
PHASES = 12  # variants of each pattern


def render(scene: Scene) -> npt.NDArray[np.uint8]:
    """Render [64,64,3] uint8. The same scene gives the same image on every machine, up to one grey level."""
    image = _ground(scene)
    mask = np.zeros((SIDE, SIDE), np.float32)
    for thing in scene.things:
        _put(image, mask, thing, scene)
    image = _finish(image, mask, scene)
    np.clip(image, 0, 255, out=image)
    image += np.float32(0.5)
    return np.ascontiguousarray(image.astype(np.uint8).transpose(1, 2, 0))


def _tinted(base: tuple[int, int, int], tint: tuple[int, int, int]) -> Array:
    return np.array(base, np.float32).reshape(3, 1, 1) + np.array(tint, np.float32).reshape(3, 1, 1)


# ---------------------------------------------------------------- background


def _ground(scene: Scene) -> Array:
    back = scene.background
    shading = _shading(back.ground, scene.noise_seed % PHASES)
    return shading * _tinted(BACKGROUNDS[back.colour], back.tint)


@cache
def _shading(ground: str, phase: int) -> Array:
    """Return the factors [64,64] by which a ground changes the background's colour."""
    x, y = _coordinates()
    if ground == "gradient":
        turn = 2 * np.pi * phase / PHASES
        across: Array = (np.cos(turn) * (x - SIDE / 2) + np.sin(turn) * (y - SIDE / 2)) / SIDE
        return (0.92 + 0.4 * across).astype(np.float32)
    if ground == "textured":  # a chequered cloth
        squares = ((x + phase) // 8 + (y + 5 * phase) // 8) % 2
        return (1.0 - 0.17 * squares).astype(np.float32)
    return np.ones((SIDE, SIDE), np.float32)


@cache
def _coordinates() -> tuple[Array, Array]:
    """Return x and y of every pixel, [64,64] each."""
    y, x = np.meshgrid(np.arange(SIDE, dtype=np.float32), np.arange(SIDE, dtype=np.float32), indexing="ij")
    return x, y


# ---------------------------------------------------------------- objects


def _put(image: Array, mask: Array, thing: Thing, scene: Scene) -> None:
    """Paint one object into the image, and its coverage into the mask [64,64]."""
    figure = sprite(thing.kind, thing.size, thing.angle, thing.mirrored)
    window, inner = _windows(thing, figure.alpha.shape[0])
    canvas, alpha = image[window], figure.alpha[inner]
    colour = _tinted(COLOURS[thing.colour], thing.tint) * figure.gain[inner] + figure.lift[inner]
    if scene.style == "outline":
        canvas += coverage(figure.distance[inner] - np.float32(CONTOUR)) * (INK - canvas)
    elif scene.style == "watercolour":
        alpha, colour = _wet(figure.distance[inner], colour, _paper(scene.noise_seed % PHASES)[window])
    elif scene.style == "relief":
        colour = _embossed(image, window, figure, inner, colour)
    canvas += alpha * (colour - canvas)
    mask[window] = np.maximum(mask[window], alpha)


Window = tuple[EllipsisType, slice, slice]  # of the last two axes


def _windows(thing: Thing, side: int) -> tuple[Window, Window]:
    """Return the part of the image that a sprite covers, and the part of the sprite that lies in the image."""
    outer, inner = [], []
    for start in (thing.box[1] - MARGIN, thing.box[0] - MARGIN):
        low, high = max(0, start), min(SIDE, start + side)
        outer.append(slice(low, high))
        inner.append(slice(low - start, high - start))
    return (..., outer[0], outer[1]), (..., inner[0], inner[1])


def _wet(distance: Array, colour: Array, paper: Array) -> tuple[Array, Array]:
    """Return an object's alpha and colour in watercolour: a wavering outline, pigment that gathers at the rim."""
    wavering = distance + paper
    rim = np.clip(1 - np.abs(wavering + 1.2) / np.float32(1.4), 0, 1)
    return np.clip(0.5 - wavering / 1.6, 0, 1), colour * (1 - 0.35 * rim)


def _embossed(image: Array, window: Window, figure: Sprite, inner: Window, colour: Array) -> Array:
    """Paint a soft shadow of the object into the image, to the lower right; return its colour with lit and shaded edges."""
    cast = np.zeros_like(figure.alpha)
    cast[3:, 3:] = np.clip(0.5 - figure.distance[:-3, :-3] / 3, 0, 1)
    image[window] *= 1 - 0.55 * cast[inner]
    bevel = figure.bevel[inner]
    lit: Array = colour + np.maximum(bevel, 0) * (255 - colour) * 0.75
    return lit + np.minimum(bevel, 0) * colour * 0.6


# ---------------------------------------------------------------- over all


def _finish(image: Array, mask: Array, scene: Scene) -> Array:
    """Return the image with the style applied to all of it, with another strength on objects (`mask`)."""
    phase = scene.noise_seed % PHASES
    if scene.style == "watercolour":
        return _washed(image, mask, phase)
    if scene.style == "ripple":
        return _rippled(image, phase)
    if scene.style in ("hatched", "dots", "mosaic"):
        weak, strong = _pattern(scene.style, phase)
        image *= weak + mask * (strong - weak)
    return image


@cache
def _pattern(style: str, phase: int) -> tuple[Array, Array]:
    """Return the factors [64,64] of a style's pattern for the background and for objects."""
    x, y = _coordinates()
    if style == "hatched":
        falling, rising = (x + y + phase) % 5, (x - y + phase) % 5
        return _dark(np.abs(rising - 2) < 0.5, 0.28), _dark(np.abs(falling - 2) < 1.2, 0.42)
    if style == "dots":
        row = (y + phase) // 3
        u, v = (x + 3 * (row % 2)) % 6 - 2.5, (y + phase) % 3 - 1
        dots = np.clip(2.1 - np.hypot(u, v * 1.0), 0, 1)
        return _dark(dots, 0.3), _dark(dots, 0.45)
    noise = _noise(phase, 1)
    tile_x, tile_y = ((x + phase) // 5).astype(int), ((y + phase // 2) // 5).astype(int)
    tiles = 1 + 0.2 * noise[tile_y, tile_x]
    grout = ((x + phase) % 5 < 1) | ((y + phase // 2) % 5 < 1)
    both = np.where(grout, 0.62, tiles).astype(np.float32)
    return both, both


def _dark(where: npt.NDArray[Any], strength: float) -> Array:
    return (1 - strength * where).astype(np.float32)


@cache
def _noise(phase: int, cell: int) -> Array:
    """Return noise [64,64] in -1..1, smooth over `cell` pixels and periodic at the edges; the same in every run."""
    random = np.random.Generator(np.random.PCG64(1000 * cell + phase)).random((SIDE // cell, SIDE // cell))
    noise = np.kron(random, np.ones((cell, cell)))
    for axis in (0, 1):
        for shift in (cell // 2, cell // 4):
            noise = (noise + np.roll(noise, shift, axis)) / 2 if shift else noise
    return (2 * noise - 1).astype(np.float32)


@cache
def _paper(phase: int) -> Array:
    """Return noise [64,64] in -1..1, the pixels by which wet edges waver."""
    return np.clip(1.2 * _noise(phase, 4) + 0.5 * _noise(phase, 2), -1, 1)


def _washed(image: Array, mask: Array, phase: int) -> Array:
    """Return the image with blotches: the paper shines through in places, and its grain shows."""
    thin, grain = _blotches(phase)
    return image + (250 - image) * thin * (1 - 0.65 * mask) + grain


@cache
def _blotches(phase: int) -> tuple[Array, Array]:
    blotches = 0.6 * _noise(phase, 16) + 0.6 * _noise(phase, 8)
    thin = np.clip(0.16 + 0.45 * blotches, 0, 0.45)
    return thin.astype(np.float32), 9 * _noise(phase, 1)


def _rippled(image: Array, phase: int) -> Array:
    """Distort by waves of water: pixels move up and down along x; crests are light, troughs dark."""
    source, light = _waves(phase)
    return image.reshape(3, -1)[:, source].reshape(image.shape) * light


@cache
def _waves(phase: int) -> tuple[npt.NDArray[np.int64], Array]:
    x, y = _coordinates()
    bend = 1.1 * np.sin(2 * np.pi * (x / 16 + phase / PHASES))
    rows = np.clip(np.rint(y + bend), 0, SIDE - 1)
    light = 1 + 0.24 * np.sin(2 * np.pi * (y + 2.4 * bend + phase) / 8)
    return (rows * SIDE + x).astype(np.int64).ravel(), light.astype(np.float32)
