"""Digits rendered in the style of MNIST-M and SVHN: no download, any number, the same bytes for the same seed.

MNIST-M: a handwritten digit (jittered splines) blended with a procedural photograph.
SVHN: a house number in a random font, with neighbours, plate, shadow, blur, noise and JPEG blocks.
The fonts are those that matplotlib finds, so a machine with other fonts renders other house numbers.
"""

from __future__ import annotations

import io
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from hw2_data.blend import SIDE, Maker, Pixels, blend, random_crop
from runtime.cli import BadInput

Floats = npt.NDArray[np.float64]

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ZOOM = 3  # everything is drawn this many times larger, then averaged down
PHOTOGRAPHS, PHOTOGRAPH_SIDE = 64, 128
PHOTOGRAPH_STREAM = 99  # a random stream apart from those of the images
GLYPH_HEIGHT, GLYPH_BOX = 60, 104  # pixels of a cached letter, with room around it
FONT_SHARE = 0.15  # of the MNIST-M images: print has shapes that the splines lack

# How people write each digit: variants of pen strokes, split by "|"; a stroke is a smooth curve through points x,y in a box of 100 by 100
PEN_STROKES = (
    (
        "60,0 20,17 0,55 20,93 60,100 93,75 100,38 85,8 50,2",
        "75,10 45,0 10,30 5,75 40,100 85,80 95,40 70,5 35,8",
    ),
    (
        "50,0 50,50 48,100",
        "50,0 52,50 50,100",
        "25,22 50,0 | 50,0 50,100",
    ),
    (
        "5,25 30,2 75,5 88,32 55,68 5,100 | 5,100 50,96 100,98",
        "5,22 35,0 80,10 80,40 40,86 8,97 10,80 50,85 100,98",
    ),
    (
        "5,12 40,0 85,12 78,38 35,48 | 35,48 85,56 95,82 55,100 0,90",
        "5,5 50,4 90,4 | 90,4 40,42 | 40,42 85,52 92,82 50,100 0,92",
    ),
    (
        "12,0 4,35 12,55 50,57 90,50 | 88,2 80,50 72,100",
        "70,0 35,35 2,62 | 2,62 100,60 | 72,0 70,50 68,100",
    ),
    (
        "92,0 25,3 | 25,3 15,42 | 15,42 55,38 90,60 75,92 35,100 0,88",
        "30,5 20,40 60,45 80,70 55,97 5,95 | 30,5 60,3 100,0",
    ),
    (
        "75,0 30,28 5,70 30,100 75,95 90,70 60,52 12,70",
        "45,0 15,40 10,80 45,100 85,85 75,60 40,60 12,80",
    ),
    (
        "0,10 45,7 95,2 | 95,2 60,50 42,100",
        "2,20 5,5 | 5,5 90,5 | 90,5 65,50 50,100 | 35,52 92,46",
    ),
    (
        "85,12 50,0 12,15 30,40 70,58 85,82 50,100 12,84 28,60 72,38 85,12",
        "50,0 15,20 50,45 85,22 50,0 | 50,45 8,75 50,100 92,75 50,45",
    ),
    (
        "88,20 50,0 8,20 15,46 55,48 88,20 | 88,20 84,60 70,100",
        "85,22 50,0 10,20 15,45 60,46 85,22 | 85,22 88,70 60,100 15,92",
    ),
)


def rendered_maker(domain: str, count: int, seed: int, stream: int) -> Maker:
    """Return the maker of `count` images in the domain's style, each digit equally often; an image depends on (seed, stream, index)."""

    def make(index: int) -> tuple[Pixels, int]:
        rng, label = np.random.default_rng([seed, stream, index]), index % 10
        if domain == "svhn":
            return house_number(label, rng), label
        patch = random_crop(procedural_photograph(seed, int(rng.integers(PHOTOGRAPHS))), rng)
        return blend(patch, handwriting(label, rng)), label

    return Maker(count, make)


# ---------------------------------------------------------------- handwriting


