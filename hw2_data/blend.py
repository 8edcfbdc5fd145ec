"""Build MNIST-M (Ganin et al. 2016, arXiv 1505.07818) and SVHN images from public originals: MNIST, photographs and SVHN."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from runtime.cli import BadInput
from runtime.hub import first_line
from runtime.images import DAMAGE

Split = Literal["train", "val"]
Pixels = npt.NDArray[np.uint8]

SIDE = 28  # pixels, height and width of every image
PHOTOGRAPH_SIDE = 512  # longer photographs are reduced: a patch should show more than one flat area (BSDS500 has 481)
PHOTOGRAPH_TYPES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
BSDS500 = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/"


@dataclass
class Maker:
    """A number of images, and a function that makes one: index -> (image [28, 28, 3] uint8, label). The order of calls is free."""

    count: int
    make: Callable[[int], tuple[Pixels, int]]


# ---------------------------------------------------------------- MNIST-M


def blend(patch: Pixels, digit: Pixels) -> Pixels:
    """Return `patch` [28, 28, 3] uint8 of a photograph with its negative (255 - patch) where `digit` [28, 28] is above 0.

    As in the published images, any ink counts in full, so the digit has hard edges.
    """
    mask = np.where(digit > 0, 255, 0)[..., None]
    return np.abs(patch - mask).astype(np.uint8)


def random_crop(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Cut 28x28 out of an image [H, W, 3], at a uniformly random position."""
    top, left = (int(rng.integers(size - SIDE + 1)) for size in image.shape[:2])
    return image[top : top + SIDE, left : left + SIDE]


def mnistm_maker(
    mnist: Path | None, downloads: Path, backgrounds: Path, split: Split, random_key: tuple[int, ...]
) -> Maker:
    """Return the maker of MNIST-M: one split of MNIST, blended with patches of photographs that `random_key` decides.

    MNIST is downloaded to `downloads` if `mnist` is None. Raise BadInput for what is missing.
    """
    photographs = find_photographs(backgrounds)
    if mnist is None:
        from torchvision.datasets import MNIST  # slow to import

        try:
            MNIST(str(downloads), download=True)  # unless it is already there
        except RuntimeError as error:
            raise BadInput(f"MNIST download: {first_line(error)}; or give --mnist DIR") from None
    images, labels = read_mnist(mnist or downloads, split)

    def make(index: int) -> tuple[Pixels, int]:
        rng = np.random.default_rng([*random_key, index])
        photograph = load_photograph(photographs[rng.integers(len(photographs))])
        return blend(random_crop(photograph, rng), images[index]), int(labels[index])

    return Maker(len(labels), make)


def find_photographs(folder: Path) -> list[Path]:
    """Return the sorted paths of all images of at least 28x28 in `folder` and its subfolders; raise BadInput if there are none."""
    if not folder.is_dir():
        raise BadInput(f"--backgrounds {folder}: no such folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTOGRAPH_TYPES)
    if not paths:
        raise BadInput(f"--backgrounds {folder}: no pictures in it (jpg, png ..); {BSDS500}")
    large = []
    for path in paths:
        try:
            with Image.open(path) as photograph:
                large += [path] if min(photograph.size) >= SIDE else []
        except (OSError, Image.DecompressionBombError):
            raise BadInput(f"{path} is not a picture: remove it from the backgrounds") from None
    if not large:
        raise BadInput(f"--backgrounds {folder}: all {len(paths)} pictures are smaller than {SIDE}x{SIDE}")
    return large


@lru_cache(maxsize=600)
def load_photograph(path: Path) -> Pixels:
    """Return a photograph [H, W, 3] uint8, reduced until the longer side is 512 or the shorter 28; raise BadInput if it is damaged."""
    try:
        with Image.open(path) as photograph:
            scale = max(PHOTOGRAPH_SIDE / max(photograph.size), SIDE / min(photograph.size))
            colour = photograph.convert("RGB")
    except DAMAGE as error:
        raise BadInput(f"{path} is damaged ({error}): remove it from the backgrounds") from None
    if scale < 1:
        width, height = (max(SIDE, round(scale * size)) for size in colour.size)
        colour = colour.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(colour)


# ---------------------------------------------------------------- MNIST


def read_mnist(folder: Path, split: Split) -> tuple[Pixels, Pixels]:
    """Return images [N, 28, 28] and labels [N], uint8, of one split; "val" is MNIST's test set.

    The folder has torchvision's layout or holds the four files, gzipped or not. Raise BadInput that names a faulty file.
    """
    prefix = "train" if split == "train" else "t10k"
    images_file = _mnist_file(folder, f"{prefix}-images-idx3-ubyte")
    labels_file = _mnist_file(folder, f"{prefix}-labels-idx1-ubyte")
    images, labels = _read_idx(images_file, 3), _read_idx(labels_file, 1)
    if images.shape[1:] != (SIDE, SIDE):
        raise BadInput(f"{images_file}: images of {images.shape[1:]}, not {SIDE}x{SIDE}")
    if len(images) != len(labels) or labels.max(initial=0) > 9:
        raise BadInput(f"{labels_file}: not the labels 0 to 9 of the {len(images)} images")
    return images, labels


def _mnist_file(folder: Path, name: str) -> Path:
    places = (folder, folder / "raw", folder / "MNIST" / "raw")
    for file in (place / f"{name}{packed}" for place in places for packed in ("", ".gz")):
        if file.is_file():
            return file
    raise BadInput(f"--mnist {folder}: neither {name} nor {name}.gz is in it or in its MNIST/raw")


def _read_idx(path: Path, dimensions: int) -> Pixels:
    """Return an IDX file's array. Its bytes: 0, 0, 8 (uint8), number of dimensions, each size as big-endian int32, the values."""
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
    """Return the maker of one split of SVHN in `folder`; with `download`, a missing file is downloaded to it.

    "val" is SVHN's test set. Raise BadInput if the file is missing or not the original.
    """
    from torchvision.datasets import SVHN

    part = "train" if split == "train" else "test"
    try:
        svhn = SVHN(str(folder), part, download=download)
    except RuntimeError as error:
        file = folder / SVHN.split_list[part][1]
        if download:
            raise BadInput(f"{file}: {first_line(error)}; or give --svhn DIR") from None
        raise BadInput(f"--svhn: {file} is absent or not the original; leave the flag out to download it") from None
    return Maker(len(svhn.labels), lambda index: (svhn_image(svhn.data[index]), int(svhn.labels[index])))


def svhn_image(image: Pixels) -> Pixels:
    """Resize an image [3, 32, 32] to [28, 28, 3] uint8. Cropping it would cut wide digits, which touch the border."""
    resized = Image.fromarray(image.transpose(1, 2, 0)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(resized)  # Pillow's resize antialiases
