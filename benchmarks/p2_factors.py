"""What eta and interpolation change in drawn faces: the 14 factors (skin, hair, glasses, ..) that the face world's classifier reads.

  python benchmarks/p2_factors.py                                     the shipped face model: 200 noises, 50 pairs
  python benchmarks/p2_factors.py --count 8 --pairs 2 --steps 10      a short form

eta     share of the noises whose face at this eta has another value of a factor than their face at eta 0. Only noises count whose
        factors are all read with confidence at both. The last column compares with another noise's face at eta 0: the share to expect
        if nothing of the noise were left.
paths   frames from one noise to another, by slerp and by linear interpolation: the share that are valid faces, how often a factor
        changes from frame to frame, local contrast (standard deviation of 5x5 pixels, grey levels), length of the noise, and the
        perceptual path length (Karras et al. 2019): squared distance of neighbouring frames over the squared step, in the features of
        EfficientNet-Lite0, which others trained on ImageNet.

Figures: p2_factors.png and p2_paths.png in --output. Intervals are 95 % confidence intervals of the mean over pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import repository_root  # noqa: F401  # isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.outside_view import pretrained_layers
from benchmarks.timing import BENCH
from diffusion.noise import linear, slerp
from faces.models import SHIPPED_FACES
from faces.noises import Interpolate, Noise, noises_between, open_noises
from faces.sampling import SamplingArgs, make_config, open_model, sample_all, to_image
from miniature.face_classifier import SHIPPED, FaceReader, FaceReading, load_face_classifier
from miniature.face_world import FACTORS
from runtime.cli import BadInput, check_not_negative, run_script
from runtime.device import Device, detect, to_channels_last
from runtime.files import output_folder
from runtime.images import line_figure, plain_text, save_figure, to_float
from runtime.record import Record

WAYS: dict[str, Interpolate] = {"slerp": slerp, "linear": linear}
BATCH = 50  # images per forward pass of EfficientNet-Lite0


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    model: str = str(SHIPPED_FACES)
    """A model of the face world's 64x64 faces, as P2_ddim.py's."""
    classifier: Path = SHIPPED
    """Weights of the factor classifier, from miniature/face_factors.py."""
    count: int = 200
    """Noises at every eta."""
    etas: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Values above 0 and at most 1. Each is compared with eta 0."""
    pairs: int = 50
    """Pairs of noises between which faces are interpolated."""
    frames: int = 11
    """Faces from one noise to the other, both ends included."""
    steps: int = 50
    """Network calls per face."""
    seed: int = 0
    """The first noise's seed; the others follow."""
    device: Device = "auto"
    output: Path = BENCH / "p2_factors"
    """Folder for both figures and record.json."""


def main(settings: Settings) -> None:
    """Measure eta, then interpolation; print a table of each, write figures and record."""
    for name in ("count", "pairs", "frames"):
        if (value := getattr(settings, name)) < 2:
            raise BadInput(f"--{name} {value}: at least 2 are needed")
    if not settings.etas:
        raise BadInput("--etas: give at least one")
    check_not_negative(settings, "seed")
    machine = detect(settings.device)
    record = Record(settings, machine)
    reader = FaceReader(load_face_classifier(settings.classifier), machine.device)
    upscaling, *layers, flattening = pretrained_layers()  # of digits
    features = to_channels_last(nn.Sequential(*layers), machine.device).eval().requires_grad_(False)
    model = open_model(SamplingArgs(model=settings.model, device=settings.device), machine)
    last = settings.seed + max(settings.count, 2 * settings.pairs) - 1
    noises = open_noises(model, None, f"{settings.seed}-{last}", None)
    output_folder(settings.output)

    def draw(noises: Sequence[Noise], eta: float, title: str) -> Tensor:
        config = make_config(model, "homework", settings.steps, eta, settings.seed)
        return torch.stack([to_image(x0, "clamp") for _, x0 in sample_all(model, noises, config, 0, title)])

    with record.timed("eta"):
        readings = {eta: reader(draw(noises[: settings.count], eta, f"eta {eta:g}")) for eta in (0.0, *settings.etas)}
    changed = record.metrics["eta"] = factor_changes(readings)
    print_changes(changed, settings.count)
    record.save(settings.output / "record.json")
    draw_changes(settings.output / "p2_factors.png", changed)

    with record.timed("paths"):
        for way, interpolate in WAYS.items():
            frames = path_noises(noises[: 2 * settings.pairs], settings.frames, interpolate)
            images = draw(frames, 0.0, way)
            states = torch.stack([noise.x for noise in frames])
            record.metrics[way] = measure_paths(images, states, settings.frames, reader, features)
    print_paths({way: record.metrics[way] for way in WAYS})
    draw_paths(settings.output / "p2_paths.png", {way: record.metrics[way] for way in WAYS}, settings.frames)
    record.save(settings.output / "record.json", name_it=True)


# ---------------------------------------------------------------- eta


def factor_changes(readings: dict[float, FaceReading]) -> dict[str, dict[str, float]]:
    """Return {column: {factor: share of faces that differ from the same noise's at eta 0, "valid": share of valid faces}}.

    A factor's share counts only noises whose two faces are both read with confidence; "valid" counts all.
    The last column, "another noise", compares each face at eta 0 with that of a neighbouring noise.
    Raise BadInput for a column in which no noise has two confident faces.
    """
    start = readings[0.0]
    columns = {f"eta {eta:g}": reading for eta, reading in readings.items()}
    columns["another noise"] = FaceReading(*(part.roll(1, 0) for part in start))
    changed = {}
    for name, reading in columns.items():
        both = start.certain & reading.certain
        if not both.any():
            raise BadInput(
                f"{name}: no noise whose face is read with confidence there and at eta 0; is this a model of the face world?"
            )
        differs = (start.rows != reading.rows)[both].float().mean(0).tolist()
        changed[name] = dict(zip(FACTORS, differs, strict=True)) | {"valid": float(reading.valid.float().mean())}
    return changed


