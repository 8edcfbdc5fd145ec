"""From labels and seeds to digits: sampler settings, batches of images, and redrawing what a classifier misreads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from diffusion import samplers
from diffusion.guidance import Guidance
from diffusion.noise import draw
from diffusion.noise import generators as make_generators
from diffusion.samplers import Callback, ignore
from diffusion.step_rules import step_rule
from digits.classifier import DigitClassifier, misclassified
from P1_model import HOMEWORK, DataSpec, Network
from P1_model import DigitSamplerConfig as DigitSamplerConfig
from runtime.batches import in_batches
from runtime.cli import BadInput, progress_bar
from runtime.distributed import ALONE, Shard
from runtime.files import ROOT
from runtime.images import to_uint8
from runtime.seeds import distinct_seeds

CHECKPOINT = ROOT / "checkpoints" / "p1_digits.safetensors"


@dataclass(frozen=True)
class DigitRequest:
    """One image to sample: digit 0..9 (10 = any) or class, domain 0 or 1 (2 = any), and the seed of its noise."""

    digit: int
    domain: int
    seed: int


def graded_requests(
    seed: int,
    count: int,
    digits: Sequence[int] | None = None,
    domains: Sequence[int] | None = None,
    spec: DataSpec = HOMEWORK,
) -> list[DigitRequest]:
    """Return `count` requests for each of these domains and digits (None = all), ordered by domain, digit and index.

    An image's seed is derived from (seed, domain, digit, index) and does not depend on the rest of the selection.
    Of two equal seeds, the one with the higher index (then domain, then digit) is replaced, so no two images share their noise.
    """
    every_digit, every_domain = range(len(spec.classes)), range(len(spec.domains))
    keys = list(product(range(count), every_domain, every_digit))  # all, so that a part has the same seeds
    derived = distinct_seeds((seed, domain, digit, index) for index, domain, digit in keys)
    seeds = dict(zip(keys, derived, strict=True))
    return [
        DigitRequest(digit, domain, seeds[index, domain, digit])
        for domain in (every_domain if domains is None else domains)
        for digit in (every_digit if digits is None else digits)
        for index in range(count)
    ]


def labels_of(requests: Sequence[DigitRequest], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return the digits [N] and domains [N] of the requests, int64."""
    digits = torch.tensor([request.digit for request in requests], device=device)
    return digits, torch.tensor([request.domain for request in requests], device=device)


def check_steps(network: Network, config: DigitSamplerConfig) -> None:
    """Raise BadInput if config.rule does not allow config.steps steps with the network's schedule.

    Sampler `distilled` also requires a network that is distilled to this number of steps.
    """
    if config.name == "distilled":
        if not (possible := network.unet.config.distilled_steps):
            raise BadInput("--sampler distilled: this checkpoint is not distilled to a few steps")
        if config.steps not in possible:
            numbers = " or ".join(map(str, possible))
            raise BadInput(
                f"--steps {config.steps}: this checkpoint is distilled to {numbers} steps: --sampler dpm takes others"
            )
    try:
        step_rule(config.rule, len(network.schedule), config.steps)
    except ValueError as error:
        raise BadInput(f"--steps: {error}") from None


@torch.inference_mode()
def sample(
    network: Network, requests: Sequence[DigitRequest], config: DigitSamplerConfig, callback: Callback = ignore
) -> Tensor:
    """Sample one batch: [B,3,28,28] (the shape in network.spec) float in -1..1, which only rule ddim may exceed."""
    device, schedule = next(network.unet.parameters()).device, network.schedule
    guidance = Guidance(config.guidance, config.interval, config.rescale)
    distilled = config.name == "distilled"
    denoise = network.guided(*labels_of(requests, device), guidance, config.steps if distilled else None)

    generators = make_generators([request.seed for request in requests])
    x = draw(generators, network.spec.shape, device).to(memory_format=torch.channels_last)
    if config.name == "dpm":
        return samplers.dpm_solver(denoise, x, schedule, config.steps, callback)
    if config.name == "ddpm":
        return samplers.ddpm(denoise, x, schedule, generators, callback)
    if distilled:  # trained on steps of DDIM without clamp
        grid = replace(step_rule("trailing", len(schedule), config.steps), clamp=False)
        return samplers.ddim(denoise, x, schedule, grid, callback=callback).clamp(-1, 1)
    steps = step_rule(config.rule, len(schedule), config.steps)
    return samplers.ddim(denoise, x, schedule, steps, generators, config.eta, callback)


@dataclass(frozen=True)
class DigitSampler:
    """A network with the sampler settings and the batch size to sample it with."""

    network: Network
    config: DigitSamplerConfig
    batch: int

    def images(self, requests: Sequence[DigitRequest], title: str) -> Tensor:
        """Sample the requests in batches of equal size, with a progress bar: [N,C,H,W] float in -1..1 on the CPU."""
        parts = [torch.empty(0, *self.network.spec.shape)]
        with progress_bar(len(requests), title) as bar:
            work = partial(sample, self.network, config=self.config)
            for chunk, images in in_batches(work, requests, self.batch):
                parts.append(images[: len(chunk)].cpu())
                bar.update(len(chunk))
        return torch.cat(parts)

    def expected_seconds(self, count: int) -> float:
        """Return the time for `count` images, extrapolated from one batch with two steps."""
        few = replace(self.config, name="ddim", rule="trailing", steps=2)
        requests = [DigitRequest(0, 0, seed) for seed in range(self.batch)]
        sample(self.network, requests, few)
        start = time.perf_counter()
        sample(self.network, requests, few)
        per_step = (time.perf_counter() - start) / 2
        return per_step * self.config.passes(len(self.network.schedule)) * -(-count // self.batch)


def redraw(
    sampler: DigitSampler,
    classifiers: Sequence[DigitClassifier],
    requests: Sequence[DigitRequest],
    images: dict[int, Tensor],
    retries: int,
    shard: Shard = ALONE,
) -> tuple[list[int], list[int]]:
    """Replace misread images in the dict `images`, {row of `requests`: [3,28,28] uint8}, by images from other seeds.

    Return the rows misread at the first try, and the rows still misread after `retries` attempts, of all processes.
    The seed of an attempt is derived from the image's first seed. It depends on other images only if two seeds are equal.
    `images` holds the rows of this process. A row moves to the process that redraws it.
    """
    digits, domains = labels_of(requests)

    def misread(rows: list[int], batch: int) -> list[int]:
        """Return the misread rows of all processes, classified batch by batch."""
        wrong = []
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            batch_images = torch.stack([images[row] for row in part])
            indices = misclassified(classifiers, batch_images, digits[part], domains[part])
            wrong += [part[index] for index in indices.tolist()]
        return sorted(shard.gather(wrong))

    few = min(sampler.batch, 32)
    used = [request.seed for request in requests]
    first = wrong = misread(list(images), sampler.batch)
    for attempt in range(1, retries + 1):
        if not wrong:
            break
        for row in wrong:
            images.pop(row, None)
        seeds = distinct_seeds([(requests[row].seed, attempt) for row in wrong], used)
        used += seeds
        mine = shard.rows(len(wrong), few)
        rows = [wrong[index] for index in mine]
        again = [replace(requests[wrong[index]], seed=seeds[index]) for index in mine]
        fresh = to_uint8(replace(sampler, batch=few).images(again, f"attempt {attempt + 1}"))
        images.update(zip(rows, fresh, strict=True))
        wrong = misread(rows, few)
    return first, wrong
