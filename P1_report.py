"""Draw the figures of P1: a grid, the reverse process and its animation, what the labels do, and what guidance does.

  python P1_report.py --output runs/p1_report                all of them
  python P1_report.py --output runs/p1_report --figures grid reverse
  python P1_report.py --model runs/p1/best.safetensors --figures diagnose animation      does your training obey its labels?
  python P1_report.py --model runs/p1/best.safetensors --scales 1 2 4 --sweep-count 50

Classes and domains are those of the checkpoint. Without classifiers there is no sweep.
Diagnosis and sweep print their numbers as well; record.json holds them.
"""

from __future__ import annotations

import runtime.interrupts  # noqa: F401

# isort: split
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffusion.guidance import Guidance
from diffusion.noise import draw, generators
from diffusion.schedule import add_noise
from digits.classifier import DigitClassifier, accuracy, choose_classifiers, quality
from digits.sampling import (
    CHECKPOINT,
    DigitRequest,
    DigitSampler,
    DigitSamplerConfig,
    graded_requests,
    labels_of,
    sample,
)
from P1_model import DataSpec, Network, load_network
from runtime.cli import BadInput, Seed, check_positive, log, run_script
from runtime.device import Device, detect
from runtime.files import output_folder
from runtime.images import image_grid, line_figure, pixel_grid, save_animation, shorten, to_uint8
from runtime.record import Record
from runtime.seeds import distinct_seeds

TITLES = {"mnistm": "MNIST-M", "svhn": "SVHN"}  # other domains have their name
TIMESTEPS = (500, 300, 200, 100, 50, 1)  # of T = 500, noise first
ANIMATION_STEPS = 30
DIAGNOSED = 2  # images per digit and domain
DIAGNOSED_AT = range(5, 100, 10)  # percent of T


@dataclass(frozen=True)
class Settings:
    """Flags of the figures."""

    output: Path = Path("runs/p1_report")
    """Folder for the PNG files and record.json."""
    model: Path = CHECKPOINT
    """safetensors file written by P1_training.py, or the shipped one."""
    figures: tuple[Literal["grid", "reverse", "animation", "diagnose", "sweep"], ...] = (
        "grid", "reverse", "animation", "diagnose", "sweep",
    )  # fmt: skip
    """grid = digits from ten shared noises; reverse = six states of DDPM; animation = every digit from noise to image (WebP);
    diagnose = how far other labels move the predicted image, at ten timesteps; sweep = accuracy and variety per guidance scale."""
    scales: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0)
    """Guidance scales of the sweep."""
    sweep_count: int = 20
    """Images per digit, domain and scale of the sweep."""
    classifiers: tuple[str, ...] = ("auto",)
    """Files of P1_classifier.py for the sweep, one per domain. none = no sweep.
    auto = the shipped ones for digits, none for other images."""
    seed: Seed = 0
    batch: int = 100
    """Images at once."""
    device: Device = "auto"


def main(settings: Settings) -> None:
    """Draw the figures and write record.json."""
    check_positive(settings, "sweep_count", "batch")
    if not settings.figures:
        raise BadInput("--figures names none: nothing to draw")
    if not settings.scales or not all(map(math.isfinite, settings.scales)):
        raise BadInput(f"--scales {' '.join(map(str, settings.scales))}: give finite numbers")
    machine = detect(settings.device)
    network = load_network(settings.model, machine.device)
    spec, figures = network.spec, settings.figures
    for scale in settings.scales if "sweep" in figures else ():
        network.check_guidance(Guidance(scale), "--scales")
    classifiers = choose_classifiers(settings.classifiers, spec, machine.device) if "sweep" in figures else []
    if "sweep" in figures and not classifiers:
        if {*figures} == {"sweep"}:
            raise BadInput("--figures sweep: it needs --classifiers, a file of P1_classifier.py for each domain")
        log("no sweep: it needs --classifiers")
        figures = tuple(name for name in figures if name != "sweep")
    sampler = DigitSampler(network, DigitSamplerConfig.from_dict(network.sampler), settings.batch)
    folder = output_folder(settings.output)
    record, paths = Record(settings, machine), []

    try:
        if "grid" in figures:
            with record.timed("grid"):
                paths += [grid_figure(sampler, domain, settings.seed, folder) for domain in range(len(spec.domains))]
        if "reverse" in figures:
            with record.timed("reverse"):
                paths.append(reverse_figure(network, settings.seed, folder))
        if "animation" in figures:
            with record.timed("animation"):
                paths.append(animation(network, settings.seed, folder))
        if "diagnose" in figures:
            with record.timed("diagnose"):
                record.metrics["diagnose"] = effects = diagnose(sampler, settings.seed)
            paths.append(effects_figure(effects, folder))
        if "sweep" in figures:
            requests = graded_requests(settings.seed, settings.sweep_count, spec=spec)
            with record.timed("sweep"):
                rows = sweep(sampler, classifiers, requests, settings.scales)
            record.metrics["sweep"] = rows
            paths.append(sweep_figure(rows, settings.sweep_count * len(spec.classes), spec, folder))
    finally:  # the numbers are saved even if a figure fails
        record.metrics["figures"] = [path.name for path in paths]
        record.save(folder / "record.json")
    print("\n".join(map(str, paths)))