def print_changes(changed: dict[str, dict[str, float]], count: int) -> None:
    """Print a line per factor and a column per eta."""
    columns = [name for name in changed if name != "eta 0"]
    print(f"{f'share that differ, {count} noises':<28}" + "".join(f"{name:>15}" for name in columns))
    for factor in (*FACTORS, "valid"):
        print(f"{factor:<28}" + "".join(f"{changed[name][factor]:>15.2f}" for name in columns))


@plain_text()
def draw_changes(path: Path, changed: dict[str, dict[str, float]]) -> None:
    """Draw the shares as a table of coloured cells, the most stable factor first."""
    from matplotlib.figure import Figure  # slow to import

    columns = [name for name in changed if name != "eta 0"]
    factors = sorted(FACTORS, key=lambda factor: sum(changed[name][factor] for name in columns))
    figure = Figure(figsize=(1.6 + 0.9 * len(columns), 5.2))
    axis = figure.subplots()
    axis.imshow(
        [[changed[name][factor] for name in columns] for factor in factors], "Blues", vmin=0, vmax=1, aspect="auto"
    )
    for y, factor in enumerate(factors):
        for x, name in enumerate(columns):
            share = changed[name][factor]
            axis.text(x, y, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.6 else "black")
    axis.set_xticks(range(len(columns)), [name.replace(" ", "\n") for name in columns])
    axis.set_yticks(range(len(factors)), factors)
    axis.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axis.spines[:].set_visible(False)
    figure.suptitle("Share of faces in which a factor changes", fontsize=11)
    figure.tight_layout()
    save_figure(path, figure)


# ---------------------------------------------------------------- interpolation


def path_noises(ends: Sequence[Noise], frames: int, interpolate: Interpolate) -> list[Noise]:
    """Return the P*frames noises from the first end to the second, from the third to the fourth, and so on; ends are included."""
    pairs = zip(ends[::2], ends[1::2], strict=True)
    return [noise for a, b in pairs for noise in noises_between(a, b, frames, interpolate)]


def measure_paths(
    images: Tensor, states: Tensor, frames: int, reader: FaceReader, features: nn.Module
) -> dict[str, list[float]]:
    """Return measures per frame, averaged over pairs (valid, local contrast, length), and per pair (path length, changes of factors).

    `images` [P*frames,3,64,64] uint8 and their noises `states`, of the same shape, are ordered pair by pair.
    """
    reading = reader(images)
    rows, valid = reading.rows.unflatten(0, (-1, frames)), reading.valid.unflatten(0, (-1, frames))
    with torch.inference_mode():
        chunks = to_float(images).to(reader.device, memory_format=torch.channels_last).split(BATCH)
        seen = torch.cat([F.normalize(features(chunk).float(), dim=1) for chunk in chunks]).cpu()
    steps = seen.unflatten(0, (-1, frames)).diff(dim=1).square().sum(2).mean((2, 3))  # [P,frames-1]
    return {
        "valid": valid.float().mean(0).tolist(),
        "local contrast": local_contrast(images).unflatten(0, (-1, frames)).mean(0).tolist(),
        "length of the noise": states.square().flatten(1).mean(1).sqrt().unflatten(0, (-1, frames)).mean(0).tolist(),
        "perceptual path length": (steps * (frames - 1) ** 2).mean(1).tolist(),
        "factors changed on the way": (rows.diff(dim=1) != 0).float().sum((1, 2)).tolist(),
    }


def local_contrast(images: Tensor) -> Tensor:
    """Return [N]: the standard deviation of grey levels in 5x5 pixels, averaged over each image of [N,3,H,W] uint8."""
    grey = images.float().mean(1, keepdim=True)
    variance = F.avg_pool2d(grey.square(), 5, 1) - F.avg_pool2d(grey, 5, 1).square()
    return variance.clamp(min=0).sqrt().mean((1, 2, 3))


def with_interval(values: Sequence[float]) -> str:
    """Return the text "mean +- half the width of its 95 % confidence interval"."""
    return f"{statistics.mean(values):.2f} +- {1.96 * statistics.stdev(values) / len(values) ** 0.5:.2f}"


def print_paths(paths: dict[str, dict[str, list[float]]]) -> None:
    """Print a line per measure and a column per way. Measures per frame have two lines: all frames, and the middle one."""
    print(f"\n{'':<36}" + "".join(f"{way:>18}" for way in paths))
    for name in ("valid", "local contrast", "length of the noise"):
        for place, value in (
            ("all frames", statistics.mean),
            ("the middle one", lambda values: values[len(values) // 2]),
        ):
            print(f"{f'{name}, {place}':<36}" + "".join(f"{value(path[name]):>18.3f}" for path in paths.values()))
    for name in ("perceptual path length", "factors changed on the way"):
        print(f"{name:<36}" + "".join(f"{with_interval(path[name]):>18}" for path in paths.values()))


def draw_paths(path: Path, paths: dict[str, dict[str, list[float]]], frames: int) -> None:
    """Plot each measured quantity against the frame number, one panel per quantity."""
    names = {
        "valid": "share of valid faces",
        "local contrast": "local contrast",
        "length of the noise": "length of the noise",
    }
    panels = {title: {way: measures[name] for way, measures in paths.items()} for name, title in names.items()}
    shares = [frame / (frames - 1) for frame in range(frames)]
    line_figure(path, shares, panels, "share of the second noise", "From one noise to another")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
