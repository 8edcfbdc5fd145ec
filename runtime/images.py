"""Images: reading, writing, animations, grids and line figures, and conversion between 0..255 and -1..1."""

from __future__ import annotations

import struct
import textwrap
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from runtime.cli import BadInput, log
from runtime.files import atomic, list_files, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORIENTATION = ExifTags.Base.Orientation
# what Pillow raises for damaged files; it refuses images of twice its size limit, so its warning from the limit on is hidden
DAMAGE = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, MemoryError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Corrupt EXIF data")


@contextmanager
def image_file(path: Path) -> Iterator[Image.Image]:
    """Open an image and decode it; raise BadInput if that fails, or if Pillow fails on it within the block."""
    try:
        with Image.open(path) as file:
            file.load()
            yield file
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist") from None
    except IsADirectoryError:
        raise BadInput(f"{path} is a folder, not a picture") from None
    except DAMAGE as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "of no format that is read here, save it as JPEG or PNG"
        raise BadInput(f"{path} is not a readable picture: {reason}") from None


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Return a decoded image as RGB: rotated as its EXIF data says, 16 bits reduced to 8, blended onto `background`.

    Raise ValueError for 32-bit integers and floating point: the value of white is unknown.
    """
    sixteen_bits = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
    with suppress(*DAMAGE):  # damage in the EXIF data alone, which the pixels don't need
        image = ImageOps.exif_transpose(image)
    if sixteen_bits:
        pixels = np.asarray(image).astype(np.uint32).clip(0, 65535)
        return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode[0] in "IF":
        raise ValueError(f"it has mode {image.mode}, save it with 8 bits per channel")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def read_image(path: Path, background: str = "white") -> Image.Image:
    """Return an image of any mode as RGB, as `to_rgb` does; raise BadInput if it can't be read."""
    with image_file(path) as file:
        return to_rgb(file, background)


def read_as_graded(path: Path) -> Image.Image:
    """Return an image as RGB as the course's graders read it: rotation and transparency are ignored. Log if that changes it."""
    with image_file(path) as file:
        image = file.convert("RGBA" if "transparency" in file.info else "RGB").convert("RGB")
        if file.mode not in ("RGB", "L") or file.getexif().get(ORIENTATION, 1) != 1:
            with suppress(ValueError):
                if (shown := to_rgb(file)).size != image.size or shown.tobytes() != image.tobytes():
                    log(f"{path}: rotation, transparency or 16 bits are ignored, as the course's grader does")
        return image


def images_by_class(folder: Path) -> dict[str, list[Path]]:
    """Return {subfolder's name: its image files}, both sorted by name. Raise BadInput for a subfolder without images."""
    classes = {path.name: list_files(path, SUFFIXES) for path in visible(folder) if path.is_dir()}
    if empty := next((name for name, images in classes.items() if not images), ""):
        raise BadInput(f"{folder / empty} holds no pictures: put some of that class there, or remove the folder")
    return classes


def open_image(path: Path, background: str = "white") -> Tensor:
    """Read an image of any mode as RGB [3,H,W] uint8, as `to_rgb` does; raise BadInput if it can't be read."""
    return to_tensor(read_image(path, background))


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as [3,H,W] uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def save_image(path: Path, image: Tensor) -> None:
    """Write [3,H,W] or, grey, [1,H,W] uint8 as PNG, atomically; the same pixels give the same bytes."""
    pixels = image.permute(1, 2, 0).squeeze(2).contiguous().cpu().numpy()
    with atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")


