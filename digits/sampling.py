"""From labels and seeds to digits: the sampler's settings, batches of images, and redrawing what a classifier misreads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion import samplers
from diffusion.guidance import Guidance, guided
from diffusion.noise import draw, generators
from diffusion.steps import Rule, step_rule
from digits.classifier import DigitClassifier, misclassified
from P1_model import IMAGE_SHAPE, NO_DIGIT, Network
from runtime.batches import in_batches
from runtime.cli import progress_bar
from runtime.distributed import ALONE, Shard
from runtime.files import ROOT
from runtime.images import to_uint8
from runtime.seeds import derived_seed

CHECKPOINT = ROOT / "checkpoints" / "p1_digits.safetensors"


@dataclass(frozen=True)
class DigitSamplerConfig:
    """How to get from noise to a digit."""

    name: Literal["dpm", "ddim", "ddpm"] = "dpm"
    """dpm: DPM-Solver++ (2M); ddim: any eta and rule; ddpm: all T steps."""
    steps: int = 12
    guidance: float = 2.5
    """uncond + scale * (cond - uncond): 0 ignores the digit, 1 is no guidance."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Guidance acts only at these noise levels, as fractions of T."""
    rescale: float = 0.0
    """0..1: pulls the guided output's contrast back to the unguided one's."""
    eta: float = 0.0
    rule: Rule = "trailing"

    @staticmethod
    def from_dict(values: dict[str, Any]) -> DigitSamplerConfig:
        """The settings a checkpoint carries; names that this version doesn't know are ignored."""
        known = {f.name for f in fields(DigitSamplerConfig)}
        kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        return DigitSamplerConfig(**kept)


@dataclass(frozen=True)
class DigitRequest:
    """One picture to draw: digit 0..9 (10: any), domain 0 or 1 (2: any), and the seed of its noise (63 bits)."""

    digit: int
    domain: int
    seed: int


def graded_requests(
    seed: int, count: int, digits: Sequence[int] = range(10), domains: Sequence[int] = (0, 1)
) -> list[DigitRequest]:
    """`count` pictures per domain and digit; each seed follows from (seed, domain, digit, index) alone."""
    return [
        DigitRequest(digit, domain, derived_seed(seed, domain, digit, index))
        for domain in domains
        for digit in digits
        for index in range(count)
    ]


def labels_of(pictures: Sequence[DigitRequest], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Digits [N] and domains [N] of the pictures."""
    digits = torch.tensor([p.digit for p in pictures], device=device)
    return digits, torch.tensor([p.domain for p in pictures], device=device)


@torch.inference_mode()
def sample(
    network: Network,
    pictures: Sequence[DigitRequest],
    sampler: DigitSamplerConfig,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """One batch: [B,3,28,28] float in -1..1 on the network's device."""
    device = next(network.unet.parameters()).device
    digit, domain = labels_of(pictures, device)
    nothing = torch.full_like(digit, NO_DIGIT)
    both = (torch.cat([digit, nothing]), torch.cat([domain, domain]))
    guidance = Guidance(sampler.guidance, sampler.interval, sampler.rescale)
    schedule = network.schedule
    denoise = guided(network, (digit, domain), both, guidance, len(schedule))
    streams = generators([p.seed for p in pictures])
    x = draw(streams, IMAGE_SHAPE, device).to(memory_format=torch.channels_last)
    seen: dict[str, Any] = {"callback": callback} if callback else {}
    if sampler.name == "dpm":
        return samplers.dpm_solver(denoise, x, schedule, sampler.steps, **seen)
    if sampler.name == "ddpm":
        return samplers.ddpm(denoise, x, schedule, streams, **seen)
    steps = step_rule(sampler.rule, len(schedule), sampler.steps)
    return samplers.ddim(denoise, x, schedule, steps, streams, sampler.eta, **seen)


def sample_all(
    network: Network, pictures: Sequence[DigitRequest], sampler: DigitSamplerConfig, batch: int, title: str
) -> Tensor:
    """All pictures in batches of one shape, with a progress bar: [N,3,28,28] float in -1..1 on the CPU."""
    drawn = []
    with progress_bar(len(pictures), title) as bar:
        for chunk, images in in_batches(lambda some: sample(network, some, sampler), pictures, batch):
            drawn.append(images[: len(chunk)].cpu())
            bar.update(len(chunk))
    return torch.cat(drawn) if drawn else torch.empty(0, *IMAGE_SHAPE)


def expected_seconds(network: Network, sampler: DigitSamplerConfig, count: int, batch: int) -> float:
    """Measured: one batch with two steps, scaled up."""
    few = replace(sampler, name="dpm", steps=2)
    pictures = [DigitRequest(0, 0, seed) for seed in range(batch)]
    sample(network, pictures, few)
    start = time.perf_counter()
    sample(network, pictures, few)
    per_step = (time.perf_counter() - start) / 2
    return per_step * steps_of(network, sampler) * -(-count // batch)


def steps_of(network: Network, sampler: DigitSamplerConfig) -> int:
    """Passes of the sampler: ancestral sampling takes all T."""
    return len(network.schedule) if sampler.name == "ddpm" else sampler.steps


def redraw(
    network: Network,
    pictures: Sequence[DigitRequest],
    images: dict[int, Tensor],
    judges: Sequence[DigitClassifier],
    sampler: DigitSamplerConfig,
    batch: int,
    retries: int,
    shard: Shard = ALONE,
) -> int:
    """Replaces, in `images` {row: [3,28,28] uint8}, what the judges misread by pictures from other seeds; returns how many stay
    misread. A picture's next seed follows from its own, so it doesn't depend on what else is drawn. Whoever draws a row again has it
    from then on."""
    digits, domains = labels_of(pictures)

    def wrong_of(rows: list[int], at_once: int) -> list[int]:
        """Judged in the same company too, batch by batch."""
        parts = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
        shown = [torch.stack([images[row] for row in part]) for part in parts]
        found = [
            misclassified(judges, some, digits[part], domains[part]) for some, part in zip(shown, parts, strict=True)
        ]
        mine = [part[index] for part, indices in zip(parts, found, strict=True) for index in indices.tolist()]
        return sorted(shard.gather(mine))

    few = min(batch, 32)
    wrong = wrong_of(list(images), batch)
    for attempt in range(1, retries + 1):
        if not wrong:
            break
        for row in wrong:
            images.pop(row, None)
        rows = [wrong[index] for index in shard.rows(len(wrong), few)]
        again = [replace(pictures[row], seed=derived_seed(pictures[row].seed, attempt)) for row in rows]
        drawn = to_uint8(sample_all(network, again, sampler, few, f"attempt {attempt + 1}"))
        images.update(zip(rows, drawn, strict=True))
        wrong = wrong_of(rows, few)
    return len(wrong)
