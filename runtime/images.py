"""Images: reading, writing, grids and line figures, and conversion between 0..255 and -1..1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from runtime.cli import BadInput
from runtime.files import atomic


def open_image(path: Path) -> Tensor:
    """Read an image of any mode as RGB [3,H,W] uint8; raise BadInput if it cannot be read."""
    try:
        with Image.open(path) as file:
            pixels = np.array(file.convert("RGB"))
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path} is not a readable picture: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def save_image(path: Path, image: Tensor) -> None:
    """Write [3,H,W] uint8 as PNG, atomically; the same pixels give the same bytes."""
    pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
    with atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")


def image_grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> Tensor:
    """Return images [N,3,H,W] uint8 as one [3,H',W'] uint8 on white, row by row; `scale` enlarges without smoothing."""
    from torchvision.utils import make_grid  # slow to import

    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid: Tensor = make_grid(images, nrow=columns, padding=gap, pad_value=255)
    return grid.to(torch.uint8)


def labelled_grid(
    path: Path, images: Tensor, rows: Sequence[str], columns: Sequence[str], title: str, inch: float = 0.6
) -> None:
    """Draw images [rows * columns,3,H,W] uint8, row by row, with a title and a label per row and column.

    `inch`: side of an image in the figure.
    """
    plt = _pyplot()
    width, height = inch * len(columns) + 1.0, inch * len(rows) + 0.7  # room for labels and title
    figure, axes = plt.subplots(len(rows), len(columns), figsize=(width, height), squeeze=False)
    for index, axis in enumerate(axes.flat):
        row, column = divmod(index, len(columns))
        axis.imshow(images[index].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if column == 0:
            axis.set_ylabel(rows[row], rotation=0, ha="right", va="center")
        if row == 0:
            axis.set_title(columns[column], fontsize=9)
    figure.suptitle(title, fontsize=11, y=1 - 0.08 / height, va="top")
    figure.subplots_adjust(0.95 / width, 0.05 / height, 1 - 0.05 / width, 1 - 0.6 / height, 0.06, 0.06)
    _save(figure, path)


def line_figure(
    path: Path, x: Sequence[float], panels: dict[str, dict[str, list[float]]], x_label: str, title: str
) -> None:
    """Draw one panel per entry of `panels`, {panel title: {line label: values over x}}, side by side."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False)
    for axis, (name, lines) in zip(axes.flat, panels.items(), strict=True):
        for label, values in lines.items():
            axis.plot(x, values, marker="o", label=label)
        axis.set(title=name, xlabel=x_label)
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    _save(figure, path)


def _pyplot() -> Any:
    """Import matplotlib without a screen; it is slow to import."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
    _pyplot().close(figure)


def to_float(images: Tensor) -> Tensor:
    """Return uint8 0..255 as float32 -1..1."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Return float -1..1 (clamped) as uint8 0..255, rounded."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
