"""Classifier-free guidance as a wrapper of the denoiser (Ho & Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Denoise = Callable[[Tensor, int], Tensor]  # (x_t [B,C,H,W], t) -> the network's output [B,C,H,W]
Condition = TypeVar("Condition")


@dataclass(frozen=True)
class Guidance:
    """Settings of guidance: how strong, and at which timesteps.

    scale: out = uncond + scale (cond - uncond); 1 = no guidance.
    interval: (start, end); guidance applies only at start <= t/T < end (Kynkaanniemi et al. 2024).
    rescale: 0..1, pulls the standard deviation of out back to that of cond (Lin et al. 2024, eq. 15, 16); 0 = off.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def active(self, t: int, total: int) -> bool:
        """Return whether guidance is applied at timestep t of `total`."""
        return self.scale != 1 and self.interval[0] <= t / total < self.interval[1]

    def combine(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """Return the guided output of the conditional and the unconditional prediction, all [B,C,H,W]."""
        out = uncond + self.scale * (cond - uncond)
        return rescaled(out, cond, self.rescale) if self.rescale else out


def guided(
    network: Callable[[Tensor, int, Condition], Tensor],
    condition: Condition,
    both: Condition,
    guidance: Guidance,
    total: int,
) -> Denoise:
    """Return a denoiser that runs `network(x, t, condition)` with guidance; `total` is T.

    `both` is `condition` followed by its null version along the batch.
    Where guidance is active, the network is called once, on two copies of x, with `both`.
    """

    def denoise(x: Tensor, t: int) -> Tensor:
        if not guidance.active(t, total):
            return network(x, t, condition)
        cond, uncond = network(torch.cat([x, x]), t, both).chunk(2)
        return guidance.combine(cond, uncond)

    return denoise


def rescaled(out: Tensor, cond: Tensor, weight: float) -> Tensor:
    """Return `out` [B,C,H,W], scaled per image: at weight 1 to the standard deviation of `cond`, at weight 0 not at all."""
    dims = tuple(range(1, out.dim()))
    factor = cond.std(dims, keepdim=True) / out.std(dims, keepdim=True)
    return out * (weight * factor + 1 - weight)
