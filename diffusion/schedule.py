"""Noise schedules as data: x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4)."""

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
    """Noise levels `alpha_bar` [T] (float64, CPU), and what the network predicts.

    `prediction` eps: the noise. v: sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022, appendix D).
    """

    alpha_bar: Tensor
    prediction: Prediction = "eps"

    def __len__(self) -> int:
        return len(self.alpha_bar)

    @property
    def betas(self) -> Tensor:
        """Return beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, [T] float64."""
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        return 1 - self.alpha_bar / alpha_bar_prev

    def alpha_bar_at(self, t: int) -> float:
        """Return alpha_bar_t rounded to float32, as the homework's samplers do. t = -1 is the clean image: alpha_bar is 1."""
        return 1.0 if t < 0 else float(self.alpha_bar[t].float())

    def x0_and_eps(self, output: Tensor, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Return (x0, eps) implied by the network's output for x at step t; all [B,C,H,W]."""
        alpha_bar = self.alpha_bar_at(t)
        signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        if self.prediction == "v":
            return signal * x - noise * output, noise * x + signal * output
        return (x - noise * output) / signal, output

    def step_output(self, x: Tensor, t: int, x_prev: Tensor, t_prev: int) -> Tensor:
        """Return the network output for x at step t with which a DDIM step (eta 0, no clamp) leads to x_prev at t_prev."""
        alpha_bar, alpha_bar_prev = self.alpha_bar_at(t), self.alpha_bar_at(t_prev)
        signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        signal_prev, noise_prev = math.sqrt(alpha_bar_prev), math.sqrt(1 - alpha_bar_prev)
        if self.prediction == "v":
            kept = signal_prev * signal + noise_prev * noise
            return (x_prev - kept * x) / (noise_prev * signal - signal_prev * noise)
        return (signal * x_prev - signal_prev * x) / (signal * noise_prev - signal_prev * noise)


def linear(steps: int, first: float = 1e-4, last: float = 0.02, prediction: Prediction = "eps") -> Schedule:
    """Return the schedule whose betas rise linearly from `first` to `last` (Ho et al. 2020)."""
    betas = torch.linspace(first, last, steps, dtype=torch.float64)
    return Schedule((1 - betas).cumprod(0), prediction)


def cosine(steps: int, prediction: Prediction = "v", offset: float = 0.008) -> Schedule:
    """Return the cosine schedule, betas clipped at 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return Schedule((1 - betas).cumprod(0), prediction)


def make_schedule(name: str, steps: int, prediction: Prediction) -> Schedule:
    """Return the schedule `linear` (betas 1e-4 .. 0.02 at any T) or `cosine`; raise KeyError for another name."""
    make: dict[str, Callable[..., Schedule]] = {"linear": linear, "cosine": cosine}
    return make[name](steps, prediction=prediction)


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps, with one alpha_bar per image [B,1,1,1]."""
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps


def target(x0: Tensor, eps: Tensor, alpha_bar: Tensor, prediction: Prediction) -> Tensor:
    """Return what the network should predict for x_t, eps or v, with one alpha_bar per image [B,1,1,1]."""
    return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0 if prediction == "v" else eps
