"""Noise schedules as data: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["eps", "v"]


@dataclass(frozen=True)
class Schedule:
    """`alpha_bar` [T] float64 on the CPU, and what the network's output means: eps, or v = sqrt(abar) eps - sqrt(1-abar) x0."""

    alpha_bar: Tensor
    prediction: Prediction = "eps"

    def __len__(self) -> int:
        return len(self.alpha_bar)

    @property
    def betas(self) -> Tensor:
        """[T] float64, beta_t = 1 - abar_t / abar_{t-1}."""
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        return 1 - self.alpha_bar / before

    def alpha(self, t: int) -> float:
        """abar_t rounded to float32 as the homework's samplers do; t = -1 means the clean end, where abar is 1."""
        return 1.0 if t < 0 else float(self.alpha_bar[t].float())

    def clean_and_noise(self, output: Tensor, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """(x0, eps) that the network's output implies at step t; all [B,C,H,W]."""
        alpha = self.alpha(t)
        signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
        if self.prediction == "v":  # Salimans & Ho 2022, appendix D
            return signal * x - noise * output, noise * x + signal * output
        return (x - noise * output) / signal, output


def linear(steps: int, first: float = 1e-4, last: float = 0.02, prediction: Prediction = "eps") -> Schedule:
    """Ho et al. 2020: betas rise linearly from `first` to `last`."""
    betas = torch.linspace(first, last, steps, dtype=torch.float64)
    return Schedule((1 - betas).cumprod(0), prediction)


def cosine(steps: int, prediction: Prediction = "v", offset: float = 0.008) -> Schedule:
    """Nichol & Dhariwal 2021, eq. 17, betas clipped at 0.999."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return Schedule((1 - betas).cumprod(0), prediction)


def make_schedule(name: str, steps: int, prediction: Prediction) -> Schedule:
    """`linear` (1e-4 .. 0.02 at any T) or `cosine`; raises KeyError for another name."""
    make: dict[str, Callable[..., Schedule]] = {"linear": linear, "cosine": cosine}
    return make[name](steps, prediction=prediction)


def add_noise(x0: Tensor, eps: Tensor, alpha: Tensor) -> Tensor:
    """x_t for per-image abar `alpha` [B,1,1,1]."""
    return alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps


def target(x0: Tensor, eps: Tensor, alpha: Tensor, prediction: Prediction) -> Tensor:
    """What the network has to output for x_t, with abar `alpha` [B,1,1,1]."""
    return alpha.sqrt() * eps - (1 - alpha).sqrt() * x0 if prediction == "v" else eps


def min_snr_weight(alpha: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Loss weight min(SNR, gamma) / SNR for eps, / (SNR + 1) for v (Hang et al. 2023); SNR = abar / (1 - abar)."""
    snr = alpha / (1 - alpha)
    return snr.clamp(max=gamma) / (snr + 1 if prediction == "v" else snr)
