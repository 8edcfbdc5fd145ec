"""The collage: things are cut out of their surroundings and fill their boxes without distortion; nothing else of their images shows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from concepts.composition.collage import GRID, clear_regions, cut_to_fit, paste, thing_masks

GROUND, RED = torch.tensor([-0.2, 0.1, 0.4]), torch.tensor([0.9, -0.8, -0.8])


def picture(top: int, bottom: int, left: int, right: int, side: int = 64) -> Tensor:
    """[3,side,side]: a red rectangle on a plain ground."""
    image = GROUND[:, None, None].repeat(1, side, side)
    image[:, top:bottom, left:right] = RED[:, None, None]
    return image


def box(top: int, bottom: int, left: int, right: int, side: int = 64) -> Tensor:
    """[side,side], 0 or 1."""
    image = torch.zeros(side, side)
    image[top:bottom, left:right] = 1
    return image


@pytest.mark.parametrize("side", [64, 128])
def test_a_thing_is_what_differs_from_its_surroundings(side: int) -> None:
    scale = side // GRID
    noisy = picture(20 * scale, 40 * scale, 25 * scale, 55 * scale, side)[None]
    noisy = noisy + 0.05 * torch.randn(noisy.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(thing_masks(noisy)[0], box(20, 40, 25, 55))


def test_a_patterned_ground_is_no_thing() -> None:
    """Stripes that are far from their mean colour, as a style may draw them."""
    striped = picture(0, 0, 0, 0)
    striped[:, ::4] += 0.5
    striped[:, 20:40, 25:55] = RED[:, None, None]
    mask = thing_masks(striped[None])[0]
    assert (mask == box(20, 40, 25, 55)).float().mean() > 0.99


def test_where_nothing_differs_the_middle_is_taken() -> None:
    assert torch.equal(thing_masks(picture(0, 0, 0, 0)[None])[0], box(14, 50, 14, 50))


@pytest.mark.parametrize(("height", "width"), [(24, 24), (12, 30), (30, 12), (8, 120), (120, 20)])
def test_a_thing_fills_its_box_and_keeps_its_shape(height: int, width: int) -> None:
    whole = picture(20, 40, 10, 50)  # twice as wide as high
    layers = cut_to_fit(whole, thing_masks(whole[None])[0], height, width)
    assert layers.shape == (4, height, width)
    red = ((layers[:3] - RED[:, None, None]).norm(dim=0) < 0.3) & (layers[3] > 0.9)
    rows, columns = red.any(1).sum(), red.any(0).sum()
    scale = min(height / 20, width / 40)
    assert rows == pytest.approx(20 * scale, abs=2)
    assert columns == pytest.approx(40 * scale, abs=2)
    middle = red.nonzero().float().mean(0)
    torch.testing.assert_close(middle, torch.tensor([height - 1, width - 1]) / 2, rtol=0, atol=1)


def test_regions_are_cleared_with_what_is_around_them() -> None:
    scene, inside = picture(10, 30, 10, 30)[None], box(8, 32, 8, 32)[None, None]
    result = clear_regions(scene, inside)
    assert (result - GROUND[:, None, None]).abs().max() < 1e-4
    assert torch.equal(clear_regions(scene, torch.zeros(1, 1, 64, 64)), scene)


def test_pasted_things_lie_in_their_masks_and_the_rest_stays() -> None:
    backdrop = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.2
    masks = torch.stack([box(4, 24, 4, 24), box(30, 60, 30, 60)])[:, None].repeat(1, 2, 1, 1)
    alone = [picture(20, 40, 20, 40).repeat(2, 1, 1, 1), picture(10, 50, 10, 50).repeat(2, 1, 1, 1)]
    before = backdrop.clone()
    result = paste(backdrop, alone, masks)
    outside = masks.amax(0) == 0
    assert torch.equal(backdrop, before)
    assert all(torch.equal(result[row][:, outside[row]], before[row][:, outside[row]]) for row in range(2))
    for top, left in ((14, 14), (45, 45)):
        torch.testing.assert_close(result[:, :, top, left], RED.expand(2, 3), rtol=0, atol=0.05)
    assert (
        not torch.isclose(result[:, :, 4:24, 4:24], GROUND[:, None, None]).all(1).any()
    )  # no ground of the thing's own picture


def test_a_mask_without_positions_takes_nothing() -> None:
    backdrop = picture(10, 30, 10, 30)[None]
    result = paste(backdrop, [picture(20, 40, 20, 40)[None]], torch.zeros(1, 1, 64, 64))
    assert torch.equal(result, backdrop)


def test_each_region_of_each_image_has_its_own_thing_and_nothing_else_of_the_scene() -> None:
    """Images of 128 pixels; regions are triangles, things differ in colour and place; what the scene shows in a region goes."""
    ground, spot = torch.tensor([0.2, 0.2, 0.2])[:, None, None], torch.tensor([1.0, -1.0, 1.0])[:, None, None]
    triangle = torch.ones(40, 40).tril()
    masks = torch.zeros(2, 2, 128, 128)
    masks[0, :, 8:48, 8:48], masks[1, :, 70:110, 60:100] = triangle, triangle
    scenes = ground.expand(2, 3, 128, 128).clone()
    scenes[:, :, 41:48, 8:14] = scenes[:, :, 103:110, 60:66] = spot  # in a corner that round things leave free
    colours = torch.tensor([[[0.9, -0.9, -0.9], [-0.9, 0.9, -0.9]], [[-0.9, -0.9, 0.9], [0.9, 0.9, -0.9]]])
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    places, alone = [[(40, 50), (60, 60)], [(70, 60), (64, 80)]], torch.zeros(2, 2, 3, 128, 128)
    for region in range(2):
        for image, (top, left) in enumerate(places[region]):
            disc = (y - top) ** 2 + (x - left) ** 2 < 20**2
            colour = colours[region, image][:, None, None]
            alone[region, image] = torch.where(disc, colour, GROUND[:, None, None])
    result = paste(scenes, list(alone), masks)
    for image in range(2):
        for region, (top, left) in enumerate(((8, 8), (70, 60))):
            middle = result[image, :, top + 22, left + 18]
            torch.testing.assert_close(middle, colours[region, image], rtol=0, atol=0.05)
            corner = result[image, :, top + 38, left + 1]
            torch.testing.assert_close(corner, ground[:, 0, 0], rtol=0, atol=0.1)
        outside = masks[:, image].amax(0) == 0
        assert torch.equal(result[image][:, outside], scenes[image][:, outside])
