"""How well the shipped digits are read, how varied they are, and how long 1,000 of them take: mean and spread over seeds.

  python benchmarks/p1_accuracy.py                                   5 seeds with the shipped judges
  python benchmarks/p1_accuracy.py --mnistm-classifier Classifier.pth     MNIST-M by the course's judge as well

Every seed draws the 1,000 pictures of hw2_1.sh once as the network gives them, then again what the shipped judges misread.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import repository_root  # noqa: F401  # isort: split
import torch
from torch import Tensor

from digits.classifier import DigitClassifier, accuracy, load_classifier, quality, shipped_classifiers
from digits.sampling import CHECKPOINT, DigitSampler, DigitSamplerConfig, graded_requests, labels_of, redraw
from P1_model import DOMAINS, load_network
from runtime.cli import run_script
from runtime.device import Device, detect
from runtime.images import to_uint8
from runtime.record import Record


@dataclass(frozen=True)
class Settings:
    """Flags."""

    checkpoint: Path = CHECKPOINT
    mnistm_classifier: Path | None = None
    """The course's Classifier.pth, graded beside our own judge."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    count: int = 50
    """Pictures per digit and domain."""
    retries: int = 3
    batch: int = 100
    device: Device = "auto"
    record: Path = CHECKPOINT.parents[1] / "runs" / "bench" / "p1_accuracy.json"


def measure(
    images: Tensor, digits: Tensor, domains: Tensor, judges: list[DigitClassifier], course: DigitClassifier | None
) -> dict[str, float]:
    """Every number of the table for one set of pictures [N,3,28,28] uint8."""
    scores = accuracy(judges, images, digits, domains)
    found = {f"{name} accuracy": score for name, score in zip(DOMAINS, scores, strict=True)}
    found["mean accuracy"] = statistics.mean(scores)
    if course:
        found["mnistm accuracy by the course's judge"] = accuracy([course], images, digits, domains)[0]
    for domain, name in enumerate(DOMAINS):
        found |= {f"{name} {key}": value for key, value in quality(judges[domain], images[domains == domain]).items()}
    return found


def main(bench: Settings) -> None:
    """Prints one line per number: mean and spread over the seeds, without and with retries."""
    machine = detect(bench.device)
    network, judges = load_network(bench.checkpoint, machine.device), shipped_classifiers(machine.device)
    course = load_classifier(bench.mnistm_classifier, machine.device) if bench.mnistm_classifier else None
    sampler = DigitSamplerConfig.from_dict(network.sampler)
    rows: dict[str, list[dict[str, float]]] = {"as drawn": [], "with retries": []}
    for seed in bench.seeds:
        pictures = graded_requests(seed, bench.count)
        digits, domains = labels_of(pictures)
        start = time.perf_counter()
        images = to_uint8(DigitSampler(network, sampler, bench.batch).images(pictures, f"seed {seed}"))
        drawn = time.perf_counter() - start
        rows["as drawn"].append({"seconds": drawn} | measure(images, digits, domains, judges, course))
        start = time.perf_counter()
        kept = dict(enumerate(images))
        redraw(DigitSampler(network, sampler, bench.batch), judges, pictures, kept, bench.retries)
        images = torch.stack([kept[row] for row in sorted(kept)])
        again = drawn + time.perf_counter() - start
        rows["with retries"].append({"seconds": again} | measure(images, digits, domains, judges, course))
    for title, found in rows.items():
        print(f"{title}: {len(bench.seeds)} seeds of {bench.count * 20:,} pictures")
        for name in found[0]:
            values = [row[name] for row in found]
            print(f"  {name:40s} {statistics.mean(values):8.4f} +- {statistics.pstdev(values):.4f}")
    record = Record(bench, machine)
    record.add_repeats(
        {f"{way}: {name}": [row[name] for row in found] for way, found in rows.items() for name in found[0]}
    )
    record.save(bench.record)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
