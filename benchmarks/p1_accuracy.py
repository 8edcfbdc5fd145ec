"""Accuracy and variety of the digits that P1 draws: mean and spread over seeds.

  python benchmarks/p1_accuracy.py                                        5 seeds, graded by the shipped classifiers
  python benchmarks/p1_accuracy.py --mnistm-classifier hw2_data/Classifier.pth     MNIST-M by the course's classifier too
  python benchmarks/p1_accuracy.py --model MINE.safetensors --steps 4 --guidance 3
  python benchmarks/p1_accuracy.py --data hw2_data/digits                 also in features of EfficientNet-Lite0, the outside view

The images of each seed are those of hw2_1.sh. They are graded before misread ones are redrawn, then after it (with retries).
benchmarks/p1_views.py compares the shipped classifiers with the outside view.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import repository_root  # noqa: F401  # isort: split
import torch

from benchmarks.outside_view import grades, outside_classifiers
from benchmarks.timing import BENCH, report
from digits.classifier import accuracy, load_classifier, shipped_classifiers
from digits.sampling import (
    CHECKPOINT,
    DigitSampler,
    DigitSamplerConfig,
    check_steps,
    graded_requests,
    labels_of,
    redraw,
)
from P1_model import load_network
from runtime.cli import run_script
from runtime.device import Device, detect
from runtime.images import to_uint8
from runtime.record import Record


@dataclass(frozen=True)
class Settings:
    """Settings of the grading."""

    model: Path = CHECKPOINT
    """Checkpoint of P1."""
    mnistm_classifier: Path | None = None
    """The course's Classifier.pth. None = the shipped classifiers only."""
    data: Path | None = None
    """Folder of real digits in the homework's layout, for the outside view. None = no outside view."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    count: int = 50
    """Images per digit and domain."""
    steps: int | None = None
    """Sampling steps. None = the checkpoint's."""
    guidance: float | None = None
    """Guidance scale. None = the checkpoint's."""
    retries: int = 3
    """Redraws at most of an image that a shipped classifier misreads."""
    batch: int = 100
    """Images drawn at once."""
    device: Device = "auto"
    record: Path = BENCH / "p1_accuracy.json"


def main(settings: Settings) -> None:
    """Print mean and spread over the seeds of every number, without and with retries."""
    machine = detect(settings.device)
    record = Record(settings, machine)
    network, classifiers = load_network(settings.model, machine.device), shipped_classifiers(machine.device)
    course = load_classifier(settings.mnistm_classifier, machine.device) if settings.mnistm_classifier else None
    outside = outside_classifiers(settings.data, machine.device) if settings.data else None
    given = {name: value for name in ("steps", "guidance") if (value := getattr(settings, name)) is not None}
    config = replace(DigitSamplerConfig.from_dict(network.sampler), **given)
    check_steps(network, config)
    sampler = DigitSampler(network, config, settings.batch)
    results: dict[str, list[float]] = {}

    for seed in settings.seeds:
        requests = graded_requests(seed, settings.count)
        digits, domains = labels_of(requests)
        images = dict(enumerate(to_uint8(sampler.images(requests, f"seed {seed}"))))
        for way in ("without retries", "with retries"):
            if way == "with retries":
                redraw(sampler, classifiers, requests, images, settings.retries)
            batch = torch.stack([images[row] for row in range(len(requests))])
            numbers = grades(classifiers, batch, digits, domains)
            if course:
                numbers["mnistm accuracy by the course's classifier"] = accuracy([course], batch, digits, domains)[0]
            if outside:
                numbers |= grades(outside, batch, digits, domains, "outside ")
            for name, value in numbers.items():
                results.setdefault(f"{way}: {name}", []).append(value)

    print(f"{len(settings.seeds)} seeds of {settings.count * 20:,} images, {machine.name}")
    record.add_repeats(results)
    report(record, settings.record)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
