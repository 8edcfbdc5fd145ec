"""The figures of P1: digits on a grid, the reverse process, and what guidance buys and costs.

  python P1_report.py --output runs/p1_report                all three
  python P1_report.py --output runs/p1_report --figures grid reverse
  python P1_report.py --model runs/p1/best.safetensors --scales 1 2 4 --sweep-count 50

The sweep prints its figures as well; record.json keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffusion.noise import draw, generators
from digits.classifier import DigitClassifier, accuracy, quality, shipped_classifiers
from digits.sampling import (
    CHECKPOINT,
    DigitRequest,
    DigitSampler,
    DigitSamplerConfig,
    graded_requests,
    labels_of,
    sample,
)
from P1_model import DIGITS, DOMAINS, IMAGE_SHAPE, Network, load_network
from runtime.cli import BadInput, check_positive, log, run_script
from runtime.device import Device, detect
from runtime.files import output_folder
from runtime.images import labelled_grid, line_figure, to_uint8
from runtime.record import Record
from runtime.seeds import derived_seed

TITLES = ("MNIST-M", "SVHN")
MOMENTS = (500, 300, 200, 100, 50, 1)  # of T = 500, noise first


@dataclass(frozen=True)
class Settings:
    """Flags."""

    output: Path = Path("runs/p1_report")
    """Folder for the PNG files and record.json."""
    model: Path = CHECKPOINT
    """safetensors file written by P1_training.py, or the shipped one."""
    figures: tuple[Literal["grid", "reverse", "sweep"], ...] = ("grid", "reverse", "sweep")
    scales: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0)
    """Guidance scales of the sweep."""
    sweep_count: int = 20
    """Pictures per digit, domain and scale of the sweep."""
    seed: int = 0
    batch: int = 100
    device: Device = "auto"


def grid_figure(network: Network, domain: int, settings: Settings) -> Path:
    """10x10 digits of one domain: a row per digit, one noise for each whole column."""
    seeds = [derived_seed(settings.seed, column) for column in range(10)]
    pictures = [DigitRequest(digit, domain, seed) for digit in range(DIGITS) for seed in seeds]
    sampler = DigitSamplerConfig.from_dict(network.sampler)
    images = to_uint8(DigitSampler(network, sampler, settings.batch).images(pictures, f"grid {TITLES[domain]}"))
    path = settings.output / f"grid_{DOMAINS[domain]}.png"
    columns = [f"noise {column}" for column in range(10)]
    labelled_grid(path, images, [str(d) for d in range(DIGITS)], columns, f"{TITLES[domain]}: one noise per column")
    return path


def reverse_process(network: Network, pictures: Sequence[DigitRequest]) -> dict[int, Tensor]:
    """x_t of every picture [B,3,28,28] at the report's moments, scaled to this T, by ancestral sampling (DDPM)."""
    total = len(network.schedule)
    wanted = [max(1, round(moment * total / MOMENTS[0])) for moment in MOMENTS]
    noise = draw(generators([p.seed for p in pictures]), IMAGE_SHAPE, torch.device("cpu"))
    seen = {total: noise}

    def watch(t: int, x: Tensor) -> None:
        if t in wanted:
            seen[t] = x.cpu()

    sample(network, pictures, replace(DigitSamplerConfig.from_dict(network.sampler), name="ddpm"), watch)
    return {t: seen[t] for t in wanted}


def reverse_figure(network: Network, settings: Settings) -> Path:
    """The first "0" of both domains from noise to picture."""
    pictures = [graded_requests(settings.seed, 1, [0], [domain])[0] for domain in range(len(DOMAINS))]
    log("reverse process: all steps of DDPM")
    states = reverse_process(network, pictures)
    images = torch.stack(list(states.values()), dim=1).flatten(0, 1)  # a row per domain
    path = settings.output / "reverse_process.png"
    columns = [f"t = {t}" for t in states]
    title = f'The first "0" of both domains, T = {len(network.schedule)}'
    labelled_grid(path, to_uint8(images), TITLES, columns, title, inch=1.1)
    return path


def sweep(network: Network, judges: list[DigitClassifier], settings: Settings) -> list[dict[str, float]]:
    """Accuracy, Frechet distance and recall per domain for every guidance scale."""
    rows = []
    pictures = graded_requests(settings.seed, settings.sweep_count)
    digits, domains = labels_of(pictures)
    for scale in settings.scales:
        sampler = replace(DigitSamplerConfig.from_dict(network.sampler), guidance=scale)
        images = to_uint8(DigitSampler(network, sampler, settings.batch).images(pictures, f"guidance {scale}"))
        row = {"scale": scale}
        for domain, score in enumerate(accuracy(judges, images, digits, domains)):
            measured = quality(judges[domain], images[domains == domain])
            name = DOMAINS[domain]
            row |= {f"{name}_accuracy": score, f"{name}_frechet": measured["frechet"]}
            row |= {f"{name}_recall": measured["recall"], f"{name}_precision": measured["precision"]}
        rows.append(row)
        print("  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    return rows


def sweep_figure(rows: list[dict[str, float]], settings: Settings) -> Path:
    """Accuracy, Frechet distance and recall against the guidance scale, a line per domain."""
    path = settings.output / "guidance_sweep.png"
    panels = {
        name: {TITLES[d]: [row[f"{DOMAINS[d]}_{key}"] for row in rows] for d in range(len(DOMAINS))}
        for name, key in (("accuracy", "accuracy"), ("Frechet distance", "frechet"), ("recall", "recall"))
    }
    count = settings.sweep_count * DIGITS
    title = f"What guidance buys and costs ({count} pictures per domain and scale)"
    line_figure(path, list(settings.scales), panels, "guidance scale", title)
    return path


def main(settings: Settings) -> None:
    """Draws the figures that were asked for."""
    check_positive(settings, "sweep_count", "batch")
    if not settings.figures:
        raise BadInput("--figures names none: nothing to draw")
    if not settings.scales or not all(map(math.isfinite, settings.scales)):
        raise BadInput(f"--scales {' '.join(map(str, settings.scales))}: give finite numbers")
    machine = detect(settings.device)
    network = load_network(settings.model, machine.device)
    output_folder(settings.output)
    record, made = Record(settings, machine), []
    if "grid" in settings.figures:
        with record.timed("grid"):
            made += [grid_figure(network, domain, settings) for domain in range(len(DOMAINS))]
    if "reverse" in settings.figures:
        with record.timed("reverse"):
            made.append(reverse_figure(network, settings))
    if "sweep" in settings.figures:
        with record.timed("sweep"):
            rows = sweep(network, shipped_classifiers(machine.device), settings)
        made.append(sweep_figure(rows, settings))
        record.metrics["sweep"] = rows
    record.metrics["figures"] = [path.name for path in made]
    record.save(settings.output / "record.json")
    print("\n".join(str(path) for path in made))


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
