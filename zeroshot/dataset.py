"""Labelled pictures for zero-shot classification: {class}_{image}.png and id2label.json, decoded once and in parallel."""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from runtime.cli import BadInput, log, progress
from runtime.files import read_json
from runtime.images import SUFFIXES

CONVERTIBLE = {"1", "L", "LA", "La", "P", "PA", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"}
KEPT_BYTES = 1 << 30  # decoded pictures held in memory; what is over is decoded again for each model


# ---------------------------------------------------------------- labels


def read_labels(path: Path) -> dict[int, str]:
    """Class id -> name, by id, from a flat object (ids or names as keys) or a list. Raises BadInput, for double names too."""
    content = read_json(path)
    pairs = list(enumerate(content)) if isinstance(content, list) else list(getattr(content, "items", list)())
    if not pairs:
        raise BadInput(f'{path} holds no labels; wanted an object such as {{"0": "bicycle"}} or a list of names')
    if all(isinstance(value, int) for _, value in pairs):
        pairs = [(value, name) for name, value in pairs]
    labels: dict[int, str] = {}
    seen: dict[str, int] = {}
    for key, name in pairs:
        number = _label_id(path, key, name)
        same = seen.setdefault(str(name).replace("_", " ").strip().casefold(), number)
        if number in labels or same != number:
            raise BadInput(
                f"{path}: classes {same} and {number} have the same name or number ({name!r}): nothing tells them apart"
            )
        labels[number] = name.strip()
    return dict(sorted(labels.items()))


def _label_id(path: Path, key: Any, name: Any) -> int:
    """The class id of one entry; raises BadInput where it is not an id with a name."""
    if not isinstance(name, str) or not name.strip():
        raise BadInput(f"{path}, entry {key!r}: the name must be text, it is {str(name)[:60]!r}")
    if not re.fullmatch(r"\d+", str(key)):
        raise BadInput(f"{path}, entry {key!r}: the class id must be a whole number")
    return int(key)


def find_labels(images: Path) -> Path:
    """id2label.json or id.json beside the folder of pictures or in it; raises BadInput where there is none."""
    folders = (images.absolute().parent, images)
    found = [f / name for f in folders for name in ("id2label.json", "id.json") if (f / name).is_file()]
    if not found:
        raise BadInput(f"no id2label.json or id.json in {folders[0]}: name the file with --labels")
    return found[0]


# ---------------------------------------------------------------- pictures


@dataclass
class LabelledImages:
    """The pictures of a folder, by class and name; `truth` [N] int64 is the row of each one's class in `classes`."""

    paths: list[Path]
    truth: Tensor
    classes: dict[int, str]
    kept: list[Image.Image | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def names(self) -> list[str]:
        """The class names, in the order of the classes' ids."""
        return list(self.classes.values())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every file's name and bytes: the same pictures have it wherever they lie."""
        digest = hashlib.sha256()
        for path in self.paths:
            content = path.read_bytes()
            digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def decode(self, workers: int) -> None:
        """Reads every picture once, in parallel, and keeps what fits; raises BadInput for the first broken one."""
        if self.kept:
            return
        modes: dict[str, Path] = {}
        size = 0
        with ThreadPoolExecutor(workers) as pool:
            read = pool.map(read_picture, self.paths)
            for path, (picture, mode) in zip(self.paths, progress(read, "decoding", total=len(self)), strict=True):
                size += 3 * picture.width * picture.height
                self.kept.append(picture if size <= KEPT_BYTES else None)
                if mode != "RGB":
                    modes.setdefault(mode, path)
        for mode, path in modes.items():
            log(f"pictures of mode {mode}, such as {path}, are converted to RGB")

    def open(self, index: int) -> Image.Image:
        """One decoded picture, RGB."""
        return (self.kept[index] if self.kept else None) or read_picture(self.paths[index])[0]


def read_picture(path: Path) -> tuple[Image.Image, str]:
    """The picture as RGB and the mode of its file; raises BadInput where it is broken or deeper than 8 bit."""
    try:
        with Image.open(path) as file:
            mode = file.mode
            picture = file.convert("RGB") if mode in CONVERTIBLE | {"RGB"} else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path} is not a readable picture: {error}") from None
    if picture is None:
        raise BadInput(f"{path} has mode {mode}, which has no clear RGB form: save it with 8 bits per channel")
    return picture, mode


def list_pictures(folder: Path, labels: Path | None = None) -> LabelledImages:
    """All pictures of the folder, none decoded yet; without `labels` the file is looked for.
    Raises BadInput for no picture, a name without a class id, an id without a name."""
    if not folder.is_dir():
        raise BadInput(f"--images {folder} is not a folder; hw2_data/README.md says how to get the pictures")
    labels = labels or find_labels(folder)
    classes = read_labels(labels)
    row = {number: index for index, number in enumerate(classes)}
    found = []
    for path in folder.iterdir():
        if path.name.startswith(".") or path.suffix.lower() not in SUFFIXES:
            continue
        match = re.match(r"(\d+)_.", path.name)
        if not match:
            raise BadInput(
                f"{path}: the name holds no class id, wanted {{class}}_{{image}}{path.suffix}, such as 20_478.png"
            )
        if int(match[1]) not in row:
            raise BadInput(
                f"{path}: class {int(match[1])} is not in {labels}, which has {len(row)} from {min(row)} to {max(row)}"
            )
        found.append((row[int(match[1])], _natural(path.name), path))
    if not found:
        raise BadInput(f"--images {folder} holds no picture ({', '.join(sorted(SUFFIXES))})")
    found.sort()
    return LabelledImages([path for *_, path in found], torch.tensor([index for index, *_ in found]), classes)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts 0_9 before 0_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
