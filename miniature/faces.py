"""Photographs of faces as training data: from a folder or an archive to squares, by person, and cut differently at every look."""

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
from torchvision.transforms.v2.functional import center_crop, resize

from runtime.cli import BadInput, progress
from runtime.images import open_image
from training.draws import Draws

SIDE = 64  # what the model draws
STORED = 80  # what is kept of a photograph: cuts of 72 to 80 pixels become 64
LEAST = 0.9  # side of the smallest cut
SUFFIXES = {".pgm", ".ppm", ".png", ".jpg", ".jpeg", ".bmp", ".webp"}


@dataclass(frozen=True)
class Faces:
    """N photographs [N,3,80,80] uint8 and the name of each one's person; people are subfolders, else each picture is its own."""

    images: Tensor
    people: list[str]

    def of(self, people: Sequence[str]) -> Tensor:
        """The photographs of these people alone."""
        return self.images[[person in people for person in self.people]]


def load_faces(source: Path) -> Faces:
    """All pictures of a folder, with its subfolders, or of a tar archive. Raises BadInput."""
    if source.is_dir():
        return _from_folder(source, source)
    if not source.is_file():
        raise BadInput(
            f"--faces {source}: no such folder or archive; the shipped model learned from the ORL faces "
            "(faces_orl.tar.gz: a folder of 10 pictures for each of 40 people)"
        )
    with TemporaryDirectory() as folder:
        _unpack(source, folder)
        return _from_folder(Path(folder), source)


def _unpack(archive: Path, folder: str) -> None:
    """Only the pictures, and none that would land outside `folder`."""
    try:
        with tarfile.open(archive) as file:
            pictures = [member for member in file if Path(member.name).suffix.lower() in SUFFIXES]
            file.extractall(folder, pictures, filter="data")
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise BadInput(f"--faces {archive}: neither a folder nor a whole tar archive ({error})") from None


def _from_folder(folder: Path, source: Path) -> Faces:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise BadInput(f"--faces {source}: no pictures there ({', '.join(sorted(SUFFIXES))})")
    top = Path(os.path.commonpath([path.parent for path in paths]))
    apart = any(path.parent != top for path in paths)
    names = [(path.parent if apart else path).relative_to(top).as_posix() for path in paths]
    images = [squared(open_image(path)) for path in progress(paths, "reading faces", leave=False)]
    return Faces(torch.stack(images), names)


def squared(image: Tensor) -> Tensor:
    """[3,H,W] uint8 -> its central square, [3,80,80] uint8."""
    return resize(center_crop(image, [min(image.shape[1:])] * 2), [STORED, STORED], antialias=True)


def held_out_people(faces: Faces, count: int, seed: int) -> list[str]:
    """`count` people whom training never sees; raises BadInput when nobody would be left."""
    people = sorted(set(faces.people))
    if not 1 <= count < len(people):
        raise BadInput(f"--held-out {count}: there are {len(people)} people, leave out at least one and not all")
    return sorted(Random(seed).sample(people, count))


# ---------------------------------------------------------------- cuts


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in -1..1."""
    return images.float() / 127.5 - 1


def cut(x: Tensor, scale: Tensor, right: Tensor, down: Tensor, flip: Tensor) -> Tensor:
    """[N,3,80,80] -> [N,3,64,64]: squares of side `scale` (up to 1), moved by -1..1 of what their side leaves free, mirrored where
    `flip`; all [N]. A cut never leaves its photograph."""
    zero, free = torch.zeros_like(scale), 1 - scale
    across = torch.where(flip, -scale, scale)
    rows = torch.stack([across, zero, right * free, zero, scale, down * free], 1)
    grid = F.affine_grid(rows.view(-1, 2, 3), [len(x), 3, SIDE, SIDE], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def random_cuts(images: Tensor, draws: Draws) -> Tensor:
    """A batch [B,3,64,64] in -1..1 of random photographs of [N,3,80,80] uint8."""
    rows = (draws.uniform() * len(images)).long()
    scale = LEAST + (1 - LEAST) * draws.uniform()
    right, down = 2 * draws.uniform() - 1, 2 * draws.uniform() - 1
    return cut(to_float(images[rows]), scale, right, down, draws.uniform() < 0.5)


def middle_cuts(images: Tensor) -> Tensor:
    """Every photograph as training shows it on average: [N,3,64,64] in -1..1."""
    scale = torch.full((len(images),), (1 + LEAST) / 2, device=images.device)
    still = torch.zeros_like(scale)
    return cut(to_float(images), scale, still, still, still > 0)
