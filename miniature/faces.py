"""Photographs of faces as training data: from a folder or an archive to squares, by person, and randomly cropped."""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.cli import BadInput, progress
from runtime.images import open_image, to_float
from training.draws import Draws

SIDE = 64  # pixels of the model's images
STORED = 80  # pixels of a stored photograph: crops of 72 to 80 pixels become 64
MIN_CROP = 0.9  # side of the smallest crop
SUFFIXES = {".pgm", ".ppm", ".png", ".jpg", ".jpeg", ".bmp", ".webp"}


@dataclass(frozen=True)
class Faces:
    """N photographs [N,3,80,80] uint8 and the name of each one's person: its subfolder, or without subfolders its file."""

    images: Tensor
    people: list[str]

    def of(self, people: Sequence[str]) -> Tensor:
        """Return the photographs of these people alone."""
        return self.images[[person in people for person in self.people]]


def load_faces(source: Path) -> Faces:
    """Load all images of a folder, with its subfolders, or of a tar archive; raise BadInput where there are none."""
    if source.is_dir():
        return _from_folder(source, source)
    if not source.is_file():
        raise BadInput(
            f"--faces {source}: no such folder or archive; the shipped model learned from the ORL faces "
            "(faces_orl.tar.gz: a folder of 10 pictures for each of 40 people)"
        )
    with TemporaryDirectory() as folder:
        try:
            with tarfile.open(source) as file:
                images = [member for member in file if Path(member.name).suffix.lower() in SUFFIXES]
                file.extractall(folder, images, filter="data")  # refuses what would land outside
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            raise BadInput(f"--faces {source}: neither a folder nor a whole tar archive ({error})") from None
        return _from_folder(Path(folder), source)


def _from_folder(folder: Path, source: Path) -> Faces:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise BadInput(f"--faces {source}: no pictures there ({', '.join(sorted(SUFFIXES))})")
    top = Path(os.path.commonpath([path.parent for path in paths]))
    apart = any(path.parent != top for path in paths)
    names = [(path.parent if apart else path).relative_to(top).as_posix() for path in paths]
    images = [to_square(open_image(path)) for path in progress(paths, "reading faces", leave=False)]
    return Faces(torch.stack(images), names)


def to_square(image: Tensor) -> Tensor:
    """Crop [3,H,W] uint8 to its central square and resize it to [3,80,80] uint8."""
    from torchvision.transforms.v2.functional import center_crop, resize  # slow to import

    square: Tensor = resize(center_crop(image, [min(image.shape[1:])] * 2), [STORED, STORED], antialias=True)
    return square


def held_out_people(faces: Faces, count: int, seed: int) -> list[str]:
    """Choose `count` people who are not trained on; raise BadInput when nobody would be left."""
    people = sorted(set(faces.people))
    if not 1 <= count < len(people):
        raise BadInput(f"--held-out {count}: there are {len(people)} people, leave out at least one and not all")
    return sorted(Random(seed).sample(people, count))


# ---------------------------------------------------------------- crops


def crop(x: Tensor, scale: Tensor, right: Tensor, down: Tensor, flip: Tensor) -> Tensor:
    """Crop [N,3,80,80] to [N,3,64,64]: squares of side `scale` (up to 1), mirrored where `flip`; all [N].

    `right` and `down`, -1..1, move the square by a share of what its side leaves free: a crop never leaves its photograph.
    """
    zero, free = torch.zeros_like(scale), 1 - scale
    across = torch.where(flip, -scale, scale)
    rows = torch.stack([across, zero, right * free, zero, scale, down * free], 1)
    grid = F.affine_grid(rows.view(-1, 2, 3), [len(x), 3, SIDE, SIDE], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def random_crops(images: Tensor, draws: Draws) -> Tensor:
    """Return a batch [B,3,64,64] in -1..1 of random photographs of [N,3,80,80] uint8."""
    rows = (draws.uniform() * len(images)).long()
    scale = MIN_CROP + (1 - MIN_CROP) * draws.uniform()
    right, down = 2 * draws.uniform() - 1, 2 * draws.uniform() - 1
    return crop(to_float(images[rows]), scale, right, down, draws.uniform() < 0.5)


def central_crops(images: Tensor) -> Tensor:
    """Return every photograph in the crop that is training's mean: [N,3,64,64] in -1..1."""
    scale = torch.full((len(images),), (1 + MIN_CROP) / 2, device=images.device)
    still = torch.zeros_like(scale)
    return crop(to_float(images), scale, still, still, still > 0)


def training_crops(images: Tensor) -> Tensor:
    """Return crops that span those of training: large and small, central and at the corners, mirrored too: [12N,3,64,64]."""
    places = [(1.0, 0, 0), (MIN_CROP + 0.05, 0, 0)] + [(MIN_CROP, x, y) for x in (-0.7, 0.7) for y in (-0.7, 0.7)]
    crops, still = [], torch.zeros(len(images))
    for scale, right, down in places:
        for flip in (False, True):
            flips = torch.full((len(images),), flip)
            crops.append(crop(to_float(images), still + scale, still + right, still + down, flips))
    return torch.cat(crops)
