"""Style fidelity: a style passes for itself alone, at full strength, in its own direction and wavelength."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miniature.scenery.render import render_scenes
from miniature.scenery.scenes import ALL_STYLES, HELD_OUT_STYLES, Scene, SceneSpec, sample_scene
from miniature.style_fidelity import StyleMeasure, blend, describe

COUNT = 12


@pytest.fixture(scope="module")
def measure() -> StyleMeasure:
    return StyleMeasure(lambda images: images, count=24)


def scenes(style: str) -> list[Scene]:
    return [sample_scene(9000 + index, SceneSpec(count=1, style=style, pairs="any")) for index in range(COUNT)]


def share(measure: StyleMeasure, images: Tensor, style: str) -> float:
    return float(measure.passes(images, [style] * len(images)).float().mean())


def test_renders_pass_for_their_style_and_no_other(measure: StyleMeasure) -> None:
    shares = torch.stack([measure.verdicts(render_scenes(scenes(style))).float().mean(0) for style in ALL_STYLES])
    assert shares.diag().mean() >= 0.75  # few renders set these bars
    assert (shares - shares.diag().diag()).max() <= 0.1


@pytest.mark.parametrize("style", ["hatched", "dots", "mosaic", *HELD_OUT_STYLES])
def test_half_a_style_fails(measure: StyleMeasure, style: str) -> None:
    full = scenes(style)
    flat = render_scenes([replace(scene, style="flat") for scene in full])
    half = blend(flat, render_scenes(full), 0.5)
    assert share(measure, half, style) <= share(measure, render_scenes(full), style) - 0.4


@pytest.mark.parametrize("style", ["hatched", "dots", *HELD_OUT_STYLES])
def test_a_style_turned_by_90_degrees_fails(measure: StyleMeasure, style: str) -> None:
    assert share(measure, render_scenes(scenes(style)).rot90(1, (2, 3)), style) <= 0.2


@pytest.mark.parametrize("style", ["hatched", "dots", "mosaic", "ripple"])
def test_a_pattern_of_another_wavelength_fails(measure: StyleMeasure, style: str) -> None:
    images = render_scenes(scenes(style))[:, :, 10:54, 10:54].float()
    assert share(measure, F.interpolate(images, size=64, mode="bicubic").clamp(0, 255).to(torch.uint8), style) == 0


def test_brightness_alone_changes_little_of_the_description() -> None:
    images = render_scenes(scenes("ripple"))
    darker = (0.7 * images.float()).round().to(torch.uint8)
    assert (describe(images) - describe(darker)).abs().median() < 0.1
