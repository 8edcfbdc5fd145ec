"""The public originals: MNIST files, photographs and SVHN files, and the recipe that makes MNIST-M of the first two.

MNIST-M (Ganin et al. 2016, "Domain-Adversarial Training of Neural Networks"): |patch - digit| per channel, the patch cut from a photograph.
The published images use MNIST as a mask: any ink counts as 255, so the digit shows the photograph's negative, with hard edges.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from runtime.cli import BadInput
from runtime.hub import first_line

Split = Literal["train", "val"]

SIDE = 28  # pixels, height and width of every image
PHOTOGRAPH_SIDE = (
    512  # longer photographs are reduced: BSDS500's have 481, and a patch should show more than one flat spot
)
PHOTOGRAPH_TYPES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
BSDS500 = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/"


@dataclass(frozen=True)
class Digits:
    """Images uint8, [N, 28, 28] for MNIST and [N, 3, 32, 32] for SVHN, and labels [N] from 0 to 9."""

    images: np.ndarray
    labels: np.ndarray


@dataclass
class Maker:
    """How many images to make, and how: index -> image [28, 28, 3] uint8 and label. Any index may be made alone."""

    count: int
    make: Callable[[int], tuple[np.ndarray, int]]


# ---------------------------------------------------------------- MNIST-M


def blend(patch: np.ndarray, digit: np.ndarray) -> np.ndarray:
    """|patch - 255 [digit > 0]|: patch [28, 28, 3] and digit [28, 28], uint8 -> [28, 28, 3] uint8."""
    mask = np.where(digit > 0, 255, 0)[..., None]
    return np.abs(patch - mask).astype(np.uint8)


def random_crop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A 28x28 cut-out of a picture [H, W, 3]; every position is as likely."""
    top, left = (int(rng.integers(size - SIDE + 1)) for size in picture.shape[:2])
    return picture[top : top + SIDE, left : left + SIDE]


def mnistm_maker(
    mnist: Path | None, downloads: Path, backgrounds: Path, split: Split, random_key: tuple[int, ...]
) -> Maker:
    """One split of MNIST on the photographs; MNIST is downloaded where no folder is given. Raises BadInput."""
    photographs = find_photographs(backgrounds)
    digits = read_mnist(mnist or download_mnist(downloads), split)

    def make(index: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng([*random_key, index])
        picture = load_photograph(photographs[rng.integers(len(photographs))])
        return blend(random_crop(picture, rng), digits.images[index]), int(digits.labels[index])

    return Maker(len(digits.labels), make)


def find_photographs(folder: Path) -> list[Path]:
    """The pictures in `folder` and below that are at least 28x28, sorted; raises BadInput when there is none."""
    if not folder.is_dir():
        raise BadInput(f"--backgrounds {folder}: no such folder")
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PHOTOGRAPH_TYPES)
    if not pictures:
        raise BadInput(f"--backgrounds {folder}: no pictures in it (jpg, png ..); {BSDS500}")
    large = [p for p in pictures if min(_size(p)) >= SIDE]
    if not large:
        raise BadInput(f"--backgrounds {folder}: all {len(pictures)} pictures are smaller than {SIDE}x{SIDE}")
    return large


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as picture:
            return picture.size
    except UnidentifiedImageError:
        raise BadInput(f"{path} is not a picture: remove it from the backgrounds") from None


@lru_cache(maxsize=600)
def load_photograph(path: Path) -> np.ndarray:
    """[H, W, 3] uint8, the longer side at most 512 unless that would make the other less than 28; raises BadInput when it is damaged."""
    try:
        with Image.open(path) as picture:
            scale = max(PHOTOGRAPH_SIDE / max(picture.size), SIDE / min(picture.size))
            colour = picture.convert("RGB")
    except OSError as error:
        raise BadInput(f"{path} is damaged ({error}): remove it from the backgrounds") from None
    if scale < 1:
        width, height = (max(SIDE, round(scale * size)) for size in colour.size)
        colour = colour.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(colour)


# ---------------------------------------------------------------- MNIST


def download_mnist(folder: Path) -> Path:
    """Fetches MNIST into `folder` with torchvision, unless it is there already."""
    from torchvision.datasets import MNIST  # here, because it doubles the start of the offline commands

    try:
        MNIST(str(folder), download=True)
    except RuntimeError as error:
        raise BadInput(f"MNIST download: {first_line(error)}; or give --mnist DIR") from None
    return folder


def read_mnist(folder: Path, split: Split) -> Digits:
    """One part, from torchvision's layout or a flat folder of the four files, packed or not; raises BadInput that names the file."""
    prefix = "train" if split == "train" else "t10k"
    images_file = _mnist_file(folder, f"{prefix}-images-idx3-ubyte")
    labels_file = _mnist_file(folder, f"{prefix}-labels-idx1-ubyte")
    images, labels = _read_idx(images_file, 3), _read_idx(labels_file, 1)
    if images.shape[1:] != (SIDE, SIDE):
        raise BadInput(f"{images_file}: images of {images.shape[1:]}, not {SIDE}x{SIDE}")
    if len(images) != len(labels) or labels.max(initial=0) > 9:
        raise BadInput(f"{labels_file}: not the labels 0 to 9 of the {len(images)} images")
    return Digits(images, labels)


def _mnist_file(folder: Path, name: str) -> Path:
    places = (folder, folder / "raw", folder / "MNIST" / "raw")
    for file in (place / f"{name}{packed}" for place in places for packed in ("", ".gz")):
        if file.is_file():
            return file
    raise BadInput(f"--mnist {folder}: neither {name} nor {name}.gz is in it or in its MNIST/raw")


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The IDX format: two zeros, type 8 (uint8), number of dimensions, each size as big-endian int32, then the values."""
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, ValueError) as error:
        raise BadInput(f"{path} is damaged: {error}") from None
    start = 4 + 4 * dimensions
    shape = [int(size) for size in np.frombuffer(raw[4:start], ">i4")] if len(raw) >= start else []
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) - start != np.prod(shape):
        raise BadInput(f"{path} is not MNIST's IDX file with {dimensions} dimensions, or is cut off")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


# ---------------------------------------------------------------- SVHN


def svhn_maker(folder: Path, split: Split, download: bool) -> Maker:
    """One split of SVHN from `folder`, downloaded to it first if asked. Raises BadInput."""
    digits = read_svhn(folder, split, download)
    return Maker(len(digits.labels), lambda i: (svhn_image(digits.images[i]), int(digits.labels[i])))


def read_svhn(folder: Path, split: Split, download: bool) -> Digits:
    """Train or test part of the cropped digits; raises BadInput when the file is absent or not the original."""
    from torchvision.datasets import SVHN

    part = "train" if split == "train" else "test"
    try:
        svhn = SVHN(str(folder), part, download=download)
    except RuntimeError as error:
        advice = "or give --svhn DIR" if download else "leave --svhn out to download it"
        file = folder / SVHN.split_list[part][1]
        raise BadInput(f"{file}: {first_line(error)}; {advice}") from None
    return Digits(svhn.data, svhn.labels)


def svhn_image(image: np.ndarray) -> np.ndarray:
    """[3, 32, 32] -> [28, 28, 3] uint8; resized, not cropped: wide digits touch the border of the original."""
    picture = Image.fromarray(image.transpose(1, 2, 0))
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))  # Pillow's antialiases
