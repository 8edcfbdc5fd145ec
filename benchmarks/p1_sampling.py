"""Sampling speed of P1: the default sampler against 500-step DDPM with two passes per step, on the same network and seeds.

  python benchmarks/p1_sampling.py                          100 pictures; about 6 minutes on two CPU cores
  python benchmarks/p1_sampling.py --count 1 --repeats 5    20 pictures

Baseline: ancestral sampling on 500 steps (DDIM with eta 1 is that on a grid), guidance by two separate passes, eager, fp32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import repository_root  # noqa: F401  # isort: split
import torch
from torch import Tensor

from diffusion.noise import draw, generators
from diffusion.samplers import ddim
from diffusion.steps import step_rule
from digits.classifier import accuracy, shipped_classifiers
from digits.sampling import CHECKPOINT, DigitRequest, DigitSampler, DigitSamplerConfig, graded_requests, labels_of
from P1_model import IMAGE_SHAPE, NO_DIGIT, Network, load_network
from runtime.cli import progress_bar, run_script
from runtime.device import Device, allow_tf32, detect
from runtime.images import to_uint8
from runtime.record import Record


@dataclass(frozen=True)
class Settings:
    """Flags."""

    checkpoint: Path = CHECKPOINT
    count: int = 5
    """Pictures per digit and domain."""
    repeats: int = 3
    """Of the default sampler; the baseline runs once, its spread is over its steps."""
    steps: int = 500
    """Steps of the baseline."""
    seed: int = 0
    device: Device = "auto"
    record: Path = CHECKPOINT.parents[1] / "runs" / "bench" / "p1_sampling.json"


@torch.inference_mode()
def two_pass_ddpm(network: Network, pictures: Sequence[DigitRequest], scale: float, steps: int) -> Tensor:
    """[B,3,28,28]: every step runs the network with the digit, then without."""
    device = next(network.unet.parameters()).device
    digit, domain = labels_of(pictures, device)
    streams = generators([p.seed for p in pictures])
    grid = step_rule("trailing", len(network.schedule), steps)
    bar = progress_bar(steps, "baseline", "step")

    def denoise(x: Tensor, t: int) -> Tensor:
        cond = network(x, t, (digit, domain))
        uncond = network(x, t, (torch.full_like(digit, NO_DIGIT), domain))
        bar.update()
        return uncond + scale * (cond - uncond)

    x = draw(streams, IMAGE_SHAPE, device)
    with bar:
        return ddim(denoise, x, network.schedule, grid, streams, eta=1.0)


def main(bench: Settings) -> None:
    """Prints seconds and accuracy of both, and the ratio."""
    machine = detect(bench.device)
    allow_tf32(False)
    network, judges = load_network(bench.checkpoint, machine.device), shipped_classifiers(machine.device)
    sampler = DigitSamplerConfig.from_dict(network.sampler)
    pictures = graded_requests(bench.seed, bench.count)
    digits, domains = labels_of(pictures)
    DigitSampler(network, replace(sampler, steps=2), len(pictures)).images(pictures[:2], "warming up")
    ours: list[float] = []
    for _ in range(bench.repeats):
        start = time.perf_counter()
        quick = DigitSampler(network, sampler, len(pictures)).images(pictures, "default sampler")
        ours.append(time.perf_counter() - start)
    start = time.perf_counter()
    slow = two_pass_ddpm(network, pictures, sampler.guidance, bench.steps).cpu()
    baseline = time.perf_counter() - start
    scores = {
        name: accuracy(judges, to_uint8(images), digits, domains) for name, images in (("ours", quick), ("ddpm", slow))
    }
    ratios = [baseline / seconds for seconds in ours]
    means = {name: statistics.mean(values) for name, values in scores.items()}
    print(f"{len(pictures)} pictures, {machine.name}")
    print(
        f"default ({sampler.name}, {sampler.steps} steps)  {statistics.mean(ours):8.2f} s  accuracy {means['ours']:.3f}"
    )
    print(f"DDPM, {bench.steps} steps, two passes  {baseline:8.2f} s  accuracy {means['ddpm']:.3f}")
    print(f"ratio {statistics.mean(ratios):.1f} +- {statistics.pstdev(ratios):.1f}  (n = {len(ratios)})")
    record = Record(bench, machine)
    record.add_repeats({"default sampler, s": ours, "DDPM, two passes, s": [baseline], "times faster": ratios})
    record.add_repeats({f"accuracy, {name}": [mean] for name, mean in means.items()})
    record.save(bench.record)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
