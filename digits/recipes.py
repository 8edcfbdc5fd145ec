"""The settings of P1_training.py, and the recipe (schedule, rate, batch ..) that goes with each preset of the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusion.schedule import Prediction
from digits.sampling import Sampler


@dataclass(frozen=True)
class Recipe:
    """What goes with a preset of the network."""

    schedule: Literal["linear", "cosine"] = "cosine"
    prediction: Prediction = "v"
    steps: int = 8_000  # optimizer steps
    batch: int = 64  # global batch over all processes
    lr: float = 1e-3
    min_snr: float = 0.0
    ema: float = 0.999
    sampler: Sampler = Sampler()


RECIPES = {
    "report": Recipe("linear", "eps", 30_000, 256, 1e-3, 0.0, sampler=Sampler("dpm", 20)),
    "tiny": Recipe(steps=2_000),
    "cpu": Recipe(sampler=Sampler(steps=10, guidance=5.0)),
    "gpu": Recipe(steps=20_000, batch=512, ema=0.9995),
}
