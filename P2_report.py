"""Draw the figures of P2 from any model of P2_ddim.py: the effect of eta, and slerp against linear interpolation.

  python P2_report.py --to-uint8 clamp                              the shipped face model: no download needed
  python P2_report.py --model face/UNet.pt --noise face/noise      the report's faces

eta.png         one row per eta, one column for each of the first four noises
eta_mse.png     distance of the images to those of the first eta
slerp.png, linear.png     from the first noise to the second, in equal steps
noise_norm.png  norm of the interpolated noises: why linear interpolation fails
"""

from __future__ import annotations

import runtime.interrupts  # noqa: F401

# isort: split
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffusion.noise import linear, slerp
from faces.models import Model
from faces.noises import Noise, open_noises
from faces.sampling import DdimConfig, SamplingArgs, ToUint8, compare, make_config, open_model, sample_all, to_image
from runtime.cli import BadInput, check_not_negative, run_script
from runtime.device import detect
from runtime.files import output_folder
from runtime.images import labelled_grid, line_figure
from runtime.record import Record


@dataclass(frozen=True)
class Settings(SamplingArgs):
    """Sampling, and the figures to draw."""

    output: Path = Path("runs/p2_report")
    """Folder for the PNG files and record.json."""
    figures: tuple[Literal["eta", "interpolation"], ...] = ("eta", "interpolation")
    """Which figures to draw."""
    etas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Rows of the eta grid, each 0 .. 1."""
    columns: int = 4
    """Noises in the eta grid."""
    frames: int = 11
    """Images from the first noise to the second, both ends included."""


def main(settings: Settings) -> None:
    """Draw the figures, record their numbers."""
    # Figures that would show nothing are refused
    check_not_negative(settings, "batch")
    if settings.frames < 2:
        raise BadInput(f"--frames {settings.frames}: both ends are frames, at least 2")
    if settings.columns < 1 or not settings.etas or not settings.figures:
        raise BadInput(f"--columns {settings.columns}, --etas {settings.etas}: nothing to draw")
    for eta in settings.etas:
        if not 0 <= eta <= 1:
            raise BadInput(f"--etas {eta}: must lie in 0 .. 1")

    # Model and noises
    machine = detect(settings.device)
    model = open_model(settings, machine)
    configs = [make_config(model, settings.rule, settings.steps, eta, settings.seed) for eta in settings.etas]
    deterministic = make_config(model, settings.rule, settings.steps, 0.0, settings.seed)
    noises = open_noises(model, settings.noise, settings.seeds, settings.size)
    if "interpolation" in settings.figures and len(noises) < 2:
        raise BadInput(f"--figures interpolation: needs two noises, {len(noises)} given")

    folder = output_folder(settings.output)
    record = Record(settings, machine)
    draw = partial(sample_images, model, settings.batch, settings.to_uint8)

    if "eta" in settings.figures:
        with record.timed("eta"):
            columns = noises[: settings.columns]
            rows = [draw(columns, config, f"eta {config.eta:g}") for config in configs]
            record.metrics["eta"] = distances = eta_distances(columns, rows)
            record.save(folder / "record.json")
            eta_figures(folder, settings.etas, rows, distances)
        print(folder / "eta.png", folder / "eta_mse.png", sep="\n")

    if "interpolation" in settings.figures:
        with record.timed("interpolation"):
            alphas = [index / (settings.frames - 1) for index in range(settings.frames)]
            norms = record.metrics["interpolation"] = {}
            for name, interpolate in (("slerp", slerp), ("linear", linear)):
                frames = [
                    Noise(f"{name}_{alpha:.3f}", interpolate(noises[0].x, noises[1].x, alpha)) for alpha in alphas
                ]
                images = draw(frames, deterministic, name)
                title = f"{name} from noise {noises[0].stem} (0) to noise {noises[1].stem} (1)"
                labels = [f"{alpha:g}" for alpha in alphas]
                labelled_grid(folder / f"{name}.png", images, [name], labels, title, side_in_inches(images))
                norms[name] = [float(frame.x.norm()) / math.sqrt(frame.x.numel()) for frame in frames]
            title = "Length of the noise (the model knows 1)"
            line_figure(folder / "noise_norm.png", alphas, {"norm / sqrt(dimensions)": norms}, "alpha", title)
        print(*(folder / f"{name}.png" for name in ("slerp", "linear", "noise_norm")), sep="\n")

    record.save(folder / "record.json")


def sample_images(
    model: Model, batch: int, to_uint8: ToUint8, noises: list[Noise], config: DdimConfig, title: str
) -> Tensor:
    """Sample one image per noise: [N,C,H,W] uint8."""
    images = [image for _, image in sample_all(model, noises, config, batch, title)]
    return torch.stack([to_image(image, to_uint8) for image in images])


def eta_distances(noises: list[Noise], rows: list[Tensor]) -> dict[str, list[float]]:
    """Return {stem: MSE on 0..255 to the first eta's image, per eta} of images [N,C,H,W] uint8 per eta."""
    return {
        noise.stem: [float(compare(row[column], rows[0][column])["mse"]) for row in rows]
        for column, noise in enumerate(noises)
    }


def eta_figures(folder: Path, etas: tuple[float, ...], rows: list[Tensor], distances: dict[str, list[float]]) -> None:
    """Draw the grid of the images [N,C,H,W] uint8 per eta, and their distances."""
    labels, title = [f"eta {eta:g}" for eta in etas], "Same noise down each column, more randomness per row"
    labelled_grid(folder / "eta.png", torch.cat(rows), labels, [*distances], title, side_in_inches(rows[0]))
    panel = {f"MSE (0..255) to eta {etas[0]:g}": distances}
    line_figure(folder / "eta_mse.png", etas, panel, "eta", "How far eta moves the pictures")


def side_in_inches(images: Tensor) -> float:
    """Return an image's side in a figure of 160 dots per inch: large enough for 28 pixels, lossless up to 256."""
    return max(0.9, min(1.6, images.shape[-1] / 160))


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
