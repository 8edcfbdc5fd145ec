"""Draw the figures of P1: digits on a grid, the reverse process, and the effect of the guidance scale.

  python P1_report.py --output runs/p1_report                all three
  python P1_report.py --output runs/p1_report --figures grid reverse
  python P1_report.py --model runs/p1/best.safetensors --scales 1 2 4 --sweep-count 50

The sweep prints its numbers as well; record.json holds them.
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
from runtime.cli import BadInput, Seed, check_positive, log, run_script
from runtime.device import Device, detect
from runtime.files import output_folder
from runtime.images import labelled_grid, line_figure, to_uint8
from runtime.record import Record
from runtime.seeds import distinct_seeds

TITLES = ("MNIST-M", "SVHN")
TIMESTEPS = (500, 300, 200, 100, 50, 1)  # of T = 500, noise first


@dataclass(frozen=True)
class Settings:
    """Flags of the figures."""

    output: Path = Path("runs/p1_report")
    """Folder for the PNG files and record.json."""
    model: Path = CHECKPOINT
    """safetensors file written by P1_training.py, or the shipped one."""
    figures: tuple[Literal["grid", "reverse", "sweep"], ...] = ("grid", "reverse", "sweep")
    scales: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0)
    """Guidance scales of the sweep."""
    sweep_count: int = 20
    """Images per digit, domain and scale of the sweep."""
    seed: Seed = 0
    batch: int = 100
    """Images at once."""
    device: Device = "auto"


def main(settings: Settings) -> None:
    """Draw the figures."""
    check_positive(settings, "sweep_count", "batch")
    if not settings.figures:
        raise BadInput("--figures names none: nothing to draw")
    if not settings.scales or not all(map(math.isfinite, settings.scales)):
        raise BadInput(f"--scales {' '.join(map(str, settings.scales))}: give finite numbers")
    machine = detect(settings.device)
    network = load_network(settings.model, machine.device)
    sampler = DigitSampler(network, DigitSamplerConfig.from_dict(network.sampler), settings.batch)
    folder = output_folder(settings.output)
    record, paths = Record(settings, machine), []

    try:
        if "grid" in settings.figures:
            with record.timed("grid"):
                paths += [grid_figure(sampler, domain, settings.seed, folder) for domain in range(len(DOMAINS))]
        if "reverse" in settings.figures:
            with record.timed("reverse"):
                paths.append(reverse_figure(network, settings.seed, folder))
        if "sweep" in settings.figures:
            requests = graded_requests(settings.seed, settings.sweep_count)
            with record.timed("sweep"):
                rows = sweep(sampler, shipped_classifiers(machine.device), requests, settings.scales)
            record.metrics["sweep"] = rows
            paths.append(sweep_figure(rows, settings.sweep_count * DIGITS, folder))
    finally:  # a figure that fails costs no numbers
        record.metrics["figures"] = [path.name for path in paths]
        record.save(folder / "record.json")
    print("\n".join(map(str, paths)))


def grid_figure(sampler: DigitSampler, domain: int, seed: int, folder: Path) -> Path:
    """Draw 10x10 digits of one domain: a row per digit, one noise for each whole column."""
    seeds = distinct_seeds((seed, column) for column in range(10))
    requests = [DigitRequest(digit, domain, column_seed) for digit in range(DIGITS) for column_seed in seeds]
    images = to_uint8(sampler.images(requests, f"grid {TITLES[domain]}"))
    path, columns = folder / f"grid_{DOMAINS[domain]}.png", [f"noise {column}" for column in range(10)]
    labelled_grid(path, images, [str(d) for d in range(DIGITS)], columns, f"{TITLES[domain]}: one noise per column")
    return path


def reverse_process(network: Network, requests: Sequence[DigitRequest]) -> dict[int, Tensor]:
    """Return x_t of every image [B,3,28,28] at the report's timesteps, scaled to this T, by ancestral sampling (DDPM)."""
    total = len(network.schedule)
    timesteps = [max(1, round(t * total / TIMESTEPS[0])) for t in TIMESTEPS]
    states = {total: draw(generators([request.seed for request in requests]), IMAGE_SHAPE, torch.device("cpu"))}

    def callback(t: int, x: Tensor) -> None:
        if t in timesteps:
            states[t] = x.cpu()

    sample(network, requests, replace(DigitSamplerConfig.from_dict(network.sampler), name="ddpm"), callback)
    return {t: states[t] for t in timesteps}


def reverse_figure(network: Network, seed: int, folder: Path) -> Path:
    """Draw the first "0" of both domains from noise to image."""
    requests = [graded_requests(seed, 1, [0], [domain])[0] for domain in range(len(DOMAINS))]
    log("reverse process: all steps of DDPM")
    states = reverse_process(network, requests)
    images = torch.stack(list(states.values()), dim=1).flatten(0, 1)  # a row per domain
    path, columns = folder / "reverse_process.png", [f"t = {t}" for t in states]
    title = f'The first "0" of both domains, T = {len(network.schedule)}'
    labelled_grid(path, to_uint8(images), TITLES, columns, title, inch=1.1)
    return path


def sweep(
    sampler: DigitSampler,
    classifiers: list[DigitClassifier],
    requests: Sequence[DigitRequest],
    scales: Sequence[float],
) -> list[dict[str, float]]:
    """Print and return accuracy, Frechet distance, recall and precision per domain for every guidance scale."""
    rows = []
    digits, domains = labels_of(requests)
    for scale in scales:
        scaled = replace(sampler, config=replace(sampler.config, guidance=scale))
        images = to_uint8(scaled.images(requests, f"guidance {scale}"))
        row = {"scale": scale}
        for domain, score in enumerate(accuracy(classifiers, images, digits, domains)):
            metrics = quality(classifiers[domain], images[domains == domain])
            name = DOMAINS[domain]
            row[f"{name}_accuracy"] = score
            row |= {f"{name}_{metric}": metrics[metric] for metric in ("frechet", "recall", "precision")}
        rows.append(row)
        print("  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    return rows


def sweep_figure(rows: list[dict[str, float]], count: int, folder: Path) -> Path:
    """Draw accuracy, Frechet distance and recall against the guidance scale, a line per domain."""
    path = folder / "guidance_sweep.png"
    panels = {
        name: {TITLES[d]: [row[f"{DOMAINS[d]}_{key}"] for row in rows] for d in range(len(DOMAINS))}
        for name, key in (("accuracy", "accuracy"), ("Frechet distance", "frechet"), ("recall", "recall"))
    }
    title = f"What guidance buys and costs ({count} pictures per domain and scale)"
    line_figure(path, [row["scale"] for row in rows], panels, "guidance scale", title)
    return path


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
