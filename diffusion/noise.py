"""Every picture has its own seed and its own stream of noise, whatever shares its batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per picture: a CPU's stream is the same on every machine and device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(streams: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """The next standard normal [len(streams), *shape] float32; picture k takes only from stream k."""
    noise = torch.stack([torch.randn(*shape, generator=stream) for stream in streams])
    return noise.to(device, non_blocking=True)
