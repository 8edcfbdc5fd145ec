"""Every picture has its own seed and its own stream of noise, whatever shares its batch; and ways from one noise to another."""

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


def linear(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) a + alpha b. Half way between two independent noises its norm is only 0.71 of theirs."""
    return (1 - alpha) * a + alpha * b


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """sin((1-alpha) theta)/sin(theta) a + sin(alpha theta)/sin(theta) b on the flattened tensors, theta their angle (Shoemake 1985).

    Parallel and opposite vectors, where that is 0/0, turn in some plane that holds them; with a zero vector it is linear.
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
