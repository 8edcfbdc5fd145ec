"""Draw the figures of P2 from any model of P2_ddim.py: eta, slerp against linear interpolation, pictures and their noises, animations.

  python P2_report.py --to-uint8 clamp                              the shipped face model: no download needed
  python P2_report.py --model hw2_data/face/UNet.pt --noise hw2_data/face/noise      the report's faces
  python P2_report.py --figures interpolation --ends a.png b.png    from one picture to another
  python P2_report.py --figures inversion --invert photos           pictures into noises and back
  python P2_report.py --figures animation --to-uint8 clamp          faces on their way from noise, and a walk from face to face
  python P2_report.py --figures interpolation --mix 0=0.5,1=0.3,2=0.2 --to-uint8 clamp      and the mean of three noises

eta.png         one row per eta, one column for each of the first four noises
eta_mse.png     distance of the images to those of the first eta
slerp.png, linear.png     from the first noise to the second, in equal steps; interpolation.png shows both
noise_norm.png  norm of the interpolated noises: why linear interpolation fails
inversion.png   pictures, their noises by the rules bdia (exact) and ddim (approximate), and the images drawn from these noises
denoising.webp  the first four noises on their way to images; walk.webp: from each of them to the next by slerp, and back to the first
mix.png         images of the noises of --mix, of their mean renormalised to unit variance, and of their plain mean

Pictures are inverted at guidance 1. Images drawn from their noises are converted as by --to-uint8 clamp.
--ends inverts by rule ddim, whose x_T needs no pair file. Between these two noises, slerp gives the direction only.
Their length is interpolated linearly, so both ends stay unchanged.
"""

from __future__ import annotations

import runtime.interrupts  # noqa: F401

# isort: split
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffusion.noise import linear, mean, slerp
from faces.inversion import at_guidance_1, invert_all, read_picture, read_pictures
from faces.models import Model
from faces.noises import Interpolate, Noise, noises_between, open_noises, parse_weights
from faces.sampling import (
    DdimConfig,
    SamplingArgs,
    ToUint8,
    compare,
    make_config,
    open_model,
    psnr,
    sample_all,
    to_image,
    walk,
)
from runtime.cli import BadInput, check_not_negative, run_script
from runtime.device import detect
from runtime.files import output_folder
from runtime.images import image_grid, line_figure, pixel_grid, save_animation
from runtime.record import Record

Draw = Callable[[list[Noise], str], Tensor]  # noises and a title for the progress bar -> images [N,C,H,W] uint8


