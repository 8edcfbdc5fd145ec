"""Shape fidelity: right objects pass in all colours and poses, malformed ones and other kinds fail."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from miniature.scenery.malformed import MALFORMED, Outline, drawn_as
from miniature.scenery.render import as_tensor, render
from miniature.scenery.scenes import ALL_KINDS, BACKGROUNDS, COLOURS, GROUNDS, SceneSpec, fits, sample_scene
from miniature.silhouettes import PASSING, background_plane, segment, shape_fidelity


def renders(kind: str, count: int = 8, seed: int = 0) -> Tensor:
    random, pairs = Random(seed), [(c, b) for c in COLOURS for b in BACKGROUNDS if fits(c, b)]
    specs = [
        SceneSpec(kinds=(kind,), colours=(c,), background=b, style="flat", ground=random.choice(GROUNDS), pairs="any")
        for c, b in random.choices(pairs, k=count)
    ]
    return as_tensor(np.stack([render(sample_scene(100 * seed + index, spec)) for index, spec in enumerate(specs)]))


def fidelity(images: Tensor, kind: str) -> float:
    return float(shape_fidelity(images, [kind] * len(images)).mean())


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_render_agrees_with_its_kind(kind: str) -> None:
    assert fidelity(renders(kind), kind) > 0.85


@pytest.mark.parametrize("kind", MALFORMED)
def test_other_kinds_fail(kind: str) -> None:
    bar = PASSING * fidelity(renders(kind), kind)
    for other in ALL_KINDS:
        if other != kind:
            assert fidelity(renders(other, 3), kind) < 0.8 * bar, other


@pytest.mark.parametrize(("kind", "outline"), [(kind, outline) for kind, all_ in MALFORMED.items() for outline in all_])
def test_a_malformed_object_fails_where_the_right_one_passes(kind: str, outline: Outline) -> None:
    with drawn_as(kind, outline):
        malformed = renders(kind)
    right = shape_fidelity(renders(kind), [kind] * 8)
    passing = shape_fidelity(malformed, [kind] * 8) >= PASSING * right.mean()
    assert passing.float().mean() <= 0.25
    assert (right >= PASSING * right.mean()).float().mean() >= 0.75


def test_an_empty_image_has_no_fidelity() -> None:
    assert shape_fidelity(torch.full((1, 3, 64, 64), 90, dtype=torch.uint8), ["fish"]).tolist() == [0]


def test_the_background_is_a_plane_through_the_border_and_ignores_the_inside() -> None:
    down, right = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    plane = torch.stack([right, 100 - down / 2, 50 + 0 * right])[None]
    image = plane.clone()
    image[:, :, 20:40, 20:64] = 250  # touches the border
    assert torch.allclose(background_plane(image), plane, atol=1)


def test_the_mask_covers_the_object_and_its_light_and_dark_parts() -> None:
    spec = SceneSpec(kinds=("mushroom",), colours=("blue",), background="yellow", style="flat", ground="plain")
    scene = sample_scene(3, spec)
    mask = segment(as_tensor(render(scene)[None])).masks[0] > 0.5
    left, top, right, bottom = scene.things[0].box
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    assert rows[[0, -1]].tolist() == pytest.approx([top, bottom - 1], abs=3)
    assert columns[[0, -1]].tolist() == pytest.approx([left, right - 1], abs=3)