def handwriting(label: int, rng: np.random.Generator) -> Pixels:
    """Render a handwritten digit [28, 28] uint8, white on black, in the middle 20x20 pixels as in MNIST."""
    if rng.random() < FONT_SHARE:
        return _lettering(str(label), rng, SIDE - 9, spread=0.2)
    variants = PEN_STROKES[label]
    texts = variants[rng.integers(len(variants))].split("|")
    strokes = [_spline(np.array([point.split(",") for point in text.split()], float) / 100) for text in texts]
    lengths = [len(s) for s in strokes]
    points = _fit(_distort(np.concatenate(strokes), rng), rng)
    width = round(ZOOM * rng.uniform(1.4, 3.2))
    canvas = Image.new("L", (SIDE * ZOOM, SIDE * ZOOM))
    draw, radius = ImageDraw.Draw(canvas), width / 2
    for stroke in np.split(points * ZOOM, np.cumsum(lengths)[:-1]):
        draw.line([tuple(point) for point in stroke], fill=255, width=width)
        for x, y in stroke:  # round joints and ends
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    ink = np.asarray(canvas.reduce(ZOOM))
    return np.where(ink > 96, ink, 0).astype(np.uint8)  # no faint ink, which the blend would take in full


def _spline(points: Floats) -> Floats:
    """Return the Catmull-Rom curve [8 (N - 1), 2] through points [N, 2] in the unit box."""
    p = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = np.linspace(0, 1, 8)[:, None, None]
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    curve: Floats = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return curve.transpose(1, 0, 2).reshape(-1, 2)


def _distort(points: Floats, rng: np.random.Generator) -> Floats:
    """Return the points with random waves, slant, width and rotation, the same for all, so that strokes that meet still meet."""
    for frequency, strength in ((0.5, 0.09), (1.0, 0.035)):
        waves = frequency * rng.normal(size=(2, 2))
        phase = rng.uniform(0, 2 * np.pi, 2)
        points = points + strength * np.sin(2 * np.pi * points @ waves + phase)
    slant = np.array([[rng.uniform(0.5, 0.95), 0], [rng.normal(-0.15, 0.2), 1]])
    distorted: Floats = points @ slant @ _rotation(rng.normal(0, 0.12))
    return distorted


def _rotation(angle: float) -> Floats:
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _fit(points: Floats, rng: np.random.Generator) -> Floats:
    """Scale the points to pixels: their longer side spans about 18 of 28, and their centre is at most a pixel off the middle."""
    low, high = points.min(0), points.max(0)
    scale = rng.uniform(16.5, 18.5) / (high - low).max()
    fitted: Floats = (points - (low + high) / 2) * scale + SIDE / 2 + rng.uniform(-1, 1, 2)
    return fitted


# ---------------------------------------------------------------- photographs

NATURAL = np.array([(125, 120, 112), (128, 105, 74), (86, 104, 58), (115, 142, 170), (170, 140, 105)])
VIVID = np.array([(210, 40, 30), (240, 200, 20), (25, 70, 190), (60, 160, 40), (235, 130, 30)])


@lru_cache(maxsize=PHOTOGRAPHS)
def procedural_photograph(seed: int, index: int) -> Pixels:
    """Render [128, 128, 3] uint8: a few regions with ragged borders, each with a natural colour and texture."""
    rng = np.random.default_rng([seed, PHOTOGRAPH_STREAM, index])
    regions = int(rng.integers(2, 7))
    owner = np.argmax([_fractal(rng, rng.uniform(1.9, 2.7)) for _ in range(regions)], axis=0)
    image = np.zeros((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE, 3))
    for region in range(regions):
        image[owner == region] = _surface(rng)[owner == region]
    light = 1 + 0.12 * _fractal(rng, 2.2)[..., None]
    return np.clip(image * light, 0, 255).astype(np.uint8)