@dataclass(frozen=True)
class Settings(SamplingArgs):
    """Flags of sampling and of the figures."""

    output: Path = Path("runs/p2_report")
    """Folder for the PNG files and record.json."""
    figures: tuple[Literal["eta", "interpolation", "inversion", "animation"], ...] = ("eta", "interpolation")
    """Which figures to draw. animation = denoising.webp and walk.webp."""
    etas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Rows of the eta grid, each 0 .. 1."""
    columns: int = 4
    """Number of noises in the eta grid and the animations, and of pictures in the grid of inversion."""
    frames: int = 11
    """Number of images from one noise to the next, both ends included."""
    ends: tuple[Path, Path] | None = None
    """Two pictures whose noises to interpolate between. None = the first two noises of --noise or --seeds."""
    invert: Path | None = None
    """Folder of pictures for --figures inversion, which requires it; the first --columns of them are shown."""
    mix: str | None = None
    """Also draw mix.png, from the mean of noises with weights such as 0=0.5,1=0.3,2=0.2 (any sum). None = not drawn."""


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

    for name, figure in (("ends", "interpolation"), ("invert", "inversion")):
        if getattr(settings, name) and figure not in settings.figures:
            raise BadInput(f"--{name} has no effect without --figures {figure}")
    if "inversion" in settings.figures and not settings.invert:
        raise BadInput("--figures inversion: name a folder of pictures with --invert")

    # Model and noises
    machine = detect(settings.device)
    model = open_model(settings, machine)
    config = partial(make_config, model, steps=settings.steps, seed=settings.seed)
    configs = [config(settings.rule, eta=eta) for eta in settings.etas if "eta" in settings.figures]
    deterministic = config(settings.rule, eta=0.0)
    noises = open_noises(model, settings.noise, settings.seeds, settings.size)
    if "interpolation" in settings.figures and len(noises) < 2 and not settings.ends:
        raise BadInput(f"--figures interpolation: needs two noises, {len(noises)} given")
    weights = None if settings.mix is None else parse_weights(settings.mix, [noise.stem for noise in noises])

    # Pictures, and the model that inverts them
    inverter, rules, ends, pictures = model, [], {}, {}
    if settings.ends or settings.invert:
        if (from_pictures := at_guidance_1(settings)).guidance != settings.guidance:
            inverter = open_model(from_pictures, machine)
        rules = [config(rule, eta=0.0) for rule in ("bdia", "ddim")]
        ends = {path.stem: read_picture(path, model, settings.size) for path in settings.ends or ()}
        if settings.ends and len(ends) < 2:
            raise BadInput(f"--ends {settings.ends[0]} {settings.ends[1]}: both have one name, rename one")
    if settings.invert:
        pictures = read_pictures(settings.invert, model, settings.size, settings.columns)

    folder = output_folder(settings.output)
    record = Record(settings, machine)
    draw = partial(sample_images, model, settings.batch, settings.to_uint8)

    if "eta" in settings.figures:
        with record.timed("eta"):
            columns = noises[: settings.columns]
            rows = [draw(config, columns, f"eta {config.eta:g}") for config in configs]
            record.metrics["eta"] = distances = eta_distances(columns, rows)
            record.save(folder / "record.json")
            eta_figures(folder, settings.etas, rows, distances)
        print(folder / "eta.png", folder / "eta_mse.png", sep="\n")

    if "interpolation" in settings.figures:
        with record.timed("interpolation"):
            between, draw_frames, interpolate = noises[:2], partial(draw, deterministic), slerp
            if ends:
                between = list(invert_all(inverter, ends, rules[1], settings.batch, "inverting"))
                draw_frames = partial(sample_images, inverter, settings.batch, "clamp", rules[1])
                interpolate = slerp_between_lengths
            images, norms = draw_interpolations(folder, between, interpolate, settings.frames, draw_frames)
            record.metrics["interpolation"] = norms
            if ends:
                graded = zip(ends.items(), (images[0], images[-1]), strict=True)
                record.metrics["ends"] = {stem: compare(image, picture)["mse"] for (stem, picture), image in graded}
        print(*(folder / f"{name}.png" for name in ("slerp", "linear", "interpolation", "noise_norm")), sep="\n")

    if "animation" in settings.figures:
        with record.timed("animation"):
            draw_denoising(folder / "denoising.webp", model, noises[: settings.columns], deterministic)
            draw_walk(folder / "walk.webp", noises[: settings.columns], settings.frames, partial(draw, deterministic))
        print(folder / "denoising.webp", folder / "walk.webp", sep="\n")

    if pictures:
        with record.timed("inversion"):
            record.metrics["inversion"] = draw_inversion(folder, inverter, pictures, rules, settings.batch)
        print(folder / "inversion.png")

    if weights:
        with record.timed("mix"):
            record.metrics["mix"] = draw_mix(folder, noises, weights, partial(draw, deterministic))
        print(folder / "mix.png")

    record.save(folder / "record.json")


def sample_images(
    model: Model, batch: int, to_uint8: ToUint8, config: DdimConfig, noises: list[Noise], title: str
) -> Tensor:
    """Sample one image per noise: [N,C,H,W] uint8."""
    images = [image for _, image in sample_all(model, noises, config, batch, title)]
    return torch.stack([to_image(image, to_uint8) for image in images])


def draw_interpolations(
    folder: Path, ends: Sequence[Noise], interpolate: Interpolate, count: int, draw: Draw
) -> tuple[Tensor, dict[str, list[float]]]:
    """Draw slerp.png (by `interpolate`), linear.png, interpolation.png (both) and noise_norm.png.

    Return slerp's images [count,C,H,W] uint8 and {"slerp" or "linear": norm / sqrt(dimensions) of each noise}.
    """
    alphas = [index / (count - 1) for index in range(count)]
    labels, rows, norms = [f"{alpha:.2g}" for alpha in alphas], {}, {}
    title = f"from {ends[0].stem} to {ends[1].stem}"
    for name, way in (("slerp", interpolate), ("linear", linear)):
        frames = noises_between(ends[0], ends[1], count, way)
        rows[name] = draw(frames, name)
        norms[name] = [float(frame.x.norm()) / math.sqrt(frame.x.numel()) for frame in frames]
        pixel_grid(folder / f"{name}.png", rows[name], [name], labels, f"{name} {title}")
    pixel_grid(folder / "interpolation.png", torch.cat([*rows.values()]), [*rows], labels, title.capitalize())
    panel = {"norm / sqrt(dimensions)": norms}
    line_figure(folder / "noise_norm.png", alphas, panel, "alpha", "Length of the noise (the model knows 1)")
    return rows["slerp"], norms


def slerp_between_lengths(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Return the direction of slerp, with a length interpolated linearly between those of a and b."""
    direction, length = slerp(a, b, alpha), linear(a.norm(), b.norm(), alpha)
    return direction.mul(length / direction.norm())