def title_of(domain: str) -> str:
    """Return a domain's name in figures."""
    return TITLES.get(domain, shorten(domain))


def grid_figure(sampler: DigitSampler, domain: int, seed: int, folder: Path) -> Path:
    """Draw 10x10 digits of one domain, a row per digit, all of a column from the same noise; return the path."""
    classes, name = sampler.network.spec.classes, sampler.network.spec.domains[domain]
    seeds = distinct_seeds((seed, column) for column in range(10))
    requests = [DigitRequest(digit, domain, column_seed) for digit in range(len(classes)) for column_seed in seeds]
    images = to_uint8(sampler.images(requests, f"grid {title_of(name)}"))
    path, columns = folder / f"grid_{name}.png", [f"{column}" for column in range(10)]
    pixel_grid(path, images, classes, columns, f"{title_of(name)}: one noise per column")
    return path


def reverse_process(network: Network, requests: Sequence[DigitRequest]) -> dict[int, Tensor]:
    """Sample by DDPM and return {t: x_t [B,3,28,28]} at six timesteps from noise to image.

    These are TIMESTEPS, the report's, rescaled to the network's T.
    """
    total = len(network.schedule)
    timesteps = [max(1, round(t * total / TIMESTEPS[0])) for t in TIMESTEPS]
    states = {total: draw(generators([request.seed for request in requests]), network.spec.shape, torch.device("cpu"))}

    def callback(t: int, x: Tensor) -> None:
        if t in timesteps:
            states[t] = x.cpu()

    sample(network, requests, replace(DigitSamplerConfig.from_dict(network.sampler), name="ddpm"), callback)
    return {t: states[t] for t in timesteps}


def reverse_figure(network: Network, seed: int, folder: Path) -> Path:
    """Draw one image of the first class (the digit 0) per domain at six timesteps, from noise to image; return the path."""
    spec = network.spec
    requests = graded_requests(seed, 1, [0], spec=spec)
    log("reverse process: all steps of DDPM")
    states = reverse_process(network, requests)
    images = torch.stack(list(states.values()), dim=1).flatten(0, 1)  # a row per domain
    path, columns = folder / "reverse_process.png", [f"t = {t}" for t in states]
    title = f'The first "{shorten(spec.classes[0])}" of {"both" if len(spec.domains) == 2 else "all"} domains, T = {len(network.schedule)}'
    pixel_grid(path, to_uint8(images), tuple(map(title_of, spec.domains)), columns, title)
    return path


def animation(network: Network, seed: int, folder: Path) -> Path:
    """Write an animation of one image per digit and domain, from noise to image by DDIM, a row per domain; return the path."""
    requests = graded_requests(seed, 1, spec=network.spec)
    states = [draw(generators([request.seed for request in requests]), network.spec.shape, torch.device("cpu"))]
    steps = min(ANIMATION_STEPS, len(network.schedule))
    config = replace(DigitSamplerConfig.from_dict(network.sampler), name="ddim", steps=steps, eta=0.0)
    log(f"animation: {steps} steps of DDIM")
    sample(network, requests, config, lambda t, x: states.append(x.cpu()))
    path = folder / "denoising.webp"
    save_animation(path, torch.stack([image_grid(to_uint8(x), len(network.spec.classes), scale=3) for x in states]))
    return path


Effects = dict[str, dict[str, list[float]]]  # {domain: {"t": timesteps, name of a change: distances}}


