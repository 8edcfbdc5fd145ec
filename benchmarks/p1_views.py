"""Do the shipped classifiers and the outside view (outside_view.py) rank ten sets of digits alike? Rank correlations.

  python benchmarks/p1_views.py                                  hw2_data/digits, 3 seeds of 500 images a set
  python benchmarks/p1_views.py --seeds 0 --count 2 --train 100  a short try

The sets: real digits; drawn ones, at six guidance scales and in two steps; real ones, blurred; five real ones of each digit, repeated.
Variety falls from the real ones over the rising scales to the repeated ones. Each view's recall is compared with this order.
Both views grade against the same real images, none of which is in a set. A PNG next to the record shows the first image of each digit.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import repository_root  # noqa: F401  # isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.outside_view import TRAIN, grades, outside_classifier, real_digits, reference_of, select
from benchmarks.timing import BENCH, report
from digits.classifier import shipped_classifiers
from digits.sampling import CHECKPOINT, DigitRequest, DigitSampler, DigitSamplerConfig, graded_requests, labels_of
from P1_dataloader import Digits
from P1_model import DIGITS, DOMAINS, load_network
from runtime.cli import BadInput, check_positive, run_script
from runtime.device import Device, detect
from runtime.files import ROOT
from runtime.images import labelled_grid, to_uint8
from runtime.record import Record

SCALES, FEW = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0), 2
FALLING_VARIETY = ("real", *(f"guidance {scale:g}" for scale in SCALES), "five repeated")
MEASURES = ("accuracy", "recall", "frechet")


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    data: Path = ROOT / "hw2_data" / "digits"
    """Folder of real digits in the homework's layout."""
    model: Path = CHECKPOINT
    """Checkpoint of P1."""
    seeds: tuple[int, ...] = (0, 1, 2)
    count: int = 25
    """Images per digit and domain in each set."""
    train: int = TRAIN
    """Real training images per domain to which the outside view is fit."""
    batch: int = 100
    """Images drawn at once."""
    device: Device = "auto"
    record: Path = BENCH / "p1_views.json"


def main(settings: Settings) -> None:
    """Print the numbers of every set in both views, and the rank correlations: mean and spread over the seeds."""
    check_positive(settings, "count", "train", "batch")
    machine = detect(settings.device)
    record = Record(settings, machine)
    every = range(len(DOMAINS))
    train = [real_digits(settings.data, "train", domain, settings.train) for domain in every]
    val = [real_digits(settings.data, "val", domain) for domain in every]
    network = load_network(settings.model, machine.device)
    sampler = DigitSampler(network, DigitSamplerConfig.from_dict(network.sampler), settings.batch)
    views = {
        "ours": shipped_classifiers(machine.device),
        "outside": [outside_classifier(domain, train[domain], machine.device) for domain in every],
    }
    correlations: dict[str, list[float]] = {}
    record.metrics["sets"] = []

    for seed in settings.seeds:
        held_out = [hold_out(digits, settings.count, seed) for digits in val]
        requests = graded_requests(seed, settings.count)
        sets = ten_sets(sampler, requests, torch.cat([images for images, _ in held_out]))
        if seed == settings.seeds[0]:
            write_sheet(settings.record.with_suffix(".png"), sets)
        table: dict[str, dict[str, dict[str, float]]] = {}  # {view: {set: numbers}}
        for view, classifiers in views.items():
            for classifier, digits, (_, rest) in zip(classifiers, train, held_out, strict=True):
                classifier.reference = reference_of(classifier, digits, rest)
            table[view] = {name: grades(classifiers, images, *labels_of(requests)) for name, images in sets.items()}
        record.metrics["sets"].append({"seed": seed, **table})
        print_table(seed, table)
        for name, value in rank_correlations(table).items():
            correlations.setdefault(name, []).append(value)

    record.add_repeats(correlations)
    print("rank correlations")
    report(record, settings.record)


def hold_out(digits: Digits, count: int, seed: int) -> tuple[Tensor, Digits]:
    """Return `count` images of each digit [10*count,3,28,28], digit by digit, and the rest, shuffled. Raise BadInput if no rest is left."""
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    rows = [order[digits.digits[order] == digit] for digit in range(DIGITS)]
    if len(fewest := min(rows, key=len)) <= count:
        name = DOMAINS[int(digits.domains[0])]
        raise BadInput(
            f"--count {count}: {name} has {len(fewest)} validation images of a digit, of which one must be left"
        )
    rest = torch.cat([own[count:] for own in rows])
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    return digits.images[torch.cat([own[:count] for own in rows])], select(digits, rest)


def ten_sets(sampler: DigitSampler, requests: Sequence[DigitRequest], real: Tensor) -> dict[str, Tensor]:
    """Return {name: images [N,3,28,28] uint8}. Image i of every set, as of `real`, shows the digit and domain of request i."""

    def drawn(title: str, config: DigitSamplerConfig) -> Tensor:
        return to_uint8(replace(sampler, config=config).images(requests, title))

    sets = {"real": real}
    for scale in SCALES:
        name = f"guidance {scale:g}"
        sets[name] = drawn(name, replace(sampler.config, guidance=scale))
    sets[f"{FEW} steps"] = drawn(f"{FEW} steps", replace(sampler.config, name="dpm", steps=FEW))
    sets["blurred"] = F.avg_pool2d(real.float(), 3, 1, 1, count_include_pad=False).round().to(torch.uint8)
    count = len(requests) // (DIGITS * len(DOMAINS))
    five = torch.arange(count) % 5
    sets["five repeated"] = real.unflatten(0, (-1, count))[:, five].flatten(0, 1)
    return sets


def write_sheet(path: Path, sets: dict[str, Tensor]) -> None:
    """Write a PNG with the first image of every digit and domain, a row per set."""
    columns = [f"{domain}\n{digit}" for domain in DOMAINS for digit in range(DIGITS)]
    firsts = [images[:: len(images) // len(columns)] for images in sets.values()]
    labelled_grid(path, torch.cat(firsts), list(sets), columns, "Ten sets of digits")


def rank_correlations(table: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Return Spearman's correlation of both views per domain and measure, and of each view's recall with the order FALLING_VARIETY.

    `table` is {view: {set: numbers of grades}}. Equal numbers have no rank: nan.
    """
    from scipy.stats import spearmanr  # slow to import

    def spearman(first: Sequence[float], second: Sequence[float]) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # equal numbers have no rank: nan
            return float(spearmanr(first, second).statistic)

    results = {}
    for name in DOMAINS:
        for measure in MEASURES:
            ours, outside = ([row[f"{name} {measure}"] for row in rows.values()] for rows in table.values())
            results[f"{name} {measure}: ours and outside"] = spearman(ours, outside)
        for view, rows in table.items():
            recall = [rows[key][f"{name} recall"] for key in FALLING_VARIETY]
            falling = range(len(recall), 0, -1)
            results[f"{name} recall and variety: {view}"] = spearman(falling, recall)
    return results


def print_table(seed: int, table: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print a row per domain and set: every measure in both views."""
    columns = [(measure, view) for measure in MEASURES for view in table]
    print(f"seed {seed}".ljust(24) + "".join(f"{measure}, {view}".rjust(19) for measure, view in columns))
    for name in DOMAINS:
        for key in table["ours"]:
            numbers = (table[view][key][f"{name} {measure}"] for measure, view in columns)
            print(f"{name} {key}".ljust(24) + "".join(f"{number:19.3f}" for number in numbers))


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