def save_animation(path: Path, frames: Tensor, frame_ms: int = 80, last_ms: int = 1500) -> None:
    """Write frames [N,3,H,W] uint8 as an endless GIF or lossless WebP, by the suffix, atomically.

    The last frame is shown for `last_ms`, the others for `frame_ms`. A GIF has 256 colours a frame, and times in steps of 10 ms.
    """
    images = [Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
    times, form = [frame_ms] * (len(images) - 1) + [last_ms], {".gif": "GIF", ".webp": "WEBP"}[path.suffix.lower()]
    with atomic(path) as temporary:
        images[0].save(temporary, form, save_all=True, append_images=images[1:], duration=times, loop=0, lossless=True)


def image_grid(images: Tensor, columns: int, scale: int = 1, gap: int = 2) -> Tensor:
    """Return images [N,3,H,W] or [N,1,H,W] uint8 as one [3,H',W'] uint8, row by row, with white gaps of `gap` pixels.

    `scale` enlarges every image by this whole number, without smoothing.
    """
    from torchvision.utils import make_grid  # slow to import

    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid: Tensor = make_grid(images, nrow=columns, padding=gap, pad_value=255)
    return grid.to(torch.uint8)


# ---------------------------------------------------------------- figures


@contextmanager
def decoration(path: Path) -> Iterator[None]:
    """Log one warning if the block fails to make the figure `path`, so that the script's other results are not lost."""
    try:
        yield
    except Exception as error:
        log(f"warning: no figure {path}: {' '.join(str(error).split())[:200] or type(error).__name__}")


@contextmanager
def plain_text() -> Iterator[None]:
    """Make matplotlib draw texts literally within the block: `$` starts no formula, and a missing glyph gives no warning."""
    import matplotlib  # slow to import

    with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": False}):
        warnings.simplefilter("ignore", UserWarning)
        yield


def shorten(text: str, most: int = 60) -> str:
    """Return a text in one line, cut to `most` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 2]}.."


def save_figure(path: Path, figure: Figure, dpi: int = 160) -> None:
    """Write a matplotlib figure as PNG, atomically."""
    with atomic(path) as temporary, plain_text():
        figure.savefig(temporary, format="png", dpi=dpi)


@plain_text()
def labelled_grid(
    path: Path, images: Tensor, rows: Sequence[str], columns: Sequence[str], title: str, inch: float = 0.6
) -> None:
    """Write images [rows * columns,C,H,W] uint8, C = 3 or 1, as PNG: row by row, with a title and a label per row and column.

    `inch`: side of an image in the figure, in inches.
    """
    from matplotlib.figure import Figure  # slow to import

    lines = max((column.count("\n") for column in columns), default=0)
    top = 0.6 + 0.15 * lines
    figure = Figure()
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for index, axis in enumerate(axes.flat):
        row, column = divmod(index, len(columns))
        axis.imshow(images[index].expand(3, -1, -1).permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if column == 0:
            axis.set_ylabel(rows[row], rotation=0, ha="right", va="center")
        if row == 0:
            axis.set_title(columns[column], fontsize=9)
    labels = [axis.yaxis.label.get_window_extent().width / figure.dpi for axis in axes[:, 0]]  # inches
    left = max(0.95, max(labels) + 0.15)
    width, height = inch * len(columns) + left + 0.05, inch * len(rows) + top + 0.1
    figure.set_size_inches(width, height)
    figure.suptitle(title, fontsize=11, y=1 - 0.08 / height)
    figure.subplots_adjust(left / width, 0.05 / height, 1 - 0.05 / width, 1 - top / height, 0.06, 0.06)
    save_figure(path, figure)


def pixel_grid(path: Path, images: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> None:
    """Write images [rows * columns,3,H,W] uint8 as PNG: row by row, with a title and a label per row and column.

    Each pixel becomes a block of k x k pixels. k is chosen so that an image is at most 128 wide, and all columns about 800.
    Letters are a 26th of the grid's width high, legible on a phone; labels of narrow columns are smaller.
    """
    rows, columns = ([shorten(text, 14) for text in texts] for texts in (rows, columns))
    scale = max(1, min(128, 800 // len(columns)) // images.shape[-1])
    grid = Image.fromarray(image_grid(images, len(columns), scale).permute(1, 2, 0).cpu().numpy())
    cell = (grid.width - 2) / len(columns), (grid.height - 2) / len(rows)
    size = max(12, grid.width // 26)
    font = ImageFont.load_default(size)
    label = ImageFont.load_default(min(size, 1.5 * cell[0] / max(map(len, (*columns, "abc")))))
    left = max(int(font.getlength(row)) for row in rows) + size // 2 if any(rows) else 0
    lines = textwrap.wrap(title, max(1, int((left + grid.width) / (0.5 * size))))
    top = int(1.3 * size * (len(lines) + 1.2))
    figure = Image.new("RGB", (left + grid.width, top + grid.height), "white")
    figure.paste(grid, (left, top))
    draw = ImageDraw.Draw(figure)
    draw.multiline_text((size // 4, size // 4), "\n".join(lines), "black", font, spacing=size // 4)
    for index, text in enumerate(columns):
        draw.text((left + (index + 0.5) * cell[0], top - size // 3), text, "black", label, anchor="ms")
    for index, text in enumerate(rows):
        draw.text((left - size // 4, top + (index + 0.5) * cell[1]), text, "black", font, anchor="rm")
    with atomic(path) as temporary:
        figure.save(temporary, "PNG")


@plain_text()
def line_figure(
    path: Path, x: Sequence[float], panels: dict[str, dict[str, list[float]]], x_label: str, title: str
) -> None:
    """Write a PNG with one panel per entry of `panels`, {panel title: {line label: values over x}}, side by side.

    A single panel has its title as the label of its y axis.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(4 * len(panels), 3.2))
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (name, lines) in zip(axes.flat, panels.items(), strict=True):
        for label, values in lines.items():
            axis.plot(x, values, marker="o", label=shorten(label))
        axis.set(xlabel=x_label, **{"title" if len(panels) > 1 else "ylabel": name})
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    save_figure(path, figure)


# ---------------------------------------------------------------- values


def to_float(images: Tensor) -> Tensor:
    """Return uint8 0..255 as float32 -1..1."""
    return images.float() / 127.5 - 1


def check_finite(images: Tensor) -> Tensor:
    """Return `images` unchanged; raise BadInput if a value is NaN or infinite, which would become black pixels."""
    if not images.isfinite().all():
        raise BadInput(
            "the images hold NaN or infinite values, none of them is written: try --precision fp32, or a guidance scale nearer 1"
        )
    return images


def to_uint8(images: Tensor) -> Tensor:
    """Return float images, clamped to -1..1, as uint8 0..255; raise BadInput for NaN or infinite values.

    Rounds half to even, as diffusers does. Only P2's `to_image` rounds otherwise, as the course's ground truth requires.
    """
    return ((check_finite(images).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
