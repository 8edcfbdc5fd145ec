"""Sampling speed of P1: the default sampler against 500-step DDPM with two passes per step, same network and seeds.

  python benchmarks/p1_sampling.py                          100 images; about 6 minutes on two CPU cores
  python benchmarks/p1_sampling.py --count 1 --repeats 5    20 images

Baseline: ancestral sampling (DDIM with eta 1) on a grid of 500 steps, guidance by two separate passes, eager, fp32.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import repository_root  # noqa: F401  # isort: split
import torch
from torch import Tensor

from benchmarks.timing import BENCH, ratios, report, timed
from diffusion.noise import draw, generators
from diffusion.samplers import ddim
from diffusion.step_rules import step_rule
from digits.classifier import accuracy, shipped_classifiers
from digits.sampling import CHECKPOINT, DigitRequest, DigitSampler, DigitSamplerConfig, graded_requests, labels_of
from P1_model import IMAGE_SHAPE, NO_DIGIT, Network, load_network
from runtime.cli import check_positive, progress_bar, run_script
from runtime.device import Device, allow_tf32, detect
from runtime.images import to_uint8
from runtime.record import Record


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    model: Path = CHECKPOINT
    """Checkpoint of P1."""
    count: int = 5
    """Images per digit and domain."""
    repeats: int = 3
    """Runs of the default sampler. The baseline runs once."""
    steps: int = 500
    """Steps of the baseline."""
    seed: int = 0
    device: Device = "auto"
    record: Path = BENCH / "p1_sampling.json"


@torch.inference_mode()
def two_pass_ddpm(network: Network, requests: Sequence[DigitRequest], scale: float, steps: int) -> Tensor:
    """Return images [B,3,28,28] in -1..1. Each step runs the network with the digit, then without it, for guidance of this `scale`."""
    device = next(network.unet.parameters()).device
    digit, domain = labels_of(requests, device)
    streams = generators([request.seed for request in requests])
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


def main(settings: Settings) -> None:
    """Print seconds and accuracy of both samplers, and the ratio of the seconds."""
    check_positive(settings, "count", "repeats", "steps")
    machine = detect(settings.device)
    device = machine.device
    allow_tf32(False)
    network, classifiers = load_network(settings.model, device), shipped_classifiers(device)
    config = DigitSamplerConfig.from_dict(network.sampler)
    requests = graded_requests(settings.seed, settings.count)
    sampler, images, ours = DigitSampler(network, config, len(requests)), {}, []

    DigitSampler(network, replace(config, name="dpm", steps=2), len(requests)).images(requests[:2], "warm-up")
    for _ in range(settings.repeats):
        time, images["default"] = timed(lambda: sampler.images(requests, "default sampler"), device)
        ours.append(time)
    ddpm, images["DDPM"] = timed(lambda: two_pass_ddpm(network, requests, config.guidance, settings.steps), device)
    record = Record(settings, machine)
    record.add_repeats({"default sampler, s": ours, "DDPM, two passes, s": [ddpm]})
    record.add_repeats({"times faster": ratios([ddpm] * len(ours), ours)})
    for name, batch in images.items():
        scores = accuracy(classifiers, to_uint8(batch), *labels_of(requests))
        record.add_repeats({f"accuracy, {name}": [statistics.mean(scores)]})
    print(
        f"{len(requests)} images, {config.name} with {config.steps} steps, DDPM with {settings.steps}, {machine.name}"
    )
    report(record, settings.record)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
