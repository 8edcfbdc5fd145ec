"""A tiny P1 network layout, and folders of random images in the homework's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from P1_model import ModelConfig

TINY = ModelConfig((16, 32), (False, True), blocks=1, patch=2, embedding=32, head_channels=16, timesteps=20)


def write_images(folder: Path, csv: str, names: list[str], labels: list[int], seed: int) -> None:
    """Write random 28x28 RGB images and the csv that lists them."""
    random = np.random.default_rng(seed)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(random.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(folder / "data" / name)
    rows = [f"{name},{label}\n" for name, label in zip(names, labels, strict=True)]
    (folder / csv).write_text("image_name,label\n" + "".join(rows))
