"""Noise: every image has its own seed and noise stream, independent of its batch; interpolation between two noises."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one generator per seed, on the CPU, so that its numbers do not depend on the device that samples."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Draw standard normal noise [len(generators), *shape] float32 on `device`; image k draws from generator k only."""
    noise = torch.stack([torch.randn(*shape, generator=generator) for generator in generators])
    return noise.to(device, non_blocking=True)


def linear(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Return (1 - alpha) a + alpha b. For two independent noises and alpha = 0.5, its norm is only 0.71 of theirs."""
    return (1 - alpha) * a + alpha * b


def mean(noises: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return sum w_k x_k / sqrt(sum w_k^2) (LOL, arXiv 2408.08558).

    If the noises x_k are independent and standard normal, so is the result.
    """
    norm = math.sqrt(sum(weight**2 for weight in weights))
    total = sum(weight / norm * x.double() for weight, x in zip(weights, noises, strict=True))
    return torch.as_tensor(total).to(noises[0].dtype)


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Return sin((1-alpha) theta)/sin(theta) a + sin(alpha theta)/sin(theta) b, theta the angle of a and b (Shoemake 1985).

    Treats the tensors as flat vectors; returns the shape and dtype of a. If one of them is zero, returns `linear`.
    For parallel or opposite vectors the formula is 0/0: a is rotated by alpha theta in an arbitrary fixed plane instead.
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
