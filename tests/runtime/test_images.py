"""Images: files with the same pixels, and grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from runtime.images import image_grid, save_image


def some_pictures(count: int, size: int = 28) -> torch.Tensor:
    values = np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return torch.from_numpy(values)


def test_saved_picture_has_its_pixels(tmp_path: Path) -> None:
    picture = some_pictures(1)[0]
    save_image(tmp_path / "a.png", picture)
    with Image.open(tmp_path / "a.png") as file:
        assert file.mode == "RGB"
        assert np.array_equal(np.asarray(file), picture.permute(1, 2, 0).numpy())


def test_the_same_picture_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_image(tmp_path / name, some_pictures(1)[0])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_grid_has_room_for_pictures_and_gaps() -> None:
    grid = image_grid(some_pictures(6, size=4), columns=3, scale=2, gap=1)
    assert (grid.dtype, tuple(grid.shape)) == (torch.uint8, (3, 2 * (8 + 1) + 1, 3 * (8 + 1) + 1))


def test_grid_is_filled_row_by_row_and_enlarged_without_smoothing() -> None:
    images = some_pictures(6, size=4)
    grid = image_grid(images, columns=3, scale=2, gap=1)
    fourth = grid[:, 10:18, 1:9]
    assert torch.equal(fourth, images[3].repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_grid_is_white_between_the_pictures() -> None:
    grid = image_grid(some_pictures(6, size=4), columns=3, gap=1)
    assert bool((grid[:, :, [0, 5, 10, 15]] == 255).all())
