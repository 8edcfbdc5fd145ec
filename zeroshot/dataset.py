"""Labelled images for zero-shot classification: {class}_{image}.png and id2label.json, or a folder per class."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import NonNegativeInt, StringConstraints
from torch import Tensor

from runtime.cli import BadInput, log
from runtime.files import list_files, read_json, visible
from runtime.images import SUFFIXES, image_file, images_by_class, to_rgb
from runtime.validation import validate

ClassName = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


# ---------------------------------------------------------------- labels


def read_labels(path: Path) -> dict[int, str]:
    """Return {class id: name}, sorted by id, from a JSON file: a list of names, {id: name} or {name: id}.

    Raise BadInput for anything else, and for two classes with the same id or name (see `plain_name`).
    """
    content = read_json(path)
    if not content or not isinstance(content, list | dict):
        raise BadInput(f'{path} holds no labels; wanted an object such as {{"0": "bicycle"}} or a list of names')
    pairs: list[tuple[Any, Any]] = list(content.items() if isinstance(content, dict) else enumerate(content))
    if all(isinstance(value, int) for _, value in pairs):
        pairs = [(number, name) for name, number in pairs]

    labels = validate(dict[NonNegativeInt, ClassName], dict(pairs), str(path))
    _check_distinct(labels.values(), path)
    if len(labels) < len(pairs):
        raise BadInput(f"{path}: {len(pairs)} names have only {len(labels)} numbers, so two have the same")
    return dict(sorted(labels.items()))


def plain_name(name: str) -> str:
    """Return a class name in lower case with spaces for underscores: the form in which names are compared."""
    return name.replace("_", " ").casefold()


def _check_distinct(names: Iterable[str], path: Path) -> None:
    name, times = Counter(map(plain_name, names)).most_common(1)[0]
    if times > 1:
        raise BadInput(f"{path}: {times} classes have the same name ({name!r}): nothing tells them apart")


def find_labels(folder: Path) -> Path:
    """Return id2label.json or id.json from the parent of the folder of images, else from the folder. Raise BadInput if neither exists."""
    parent = folder.absolute().parent
    for path in (place / name for place in (parent, folder) for name in ("id2label.json", "id.json")):
        if path.is_file():
            return path
    raise BadInput(f"no id2label.json or id.json in {parent}: name the file with --labels")


# ---------------------------------------------------------------- images


@dataclass
class LabelledImages:
    """The images of a folder, sorted by class and name, and their true classes: `truth` [N] int64 indexes `names`."""

    paths: list[Path]
    truth: Tensor
    classes: dict[int, str]
    modes: set[str] = field(default_factory=lambda: {"RGB"})
    """PIL modes of the files opened so far."""
    by_folder: bool = False
    """Whether there is a folder per class. An image's name then includes the folder's name."""

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def names(self) -> list[str]:
        """The class names, sorted by class id."""
        return list(self.classes.values())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the name and content of every file, independent of where the folder lies."""
        digest = hashlib.sha256()
        for row, path in enumerate(self.paths):
            content = path.read_bytes()
            digest.update(f"{self.file(row)}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    @property
    def folder(self) -> Path:
        """The folder that was listed."""
        return self.paths[0].parents[int(self.by_folder)]

    def file(self, row: int) -> str:
        """Return the name of image `row`: 20_478.png, or with a folder per class beetle/478.png."""
        path = self.paths[row]
        return f"{path.parent.name}/{path.name}" if self.by_folder else path.name

    def open(self, index: int) -> Image.Image:
        """Return an image as RGB. Log the first image of each mode other than RGB. Raise BadInput if it can't be read."""
        path = self.paths[index]
        with image_file(path) as file:
            mode, image = file.mode, to_rgb(file)
        if mode not in self.modes:
            self.modes.add(mode)
            log(f"pictures of mode {mode}, such as {path}, are converted to RGB")
        return image


def list_images(folder: Path, labels: Path | None = None) -> LabelledImages:
    """List the images of a folder, {class}_{image}.png, or those of its folders, one per class. No image is decoded.

    `labels` None = `find_labels`. With a folder per class it must be None: the folders' names are the classes.
    Raise BadInput for an empty folder, a mixture of both layouts, a file name without a class id, and an id without a class name.
    """
    if not folder.is_dir():
        raise BadInput(f"--images {folder} is not a folder; hw2_data/README.md says how to get the pictures")
    files = list_files(folder, SUFFIXES)
    folders = [path for path in visible(folder) if path.is_dir()]
    if folders and not files:
        return _class_folders(folder, labels)
    if filled := next((path for path in folders if list_files(path, SUFFIXES)), None):
        raise BadInput(
            f"--images {folder} holds pictures, such as {files[0].name}, and folders of pictures, such as {filled.name}:"
            " give {class}_{image}.png, or a folder per class"
        )
    if not files:
        raise BadInput(f"--images {folder} holds no picture ({', '.join(sorted(SUFFIXES))})")
    labels = labels or find_labels(folder)
    classes = read_labels(labels)
    rows = {number: row for row, number in enumerate(classes)}
    images = []
    for path in files:
        match = re.match(r"(\d+)_.", path.name)
        if not match:
            example = f"{{class}}_{{image}}{path.suffix}, such as 20_478.png"
            raise BadInput(f"{path}: the name holds no class id, wanted {example}")
        number = int(match[1])
        if number not in rows:
            span = f"{len(rows)} from {min(rows)} to {max(rows)}"
            raise BadInput(f"{path}: class {number} is not in {labels}, which has {span}")
        # digits compare as numbers, so that 0_9 comes before 0_10
        parts = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
        images.append((rows[number], parts, path))
    images.sort()
    return LabelledImages([path for *_, path in images], torch.tensor([row for row, *_ in images]), classes)


def _class_folders(folder: Path, labels: Path | None) -> LabelledImages:
    if labels:
        raise BadInput(f"--labels {labels}: the class names are those of the folders in {folder}, leave --labels out")
    classes = images_by_class(folder)
    _check_distinct(classes, folder)
    truth = [row for row, paths in enumerate(classes.values()) for _ in paths]
    paths = [path for paths in classes.values() for path in paths]
    return LabelledImages(paths, torch.tensor(truth), dict(enumerate(classes)), by_folder=True)
