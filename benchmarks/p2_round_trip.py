"""How exactly pictures come back after inversion to noise: rule bdia from x_T and the state next to it, bdia from x_T alone, plain DDIM.

  python benchmarks/p2_round_trip.py --pictures held_out               100 pictures, 50 steps, fp32
  python benchmarks/p2_round_trip.py --pictures held_out --count 4 --steps 10      a short form
  python benchmarks/p2_round_trip.py --model hw2_data/face/UNet.pt --pictures hw2_data/face/GT

The table shows the peak signal-to-noise ratio on 0..255, from the mean squared error over all pictures. `8 bit` compares the pictures as
they are written, `float` before they are rounded. Rounding alone limits it to 58.9 dB. `the same` counts pictures without any error.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import repository_root  # noqa: F401  # isort: split
import torch
from torch import Tensor

from benchmarks.timing import BENCH
from diffusion.step_rules import Rule
from faces.inversion import invert_all, read_pictures
from faces.models import SHIPPED_FACES
from faces.noises import Noise
from faces.sampling import SamplingArgs, compare, make_config, open_model, psnr, sample_all, to_image
from runtime.cli import BadInput, check_not_negative, check_positive, run_script
from runtime.device import Device, detect
from runtime.record import Record


@dataclass(frozen=True)
class Settings:
    """Settings of the round trip."""

    pictures: Path
    """Folder of pictures that the model was not trained on."""
    model: str = str(SHIPPED_FACES)
    """As P2_ddim.py's."""
    count: int = 100
    """Number of pictures, the first ones by name."""
    steps: int = 50
    """Network calls per picture, each way."""
    batch: int = 0
    """Pictures at once. 0 = as P2_ddim.py's."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    device: Device = "auto"
    record: Path = BENCH / "p2_round_trip.json"


def main(settings: Settings) -> None:
    """Print a line per way back, and record the mean squared error of every picture."""
    check_positive(settings, "count")
    check_not_negative(settings, "batch")
    machine = detect(settings.device)
    record = Record(settings, machine)
    model = open_model(
        SamplingArgs(model=settings.model, precision=settings.precision, device=settings.device), machine
    )
    pictures = read_pictures(settings.pictures, model, None, settings.count)
    if len(pictures) < settings.count:
        raise BadInput(f"--pictures {settings.pictures}: holds {len(pictures)}, --count {settings.count} needs more")

    def noises_by(rule: Rule) -> list[Noise]:
        config = make_config(model, rule, settings.steps, 0.0, 0)
        with record.timed(f"inverting by {rule}"):
            return list(invert_all(model, pictures, config, settings.batch, f"inverting by {rule}"))

    exact, plain = noises_by("bdia"), noises_by("ddim")
    alone = [replace(noise, x_next=None) for noise in exact]
    ways: dict[str, tuple[list[Noise], Rule]] = {
        "bdia with its pair": (exact, "bdia"),
        "bdia from x_T alone": (alone, "bdia"),
        "plain ddim": (plain, "ddim"),
    }
    print(f"{len(pictures)} pictures, {settings.steps} steps, {settings.precision}, {machine.name}")
    print(f"{'way back':<22}{'8 bit, dB':>11}{'worst, dB':>11}{'the same':>10}{'float, dB':>11}{'length of x_T':>15}")
    for way, (noises, rule) in ways.items():
        config = make_config(model, rule, settings.steps, 0.0, 0)
        with record.timed(way):
            images = [image for _, image in sample_all(model, noises, config, settings.batch, way)]
        errors = record.metrics[way] = errors_of(images, [*pictures.values()])
        errors["length of x_T"] = [float(noise.x.square().mean().sqrt()) for noise in noises]
        eight, unrounded, length = (statistics.mean(values) for values in errors.values())
        worst, same = psnr(max(errors["MSE, 8 bit"])), errors["MSE, 8 bit"].count(0)
        print(f"{way:<22}{psnr(eight):>11.1f}{worst:>11.1f}{same:>10}{psnr(unrounded):>11.1f}{length:>15.3f}")
        record.save(settings.record)
    record.save(settings.record, name_it=True)


def errors_of(images: list[Tensor], pictures: list[Tensor]) -> dict[str, list[float]]:
    """Return the mean squared error on 0..255 of each image [3,H,W] in -1..1 from its picture uint8: rounded to 8 bits, and as float."""
    pairs = list(zip(images, pictures, strict=True))
    rounded = [float(compare(to_image(image, "clamp"), picture)["mse"]) for image, picture in pairs]
    grey = [((image.clamp(-1, 1).double() + 1) * 127.5, picture.double()) for image, picture in pairs]
    return {"MSE, 8 bit": rounded, "MSE, float": [float(torch.mean((a - b) ** 2)) for a, b in grey]}


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
