"""Style fidelity: whether an image's texture and contours are those of a style at full strength, so that a half-hearted style fails.

The scene classifier names the style that an image resembles most. Here 39 features describe an image: energies of oriented filters on
the background and inside the largest object, and the lightness of its contour on each side. They are taken on the logarithm
of luminance, where a pattern that darkens by a share is the same on every colour.

An image passes for a style if three things hold. No other style is more likely, by Gaussian likelihood.
Its Mahalanobis distance to the style is no larger than that of nearly all renders of the style.
On Fisher's discriminant from flat (0) to the style (1), its position is no lower than that of nearly all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from miniature.scenery.render import render_scenes
from miniature.scenery.scenes import ALL_STYLES, GROUNDS, Scene, SceneSpec, sample_scene
from miniature.silhouettes import background_plane, segment
from runtime.seeds import derived_seed

WAVELENGTHS = (3.0, 4.5, 6.5, 9.0)  # pixels
DIRECTIONS = 4
REACH = 13  # pixels from a filter's centre to its edges
SHRINKAGE = 0.3  # weight of the covariance of all styles in the covariance of one
LEFT_OUT = 0.04  # share of a style's renders that fail each of the two bars
DARKEST = 12.0  # grey levels, added before logarithms are taken
LUMINANCE = (0.299, 0.587, 0.114)


def sample_scenes(style: str, ground: str, count: int, seed: int, objects: int = 1) -> list[Scene]:
    """Draw `count` scenes of this style on this ground, with `objects` objects each."""
    spec = SceneSpec(count=objects, style=style, ground=ground, pairs="any")
    return [sample_scene(derived_seed(seed, index), spec) for index in range(count)]


def blend(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Return images uint8 between two of one shape: `share` 0 gives the first, 1 the second."""
    return torch.lerp(first.float(), second.float(), share).round().to(torch.uint8)


# ---------------------------------------------------------------- description


def describe(images: Tensor) -> Tensor:
    """Return the features [N,39] of images [N,3,64,64] uint8."""
    x, weights = images.float(), torch.tensor(LUMINANCE)[:, None, None]
    light, plane = (
        ((each * weights).sum(1, keepdim=True).clamp(0) + DARKEST).log() for each in (x, background_plane(x))
    )
    mask = _shrunk(_grown((segment(images).masks[:, None] > 0.5).float(), 2), 2)  # without the pattern's gaps
    core, ground = _shrunk(mask, 2), 1 - _grown(mask, 4)

    responses = F.conv2d(F.pad(light, (REACH,) * 4, mode="reflect"), gabor_filters())
    energies = torch.hypot(responses[:, ::2], responses[:, 1::2])
    texture = [(_mean(energies, area) + 0.01).log() for area in (ground, core)]

    # the contour's lightness, relative to the background outside and to the object's core inside
    outside, inside = light - plane, light - _mean(light, core)[:, :, None, None]
    outer, inner = _grown(mask, 4) - _grown(mask, 1), mask - _shrunk(mask, 3)
    line = _mean(torch.minimum(outside, inside), _grown(mask, 1) - _shrunk(mask, 1))
    contour = [line, _mean(outside, outer), _mean(inside, inner)]
    for side in _sides(mask):
        for value, band in ((outside, outer), (inside, inner)):
            contour.append(_mean(value, band * (side > 0.4)) - _mean(value, band * (side < -0.4)))
    return torch.cat(texture + contour, 1)


def gabor_filters() -> Tensor:
    """Return [32,1,27,27]: cosine and sine of every wavelength and direction under a Gaussian. Their response to a constant is 0."""
    axis = torch.arange(-REACH, REACH + 1.0)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    filters = []
    for wavelength in WAVELENGTHS:
        window = (-(x**2 + y**2) / (2 * (wavelength / 2) ** 2)).exp()
        window = window / window.sum()
        for angle in (math.pi * index / DIRECTIONS for index in range(DIRECTIONS)):
            phase = 2 * math.pi / wavelength * (math.cos(angle) * x + math.sin(angle) * y)
            even = window * phase.cos()
            filters += [even - window * even.sum(), window * phase.sin()]
    return torch.stack(filters)[:, None]


def _grown(mask: Tensor, pixels: int) -> Tensor:
    return F.max_pool2d(mask, 2 * pixels + 1, 1, pixels)


def _shrunk(mask: Tensor, pixels: int) -> Tensor:
    return -F.max_pool2d(-mask, 2 * pixels + 1, 1, pixels)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum((2, 3)) / (weights.sum((2, 3)) + 1e-6)


