"""Noise: every image has its own seed and noise stream, independent of its batch; interpolation between two noises."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one CPU generator per image: a CPU's stream is the same on every machine and device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Draw the next standard normal [len(generators), *shape] float32; image k draws only from generator k."""
    noise = torch.stack([torch.randn(*shape, generator=generator) for generator in generators])
    return noise.to(device, non_blocking=True)


def linear(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Return (1 - alpha) a + alpha b; half way between two independent noises its norm is only 0.71 of theirs."""
    return (1 - alpha) * a + alpha * b


def mean(noises: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return sum w_k x_k / sqrt(sum w_k^2): of independent standard normal noises a standard normal one (LOL, arXiv 2408.08558)."""
    norm = math.sqrt(sum(weight**2 for weight in weights))
    total = sum(weight / norm * x.double() for weight, x in zip(weights, noises, strict=True))
    return torch.as_tensor(total).to(noises[0].dtype)


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Return sin((1-alpha) theta)/sin(theta) a + sin(alpha theta)/sin(theta) b, theta the angle of a and b (Shoemake 1985).

    Works on the flattened tensors. Parallel and opposite vectors, where this is 0/0, turn in some plane that holds them.
    With a zero vector the interpolation is linear.
    """
    x, y = a.double().flatten(), b.double().flatten()
    lengths = x.norm(), y.norm()
    if not all(lengths):
        return linear(a, b, alpha)
    u, v = x / lengths[0], y / lengths[1]
    theta = 2 * torch.atan2((u - v).norm(), (u + v).norm())  # exact for small angles too, unlike arccos
    if theta.sin() > 1e-6:
        out = (((1 - alpha) * theta).sin() * x + (alpha * theta).sin() * y) / theta.sin()
    else:
        other = torch.randn(len(u), dtype=u.dtype, generator=torch.Generator().manual_seed(0)).to(u.device)
        other -= (other @ u) * u
        direction = (alpha * theta).cos() * u + (alpha * theta).sin() * other / other.norm()
        out = linear(*lengths, alpha) * direction
    return out.to(a.dtype).view_as(a)