def _fractal(rng: np.random.Generator, slope: float) -> Floats:
    """Draw noise [128, 128] of standard deviation 1, with amplitude 1/f^slope at frequency f; photographs have a slope near 1."""
    f = np.fft.fftfreq(PHOTOGRAPH_SIDE)
    radius = np.hypot(f[:, None], f[None, :])
    radius[0, 0] = np.inf
    white = np.fft.fft2(rng.normal(size=radius.shape))
    noise: Floats = np.fft.ifft2(white / radius**slope).real
    noise /= noise.std()
    return noise


def _surface(rng: np.random.Generator) -> Floats:
    """Render [128, 128, 3] float: a natural, rarely a vivid colour with a smooth or rough texture."""
    colour = NATURAL[rng.integers(len(NATURAL))] * rng.uniform(0.15, 1.6) + rng.normal(0, 8, 3)
    if rng.random() < 0.07:
        colour = VIVID[rng.integers(len(VIVID))] + rng.normal(0, 20, 3)
    strength = min(rng.lognormal(2.6, 0.9), 60)
    texture = strength * _fractal(rng, rng.uniform(0.6, 1.8))
    tint = 0.15 * strength * _fractal(rng, 1.5)
    surface: Floats = colour + texture[..., None] + tint[..., None] * rng.normal(size=3)
    return surface


# ---------------------------------------------------------------- house numbers


def house_number(label: int, rng: np.random.Generator) -> Pixels:
    """Render [28, 28, 3] uint8: the digit `label` in the middle, often with neighbours cut by the frame."""
    left, right = (str(rng.integers(10)) if rng.random() < 0.5 else " " for _ in "lr")
    height = SIDE * float(np.clip(rng.normal(0.78, 0.12), 0.5, 1.0))
    ink = _lettering(left + str(label) + right, rng, height, spread=0.08)[..., None] / 255
    wall, paint = _contrasting_colours(rng)
    scene = _wall(wall, rng)
    if rng.random() < 0.25:  # a shadow, or the relief of a metal digit
        shift = tuple(rng.integers(-2, 3, 2))
        scene = scene * (1 - 0.45 * np.roll(ink, shift, axis=(0, 1)))
    return _camera(scene * (1 - ink) + paint * ink, rng)