def _sides(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines [N,1,64,64] of the mask's outward normal with two directions: the lower right, and the lower left."""
    smooth = F.avg_pool2d(F.avg_pool2d(mask, 5, 1, 2), 5, 1, 2)
    down, right = (-each for each in torch.gradient(smooth, dim=(2, 3)))
    length = math.sqrt(2) * (down.square() + right.square()).sqrt() + 1e-4
    return (right + down) / length, (down - right) / length


# ---------------------------------------------------------------- comparison


@dataclass(frozen=True)
class StyleStatistics:
    """Features of one style's renders: a mean per ground, one covariance, and the two bars that an image must pass."""

    means: Tensor  # [3,39], one per ground
    flat: Tensor  # [3,39], means of flat renders
    precision: Tensor  # [39,39], the inverse covariance
    log_determinant: float  # of the covariance
    farthest: float = math.inf  # largest squared distance that passes
    weakest: float = -math.inf  # least strength that passes

    def distances(self, features: Tensor) -> Tensor:
        """Return the squared Mahalanobis distances [N,3] of features [N,39] to the style's mean on each ground."""
        offsets = features[:, None] - self.means
        return torch.einsum("ngi,ij,ngj->ng", offsets, self.precision, offsets)

    def strengths(self, features: Tensor) -> Tensor:
        """Return [N]: where features [N,39] lie between flat renders (0) and the style's (1) on the nearest ground."""
        direction = self.precision @ (self.means - self.flat).mean(0)
        nearest, full = self.distances(features).argmin(1), (self.means - self.flat) @ direction
        return (features - self.flat[nearest]) @ direction / full[nearest].clamp(min=1e-6)


class StyleMeasure:
    """A test of whether images have a style, by statistics of renders of every style."""

    def __init__(self, through: Callable[[Tensor], Tensor], count: int = 150, objects: int = 1, seed: int = 0):
        """Take the statistics of `count` renders per style and ground, with `objects` objects each. A third of them sets the bars.

        `through` encodes and decodes the renders, uint8 to uint8, because the images to be measured come from an autoencoder.
        """
        used, features = count - count // 3, {}
        for index, style in enumerate(ALL_STYLES):
            seeds = [derived_seed(seed, index, ground) for ground in range(len(GROUNDS))]
            scenes = [sample_scenes(style, g, count, s, objects) for g, s in zip(GROUNDS, seeds, strict=True)]
            features[style] = torch.stack([describe(through(render_scenes(each))) for each in scenes])
        means = {style: each[:, :used].mean(1) for style, each in features.items()}
        offsets = {style: (each[:, :used] - means[style][:, None]).flatten(0, 1) for style, each in features.items()}
        pooled = torch.cat(list(offsets.values())).T.cov()

        self.styles: dict[str, StyleStatistics] = {}
        for style, each in features.items():
            covariance = (1 - SHRINKAGE) * offsets[style].T.cov() + SHRINKAGE * pooled + 1e-4 * torch.eye(len(pooled))
            own = StyleStatistics(means[style], means["flat"], torch.linalg.inv(covariance), float(covariance.logdet()))
            rest = each[:, used:].flatten(0, 1)
            farthest = float(own.distances(rest).amin(1).quantile(1 - LEFT_OUT))
            weakest = float(own.strengths(rest).quantile(LEFT_OUT))
            self.styles[style] = replace(own, farthest=farthest, weakest=weakest if style != "flat" else -math.inf)

    def passes(self, images: Tensor, styles: Sequence[str]) -> Tensor:
        """Return [N] bool: whether image i of [N,3,64,64] uint8 passes for `styles[i]`."""
        columns = torch.tensor([ALL_STYLES.index(style) for style in styles])
        return self.verdicts(images).gather(1, columns[:, None])[:, 0]

    def verdicts(self, images: Tensor) -> Tensor:
        """Return [N,8] bool: whether each image passes for each style. At most one is True per image."""
        features, styles = describe(images), self.styles.values()
        distances = torch.stack([style.distances(features).amin(1) for style in styles], 1)
        nearest = (distances + torch.tensor([style.log_determinant for style in styles])).argmin(1)
        near = distances <= torch.tensor([style.farthest for style in styles])
        strong = torch.stack([style.strengths(features) >= style.weakest for style in styles], 1)
        return F.one_hot(nearest, len(ALL_STYLES)).bool() & near & strong
