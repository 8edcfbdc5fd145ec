"""Turn pictures into noises: the step rules of DDIM, run in reverse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageOps
from torch import Tensor

from faces.models import Model
from faces.noises import Noise
from faces.sampling import DdimConfig, SamplingArgs, walk_all
from runtime.cli import BadInput, log
from runtime.distributed import ALONE, Shard
from runtime.files import list_files
from runtime.images import SUFFIXES, check_finite, read_image, to_float, to_tensor

Args = TypeVar("Args", bound=SamplingArgs)


def at_guidance_1(args: Args) -> Args:
    """Return the flags with guidance 1 for an inversion; without --digit they stay unchanged. Raise BadInput for another --guidance."""
    if args.guidance not in (None, 1):
        raise BadInput(f"--guidance {args.guidance}: inversion runs at guidance 1, leave it out")
    return args if args.digit is None else replace(args, guidance=1.0)


def read_pictures(folder: Path, model: Model, size: int | None, most: int | None = None) -> dict[str, Tensor]:
    """Return {stem: [3,H,W] uint8} of the first `most` pictures in a folder (None = all), sorted by name, as `read_picture` does.

    Raise BadInput for no pictures or two with one stem.
    """
    if not folder.is_dir():
        raise BadInput(f"--invert {folder}: " + ("a file, name its folder" if folder.exists() else "no such folder"))
    files = list_files(folder, SUFFIXES)
    paths = {path.stem: path for path in files}
    if not paths:
        raise BadInput(f"--invert {folder}: no picture there ({', '.join(sorted(SUFFIXES))})")
    if double := next((path for path in files if paths[path.stem] != path), None):
        raise BadInput(
            f"--invert {folder}: {double.name} and {paths[double.stem].name} would give one noise, rename one"
        )
    return {stem: read_picture(path, model, size) for stem, path in sorted(paths.items())[:most]}


def read_picture(path: Path, model: Model, size: int | None) -> Tensor:
    """Return a picture [3,H,W] uint8 in the model's size, or `size` x `size`; log a line if it is cropped and resized.

    Raise BadInput for a size or a model that does not fit.
    """
    channels, height, width = model.shape if size is None else (model.shape[0], size, size)
    if reason := model.shape_error((channels, height, width)):
        raise BadInput(f"--size {size}: {reason}")
    if channels != 3:
        raise BadInput(f"{path}: a picture has 3 channels, --model {model.name} takes {channels}")
    image = read_image(path)
    if image.size != (width, height):
        log(f"{path}: {image.width}x{image.height}, its middle is resized to {width}x{height}")
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return to_tensor(image)


def invert_all(
    model: Model, pictures: Mapping[str, Tensor], config: DdimConfig, batch: int, title: str, shard: Shard = ALONE
) -> Iterator[Noise]:
    """Yield the Noise of each picture {stem: [3,H,W] uint8}, one by one, as their batches finish.

    Rule bdia also gives x_next, which drawing the picture again needs. Raise BadInput for NaN.
    """
    starts = [Noise(stem, to_float(picture)) for stem, picture in pictures.items()]
    inverse = replace(config, steps=config.steps.backwards())
    for start, states in walk_all(model, starts, inverse, batch, title, shard):
        yield Noise(start.stem, *check_finite(states))