def _contrasting_colours(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Draw two dull colours [3], of wall and digit, whose brightness differs by 25 (hardly readable) to 200 grey levels."""
    wall = float(np.clip(rng.normal(115, 48), 20, 225))
    difference = float(np.clip(rng.lognormal(4.3, 0.5), 25, 200))
    brighter = rng.random() < (0.85 if wall < 110 else 0.2)
    paint = wall + difference * (1 if brighter else -1)
    warm, pink = np.array([1, 0, -1]), np.array([0.5, -1, 0.5])  # lamps and shade differ in warmth
    tints = rng.laplace(-5, 11, (2, 1)) * warm + rng.normal(0, 4, (2, 1)) * pink
    return np.clip(wall + tints[0], 0, 255), np.clip(paint + tints[1], 0, 255)


def _wall(colour: Floats, rng: np.random.Generator) -> Floats:
    """Render [28, 28, 3] float: the colour under uneven light, sometimes with the edge of a plate or brick."""
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    scene = np.ones((SIDE, SIDE, 1)) * colour
    for _ in range(rng.choice(3, p=(0.6, 0.25, 0.15))):
        angle = rng.choice(4) * np.pi / 2 + rng.normal(0, 0.1)
        beyond = np.cos(angle) * x + np.sin(angle) * y > rng.uniform(0.65, 0.95)
        scene[beyond] = np.clip(colour + rng.normal(0, 45) + rng.normal(0, 12, 3), 0, 255)
    slope = rng.normal(0, 10, 2)
    blotches = Image.fromarray(rng.normal(0, 8, (5, 5)).astype(np.float32))
    smooth = np.asarray(blotches.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    lit: Floats = scene + (slope[0] * x + slope[1] * y + smooth)[..., None]
    return lit


def _camera(scene: Floats, rng: np.random.Generator) -> Pixels:
    """Return the scene as uint8 with the sensor noise, blur and JPEG blocks of a distant camera."""
    noisy = scene + rng.normal(0, rng.uniform(0, 5), scene.shape)
    photo = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    photo = photo.filter(ImageFilter.GaussianBlur(min(rng.gamma(2.2, 0.4), 1.8)))
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=int(rng.integers(55, 95)))
    return np.asarray(Image.open(file))


# ---------------------------------------------------------------- fonts


def _lettering(text: str, rng: np.random.Generator, height: float, spread: float) -> Pixels:
    """Render [28, 28] uint8: `text` in a random font, white on black, digits `height` pixels tall, the middle one centred.

    `spread`: standard deviation of rotation (in radians) and slant.
    """
    fonts = digit_fonts()
    font, bold = str(fonts[rng.integers(len(fonts))]), int(rng.integers(0, 4))
    canvas = Image.new("L", (3 * GLYPH_BOX, GLYPH_BOX))
    advance = _font(font).getlength(text[len(text) // 2]) + rng.uniform(0, 0.12) * GLYPH_HEIGHT
    for place, character in enumerate(text, -(len(text) // 2)):
        canvas.paste(255, (GLYPH_BOX + round(place * advance), 0), _glyph(font, character, bold))
    view = _view(rng, spread, GLYPH_HEIGHT / (height * ZOOM))
    enlarged = canvas.transform((SIDE * ZOOM, SIDE * ZOOM), Image.Transform.AFFINE, view, Image.Resampling.BILINEAR)
    return np.asarray(enlarged.reduce(ZOOM))


def _view(rng: np.random.Generator, spread: float, scale: float) -> tuple[float, ...]:
    """Return Pillow's affine coefficients, which map output pixels to the canvas: scaled, and at random stretched, slanted and rotated."""
    stretch = np.diag((rng.uniform(0.9, 1.5), 1.0))
    slant = np.array([[1, rng.normal(0, spread)], [0, 1]])
    matrix = scale * stretch @ slant @ _rotation(rng.normal(0, spread))
    middle = SIDE * ZOOM * (0.5 + rng.normal(0, 0.01, 2))
    offset = np.array([1.5, 0.5]) * GLYPH_BOX - matrix @ middle
    return (*matrix[0], offset[0], *matrix[1], offset[1])


@cache
def digit_fonts() -> tuple[Path, ...]:
    """Return the paths of installed fonts that have all ten digits, sorted by file name; raise BadInput if there are none."""
    from matplotlib import font_manager  # slow to import

    paths = sorted(Path(entry.fname) for entry in font_manager.fontManager.ttflist)
    files = {path.name: path for path in paths}
    fonts = tuple(files[name] for name in sorted(files) if _has_digits(files[name]))
    if not fonts:
        raise BadInput("no font with digits was found: reinstall matplotlib, which brings some")
    return fonts


def _has_digits(path: Path) -> bool:
    """Return whether the font's glyph names say that its digits are digits. Symbol fonts have other shapes in their places."""
    from fontTools.ttLib import TTFont, TTLibError

    try:
        with TTFont(path, lazy=True, fontNumber=0) as font:
            glyphs = font.getBestCmap() or {}
    except (OSError, TTLibError):
        return False
    return all(glyphs.get(ord("0") + digit) == name for digit, name in enumerate(DIGIT_NAMES))


@cache
def _font(path: str) -> ImageFont.FreeTypeFont:
    """Load the font at the size whose "8" is GLYPH_HEIGHT pixels tall."""
    top, bottom = ImageFont.truetype(path, 100).getbbox("8", anchor="ms")[1::2]
    return ImageFont.truetype(path, 100 * GLYPH_HEIGHT / (bottom - top))


@lru_cache(maxsize=8192)
def _glyph(path: str, character: str, bold: int) -> Image.Image:
    """Render the character in the middle of a square, its outline `bold` pixels thicker."""
    box = Image.new("L", (GLYPH_BOX, GLYPH_BOX))
    foot = (GLYPH_BOX / 2, (GLYPH_BOX + GLYPH_HEIGHT) / 2)
    ImageDraw.Draw(box).text(foot, character, 255, _font(path), "ms", stroke_width=bold)
    return box
