"""The noises that P2's images start from: read from files, drawn from seeds, interpolated or mixed.

NN.pt holds the noise x_T named NN. NN.pair.safetensors holds x_T and x_next, the first two states of step rule bdia.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffusion.noise import draw, generators, mean
from diffusion.step_rules import Steps
from faces.models import Model
from runtime.cli import BadInput, check_seed
from runtime.files import (
    atomic,
    list_files,
    load_safetensors,
    load_tensors,
    output_folder,
    require_file,
    save_safetensors,
)
from runtime.weights import describe

SEEDS = "0-9"  # the default of --seeds
PAIR = ".pair.safetensors"  # next to NN.pt: x_T and the state after it, for rule bdia
Interpolate = Callable[[Tensor, Tensor, float], Tensor]  # a, b and the share of b
MOST_SEEDS = 100_000  # their noises are held in memory at once


@dataclass(frozen=True)
class Noise:
    """The start x = x_T [C,H,W] float32 of one image, and the stem of its file names. The stem also seeds the noise that eta > 0 adds.

    x_next [C,H,W] is the state after x_T. Only an inversion by rule bdia gives it.
    """

    stem: str
    x: Tensor
    x_next: Tensor | None = None


def open_noises(model: Model, folder: Path | None, seeds: str, size: int | None) -> list[Noise]:
    """Read the noises in `folder`, or if it is None draw those of `seeds` at `size`; raise BadInput for a folder with seeds or size."""
    if folder and (seeds != SEEDS or size):
        raise BadInput(f"--noise {folder} and {f'--size {size}' if size else f'--seeds {seeds}'}: give one of them")
    return read_noises(folder, model) if folder else seeded_noises(parse_seeds(seeds), model, size)


def parse_seeds(text: str) -> list[int]:
    """Return the seeds in a text: "0-3,7" gives 0, 1, 2, 3 and 7. Raise BadInput for another form, a repeated seed, or too many."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,99})(?:-(\d{1,99}))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise BadInput(f"--seeds {text}: {part!r} is neither a number nor a range such as 0-9")
        first, last = int(match[1]), check_seed(int(match[2] or match[1]), "--seeds")
        if len(seeds) + last - first >= MOST_SEEDS:
            raise BadInput(f"--seeds {text}: at most {MOST_SEEDS:,} at once")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise BadInput(f"--seeds {text}: names a seed twice")
    return seeds


def read_noises(folder: Path, model: Model) -> list[Noise]:
    """Read every visible .pt file of the folder, sorted by name; raise BadInput for the first that does not fit the model or the rest."""
    paths = list_files(folder, {".pt"}) if folder.is_dir() else []
    if not paths:
        raise BadInput(
            f"--noise {folder}: no .pt file there" if folder.is_dir() else f"--noise {folder}: no such folder"
        )
    noises = [Noise(path.stem, read_noise(path, model)) for path in paths]
    if len({noise.stem for noise in noises}) < len(noises):  # 00.pt and 00.PT
        raise BadInput(f"--noise {folder}: two files differ in their suffix only, and would give one image")
    for path, noise in zip(paths, noises, strict=True):
        if noise.x.shape != noises[0].x.shape:
            raise BadInput(f"{path}: {list(noise.x.shape)}, but {paths[0].name} is {list(noises[0].x.shape)}")
    return noises


def read_noise(path: Path, model: Model) -> Tensor:
    """Return one noise as [C,H,W] float32; raise BadInput unless the file holds one finite tensor of a size that the model takes."""
    content = load_tensors(path)
    if not isinstance(content, Tensor) or not content.is_floating_point():
        kind = str(content.dtype) if isinstance(content, Tensor) else describe(content) or type(content).__name__
        raise BadInput(f"{path}: holds {kind}, not a tensor of floating-point noise")
    x = content.float()  # before the check: some 8-bit types have none
    shape = tuple(x.shape[1:]) if x.dim() == 4 and len(x) == 1 else tuple(x.shape)
    if reason := model.shape_error(shape):
        raise BadInput(f"{path}: {list(x.shape)}, {reason}")
    if not x.isfinite().all():
        raise BadInput(f"{path}: holds {int((~x.isfinite()).sum())} values that are NaN or infinite")
    return x.reshape(shape)


def seeded_noises(seeds: Sequence[int], model: Model, size: int | None) -> list[Noise]:
    """Draw the noise of each seed, with `size` pixels per side (None = the model's). The stems are the seeds: 00, 01 .."""
    shape = model.shape if size is None else (model.shape[0], size, size)
    if reason := model.shape_error(shape):
        raise BadInput(f"--size {size}: {reason}")
    x = draw(generators(seeds), shape, torch.device("cpu"))
    return [Noise(f"{seed:02d}", one) for seed, one in zip(seeds, x, strict=True)]