def draw_inversion(
    folder: Path, model: Model, pictures: dict[str, Tensor], rules: list[DdimConfig], batch: int
) -> dict[str, dict[str, float]]:
    """Draw inversion.png: pictures {stem: [3,H,W] uint8}, their noises, and the images drawn from these.

    `rules`: the settings of bdia and ddim. Return {"bdia" or "ddim": {stem: MSE on 0..255 between picture and image}}.
    """
    originals = torch.stack([*pictures.values()])
    rows, labels, errors = [originals], ["picture"], {}
    for name, config in zip(("bdia", "ddim"), rules, strict=True):
        noises = list(invert_all(model, pictures, config, batch, f"inverting by {name}"))
        images = sample_images(model, batch, "clamp", config, noises, name)
        shown = torch.stack([to_image(noise.x / 3, "clamp") for noise in noises])  # within three standard deviations
        difference = (8 * (images.int() - originals.int()).abs()).clamp(max=255).to(torch.uint8)
        rows += [shown, images, difference]
        labels += [f"{name}: noise", "drawn", "error x 8"]
        graded = zip(pictures.items(), images, strict=True)
        errors[name] = {stem: float(compare(image, picture)["mse"]) for (stem, picture), image in graded}
    decibel = [f"{name} {psnr(sum(mse.values()) / len(mse)):.1f} dB" for name, mse in errors.items()]
    title = f"Picture, noise and back: {', '.join(decibel)}".replace("inf dB", "the same to the bit")
    pixel_grid(folder / "inversion.png", torch.cat(rows), labels, [*pictures], title)
    return errors


def draw_denoising(path: Path, model: Model, noises: Sequence[Noise], config: DdimConfig) -> None:
    """Write an animation of all noises side by side: a frame per state from x_T to the images, clamped to -1..1."""
    states = [torch.stack([noise.x for noise in noises])]
    walk(model, [(noise, 0) for noise in noises], config, lambda t, x: states.append(x.float().cpu()))
    frames = [image_grid(torch.stack([to_image(image, "clamp") for image in state]), len(noises)) for state in states]
    save_animation(path, torch.stack(frames))


def draw_walk(path: Path, noises: Sequence[Noise], frames: int, draw: Draw) -> None:
    """Write an animation by slerp from each noise to the next, and from the last to the first, `frames` images per pair with both ends."""
    ends = zip(noises, [*noises[1:], noises[0]], strict=True)
    way = [
        noise for a, b in ends for noise in noises_between(a, b, frames, slerp)[:-1]
    ]  # without the end: the next pair starts there
    save_animation(path, draw(way, "walk").expand(-1, 3, -1, -1), 120, 120)


def draw_mix(folder: Path, noises: Sequence[Noise], weights: dict[str, float], draw: Draw) -> dict[str, float]:
    """Draw mix.png: images of each noise, of their weighted mean rescaled to unit variance, and of the weighted mean as it is.

    Return {"mean": its root mean square, "plain": that of the plain mean}.
    """
    parts = [noise for noise in noises if noise.stem in weights]
    shares = torch.tensor([weights[noise.stem] for noise in parts])
    x = torch.stack([noise.x for noise in parts])
    means = {"mean": mean([*x], shares.tolist()), "plain": torch.tensordot(shares / shares.sum(), x, 1)}
    images = draw([*parts, *(Noise(name, x) for name, x in means.items())], "mix")
    labels = [f"{stem}: {weights[stem]:g}" for stem in (noise.stem for noise in parts)]
    title = "Noises and weights; their mean, renormalised to unit variance; their plain mean"
    pixel_grid(folder / "mix.png", images, [""], [*labels, *means], title)
    return {name: float(x.square().mean().sqrt()) for name, x in means.items()}


def eta_distances(noises: list[Noise], rows: list[Tensor]) -> dict[str, list[float]]:
    """Return {stem: MSE on 0..255, for each eta, to the image at the first eta}; `rows` holds the images [N,C,H,W] of each eta."""
    return {
        noise.stem: [float(compare(row[column], rows[0][column])["mse"]) for row in rows]
        for column, noise in enumerate(noises)
    }


def eta_figures(folder: Path, etas: tuple[float, ...], rows: list[Tensor], distances: dict[str, list[float]]) -> None:
    """Draw eta.png, with a row of images [N,C,H,W] uint8 per eta, and eta_mse.png, with their distances over eta."""
    labels, title = [f"eta {eta:g}" for eta in etas], "Same noise down each column, more randomness per row"
    pixel_grid(folder / "eta.png", torch.cat(rows), labels, [*distances], title)
    panel = {f"MSE (0..255) to eta {etas[0]:g}": distances}
    line_figure(folder / "eta_mse.png", etas, panel, "eta", "How far eta moves the pictures")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