@torch.inference_mode()
def label_effects(network: Network, images: Tensor, requests: Sequence[DigitRequest]) -> Effects:
    """Return per domain how far another or a null label moves the x0 that the network predicts from noised `images` [N,3,28,28].

    The distances are root mean squares over pixels in -1..1, at ten timesteps.
    "error" is the distance between the image and the x0 predicted with its right labels.
    """
    spec, (digit, domain) = network.spec, labels_of(requests, images.device)
    classes, domains = len(spec.classes), len(spec.domains)
    shift = 1 + torch.arange(len(digit), device=images.device) % max(1, classes - 1)
    changes = {
        "another digit": ((digit + shift) % classes, domain),
        "another domain": (digit, (domain + 1) % domains),
        "no digit": (torch.full_like(digit, spec.no_class), domain),
        "no domain": (digit, torch.full_like(domain, spec.no_domain)),
    }
    for name, count in {"another digit": classes, "another domain": domains}.items():
        if count == 1:
            del changes[name]
    # not the noise that the images were sampled from
    seeds = distinct_seeds([(request.seed, 1) for request in requests], [request.seed for request in requests])
    eps, schedule = draw(generators(seeds), spec.shape, images.device), network.schedule
    effects: Effects = {name: {"t": []} for name in spec.domains}
    for t in [percent * len(schedule) // 100 for percent in DIAGNOSED_AT]:
        x = add_noise(images, eps, torch.tensor(schedule.alpha_bar_at(t)))
        own, *others = [
            schedule.x0_and_eps(network(x, t, labels), x, t)[0].clamp(-1, 1)
            for labels in ((digit, domain), *changes.values())
        ]
        moves = {name: other - own for name, other in zip(changes, others, strict=True)} | {"error": own - images}
        for index, columns in enumerate(effects.values()):
            columns["t"].append(t)
            for name, move in moves.items():
                columns.setdefault(name, []).append(float(move[domain == index].square().mean().sqrt()))
    return effects


def diagnose(sampler: DigitSampler, seed: int) -> Effects:
    """Sample two images per digit and domain; print and return their `label_effects`."""
    requests = graded_requests(seed, DIAGNOSED, spec=sampler.network.spec)
    images = sampler.images(requests, "digits to diagnose")
    effects = label_effects(sampler.network, images.to(next(sampler.network.unet.parameters()).device), requests)
    for domain, columns in effects.items():
        print(f"{title_of(domain)}: how far other labels move the predicted image (0 = the label is ignored)")
        print("".join(f"{name:>16}" for name in columns))
        for t, *distances in zip(*columns.values(), strict=True):
            print(f"{t:16d}" + "".join(f"{distance:16.3f}" for distance in distances))
    return effects


def effects_figure(effects: Effects, folder: Path) -> Path:
    """Draw the distances of `label_effects` over t, a panel per domain; return the path."""
    path, timesteps = folder / "label_effects.png", next(iter(effects.values()))["t"]
    panels = {
        title_of(domain): {name: values for name, values in columns.items() if name != "t"}
        for domain, columns in effects.items()
    }
    line_figure(path, timesteps, panels, "t", "How far other labels move the predicted image (RMS, pixels in -1 .. 1)")
    return path


def sweep(
    sampler: DigitSampler,
    classifiers: list[DigitClassifier],
    requests: Sequence[DigitRequest],
    scales: Sequence[float],
) -> list[dict[str, float]]:
    """Sample the requests at every guidance scale; print and return one row per scale.

    A row holds "scale" and, per domain, accuracy, frechet, recall and precision.
    """
    rows = []
    digits, domains = labels_of(requests)
    for scale in scales:
        scaled = replace(sampler, config=replace(sampler.config, guidance=scale))
        images = to_uint8(scaled.images(requests, f"guidance {scale}"))
        row = {"scale": scale}
        for domain, score in enumerate(accuracy(classifiers, images, digits, domains)):
            metrics = quality(classifiers[domain], images[domains == domain])
            name = sampler.network.spec.domains[domain]
            row[f"{name}_accuracy"] = score
            row |= {f"{name}_{metric}": metrics[metric] for metric in ("frechet", "recall", "precision")}
        rows.append(row)
        print("  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    return rows


def sweep_figure(rows: list[dict[str, float]], count: int, spec: DataSpec, folder: Path) -> Path:
    """Draw accuracy, Frechet distance and recall over the guidance scale, a line per domain; return the path."""
    path = folder / "guidance_sweep.png"
    panels = {
        name: {title_of(domain): [row[f"{domain}_{key}"] for row in rows] for domain in spec.domains}
        for name, key in (("accuracy", "accuracy"), ("Frechet distance", "frechet"), ("recall", "recall"))
    }
    title = f"What guidance buys and costs ({count} pictures per domain and scale)"
    line_figure(path, [row["scale"] for row in rows], panels, "guidance scale", title)
    return path


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