def with_pairs(noises: Sequence[Noise], folder: Path, steps: Steps) -> list[Noise]:
    """Return the noises with x_next from NN.pair.safetensors in `folder`; without any such file, return them unchanged.

    Raise BadInput if only some noises have this file, or if its timesteps differ from `steps` or its x_T from NN.pt.
    """
    paths = [folder / f"{noise.stem}{PAIR}" for noise in noises]
    if not any(path.is_file() for path in paths):
        return list(noises)
    return [replace(noise, x_next=read_pair(path, noise, steps)) for noise, path in zip(noises, paths, strict=True)]


def read_pair(path: Path, noise: Noise, steps: Steps) -> Tensor:
    """Return x_next [C,H,W] float32 from the NN.pair.safetensors of one noise; raise BadInput as `with_pairs` does."""
    states, facts = load_safetensors(require_file(path, "other noises have their pair, invert its picture again"))
    if {name: tensor.shape for name, tensor in states.items()} != dict.fromkeys(("x_T", "x_next"), noise.x.shape):
        raise BadInput(f"{path}: holds no x_T and x_next of shape {list(noise.x.shape)}")
    if facts != (expected := pair_facts(steps)):
        raise BadInput(f"{path}: has {facts}, this run has {expected}: give the --steps of its inversion")
    if not torch.equal(states["x_T"].float(), noise.x):
        raise BadInput(f"{path}: its x_T is not that of {noise.stem}.pt; without this file the noise alone is used")
    if not states["x_next"].isfinite().all():
        raise BadInput(f"{path}: holds values that are NaN or infinite")
    return states["x_next"].float()


def pair_facts(steps: Steps) -> dict[str, str]:
    """Return the header of a NN.pair.safetensors: the number of steps and the first two timesteps."""
    return {"steps": str(len(steps.pairs)), "timesteps": "{} {}".format(*steps.pairs[0])}


def noises_between(a: Noise, b: Noise, frames: int, interpolate: Interpolate) -> list[Noise]:
    """Return `frames` noises (2 or more) from a to b in equal steps, both included, by `interpolate`."""
    shares = [frame / (frames - 1) for frame in range(frames)]
    return [Noise(f"{a.stem}-{b.stem}-{share:.3f}", interpolate(a.x, b.x, share)) for share in shares]


def mix(noises: Sequence[Noise], text: str) -> Noise:
    """Return the mean of noises with the weights in a text, as in `parse_weights`, renormalised to unit variance."""
    weights = parse_weights(text, [noise.stem for noise in noises])
    by_stem = {noise.stem: noise.x for noise in noises}
    return Noise("mix", mean([by_stem[stem] for stem in weights], list(weights.values())))


def parse_weights(text: str, stems: Sequence[str]) -> dict[str, float]:
    """Return {stem: weight} of a text such as "0=0.5,1=0.3,2=0.2"; 0 also stands for the stem 00.

    Raise BadInput for another form, an unknown stem, a negative weight, or only zeros.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            weight = float(value)
        except ValueError:
            raise BadInput(f"--mix {text}: {part!r} is no NOISE=WEIGHT, such as 0=0.5") from None
        stem = next((stem for stem in (name, name.zfill(2)) if stem in stems), None)
        if stem is None:
            shown = ", ".join(stems[:10]) + (" .." if len(stems) > 10 else "")
            raise BadInput(f"--mix {text}: there is no noise {name!r} among {shown} (--noise or --seeds gives them)")
        if stem in weights:
            raise BadInput(f"--mix {text}: names noise {name} twice")
        if not 0 <= weight < math.inf:
            raise BadInput(f"--mix {text}: the weight of noise {name} must be a number from zero on")
        weights[stem] = weight
    if not any(weights.values()):
        raise BadInput(f"--mix {text}: all weights are zero")
    return weights


def save_noises(folder: Path, noises: Sequence[Noise], steps: Steps | None = None) -> None:
    """Write each noise atomically to NN.pt as [1,C,H,W]. With an x_next, also write x_T and x_next to NN.pair.safetensors.

    `steps` gives the timesteps of these two states. None = no such file is written.
    """
    output_folder(folder, "--save-noise")
    for noise in noises:
        if noise.x_next is not None and steps:
            states = {"x_T": noise.x.contiguous(), "x_next": noise.x_next.contiguous()}
            save_safetensors(folder / f"{noise.stem}{PAIR}", states, pair_facts(steps))
        with atomic(folder / f"{noise.stem}.pt") as temporary:
            torch.save(noise.x[None].clone(), temporary)
