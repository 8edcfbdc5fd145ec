"""A tiny P1 network layout, and folders of images in the homework's layout and in class folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from P1_model import ModelConfig

TINY = ModelConfig((16, 32), (False, True), blocks=1, patch=2, embedding=32, head_channels=16, timesteps=20)


def write_images(folder: Path, csv: str, names: list[str], labels: Sequence[int | str], seed: int) -> None:
    """Write random 28x28 RGB images and the csv that lists them."""
    random = np.random.default_rng(seed)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(random.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(folder / "data" / name)
    rows = [f"{name},{label}\n" for name, label in zip(names, labels, strict=True)]
    (folder / csv).write_text("image_name,label\n" + "".join(rows))


def write_classes(folder: Path, classes: dict[str, int], size: int = 32, mode: str = "L", seed: int = 0) -> None:
    """Write a folder per class {name: number of images}: noisy images, the classes equally spaced from dark to bright."""
    random = np.random.default_rng(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    for label, (name, count) in enumerate(sorted(classes.items())):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = 20 + 200 * label // max(1, len(classes) - 1) + random.integers(-20, 21, (size, size, channels))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).squeeze())
            image.convert(mode).save(folder / name / f"{index:03d}.png")
