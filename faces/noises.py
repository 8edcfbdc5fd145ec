"""The noises that P2's pictures start from: files as the course gives them, or seeds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusion.noise import draw, generators
from faces.models import Model
from runtime.cli import BadInput
from runtime.files import atomic, load_tensors, output_folder


@dataclass(frozen=True)
class Noise:
    """What one picture starts from: x_T [C,H,W] float32, and the stem of its file, which also names its noise stream."""

    stem: str
    x: Tensor


def parse_seeds(text: str) -> list[int]:
    """ "0-3,7" -> [0, 1, 2, 3, 7]; raises BadInput."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise BadInput(f"--seeds {text}: {part!r} is neither a number nor a range such as 0-9")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(seeds)) < len(seeds):
        raise BadInput(f"--seeds {text}: names a seed twice")
    return seeds


def read_noises(folder: Path, model: Model) -> list[Noise]:
    """Every NN.pt of the folder, by name; raises BadInput for the first that the model can't start from."""
    paths = sorted(folder.glob("*.pt")) if folder.is_dir() else []
    if not paths:
        raise BadInput(
            f"--noise {folder}: no .pt file there" if folder.is_dir() else f"--noise {folder}: no such folder"
        )
    noises = [Noise(path.stem, read_noise(path, model)) for path in paths]
    for path, noise in zip(paths, noises, strict=True):
        if noise.x.shape != noises[0].x.shape:
            raise BadInput(f"{path}: {list(noise.x.shape)}, but {paths[0].name} is {list(noises[0].x.shape)}")
    return noises


def read_noise(path: Path, model: Model) -> Tensor:
    """[C,H,W] float32; raises BadInput when it isn't one finite noise of a size that the model takes."""
    x = load_tensors(path)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise BadInput(f"{path}: holds {found}, not a tensor of floating-point noise")
    shape = tuple(x.shape[1:]) if x.dim() == 4 and len(x) == 1 else tuple(x.shape)
    if reason := model.shape_error(shape):
        raise BadInput(f"{path}: {list(x.shape)}, {reason}")
    if not x.isfinite().all():
        raise BadInput(f"{path}: holds {int((~x.isfinite()).sum())} values that are NaN or infinite")
    return x.reshape(shape).float()


def seeded_noises(seeds: Sequence[int], model: Model, size: int | None) -> list[Noise]:
    """The noise of each seed, whatever else is drawn; stems are the seeds with at least two digits."""
    shape = model.shape if size is None else (model.shape[0], size, size)
    if reason := model.shape_error(shape):
        raise BadInput(f"--size {size}: {reason}")
    x = draw(generators(seeds), shape, torch.device("cpu"))
    return [Noise(f"{seed:02d}", one) for seed, one in zip(seeds, x, strict=True)]


def save_noises(folder: Path, noises: Sequence[Noise]) -> None:
    """One NN.pt [1,C,H,W] each, atomically."""
    output_folder(folder)
    for noise in noises:
        with atomic(folder / f"{noise.stem}.pt") as temporary:
            torch.save(noise.x[None].clone(), temporary)
