"""The figures of P2, from any model that P2_ddim.py takes: what eta does, slerp against linear interpolation, and why.

  python P2_report.py --to-uint8 clamp                              the shipped face model: no download needed
  python P2_report.py --model face/UNet.pt --noise face/noise      the report's faces

eta.png         a row per eta, a column for each of the first four noises
eta_mse.png     how far the pictures move from those of the first eta
slerp.png, linear.png     from the first noise to the second, in equal steps
noise_norm.png  the length of the noises on these two ways: why linear interpolation fails
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffusion.noise import linear, slerp
from faces.models import Model
from faces.noises import Noise
from faces.sampling import SamplingArgs, compare, open_model, open_noises, resolve_recipe, sample_all, to_image
from runtime.cli import BadInput, run_script
from runtime.device import detect
from runtime.files import output_folder
from runtime.images import labelled_grid, line_figure
from runtime.record import Record

WAYS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"slerp": slerp, "linear": linear}


@dataclass(frozen=True)
class Settings(SamplingArgs):
    """Flags."""

    output: Path = Path("runs/p2_report")
    """Folder for the PNG files and record.json."""
    figures: tuple[Literal["eta", "interpolation"], ...] = ("eta", "interpolation")
    etas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    columns: int = 4
    """Noises in the eta grid."""
    frames: int = 11
    """Pictures on each way from the first noise to the second, both ends included."""


def draw(model: Model, noises: Sequence[Noise], settings: Settings, eta: float, title: str) -> Tensor:
    """[N,C,H,W] uint8."""
    recipe = resolve_recipe(settings, model, eta)
    images = [image for _, image in sample_all(model, noises, recipe, settings.batch, title)]
    return torch.stack([to_image(image, settings.to_uint8) for image in images])


def eta_figures(model: Model, noises: Sequence[Noise], settings: Settings) -> dict[str, list[float]]:
    """Draws the grid and the distances; returns {stem: MSE on 0..255 to the first eta's picture, per eta}."""
    chosen = noises[: settings.columns]
    rows = [draw(model, chosen, settings, eta, f"eta {eta:g}") for eta in settings.etas]
    labels, columns = [f"eta {eta:g}" for eta in settings.etas], [noise.stem for noise in chosen]
    title = "Same noise down each column, more randomness per row"
    labelled_grid(settings.output / "eta.png", torch.cat(rows), labels, columns, title, inch(rows[0]))
    distances = {
        noise.stem: [float(compare(row[index], rows[0][index])["mse"]) for row in rows]
        for index, noise in enumerate(chosen)
    }
    panel = {f"MSE (0..255) to eta {settings.etas[0]:g}": distances}
    line_figure(settings.output / "eta_mse.png", settings.etas, panel, "eta", "How far eta moves the pictures")
    return distances


def interpolation_figures(model: Model, noises: Sequence[Noise], settings: Settings) -> dict[str, list[float]]:
    """Draws both ways at eta 0 and the length of their noises; returns {way: norm / sqrt(dimensions) per alpha}."""
    first, last = noises[:2]
    alphas = [index / (settings.frames - 1) for index in range(settings.frames)]
    norms = {}
    for name, way in WAYS.items():
        frames = [Noise(f"{name}_{alpha:.3f}", way(first.x, last.x, alpha)) for alpha in alphas]
        images = draw(model, frames, settings, 0.0, name)
        path, columns = settings.output / f"{name}.png", [f"{alpha:g}" for alpha in alphas]
        title = f"{name} from noise {first.stem} (0) to noise {last.stem} (1)"
        labelled_grid(path, images, [name], columns, title, inch(images))
        norms[name] = [float(frame.x.norm()) / math.sqrt(frame.x.numel()) for frame in frames]
    panel = {"norm / sqrt(dimensions)": norms}
    line_figure(settings.output / "noise_norm.png", alphas, panel, "alpha", "Length of the noise (the model knows 1)")
    return norms


FIGURES = {
    "eta": (eta_figures, ("eta.png", "eta_mse.png")),
    "interpolation": (interpolation_figures, ("slerp.png", "linear.png", "noise_norm.png")),
}


def inch(images: Tensor) -> float:
    """A side that shows 28 pixels without boredom and 256 without loss, at 160 dots per inch."""
    return max(0.9, min(1.6, images.shape[-1] / 160))


def check(settings: Settings) -> None:
    """Raises BadInput for figures that would have nothing to show."""
    if settings.frames < 2:
        raise BadInput(f"--frames {settings.frames}: both ends are frames, at least 2")
    if settings.columns < 1 or not settings.etas or not settings.figures:
        raise BadInput(f"--columns {settings.columns}, --etas {settings.etas}: nothing to draw")
    for eta in settings.etas:
        if not 0 <= eta <= 1:
            raise BadInput(f"--etas {eta}: must lie in 0 .. 1")


def main(settings: Settings) -> None:
    """Draws the figures that were asked for."""
    check(settings)
    machine = detect(settings.device)
    model = open_model(settings, machine)
    resolve_recipe(settings, model, settings.etas[0])
    noises = open_noises(settings, model)
    if "interpolation" in settings.figures and len(noises) < 2:
        raise BadInput(f"--figures interpolation: needs two noises, {len(noises)} given")
    output_folder(settings.output)
    record = Record(settings, machine)
    for name, (draw_figures, files) in FIGURES.items():
        if name in settings.figures:
            with record.timed(name):
                record.metrics[name] = draw_figures(model, noises, settings)
            print("\n".join(str(settings.output / file) for file in files))
    record.save(settings.output / "record.json")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
