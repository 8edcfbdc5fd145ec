"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Decay = Literal["linear", "cosine"]


@dataclass(frozen=True)
class LearningRate:
    """A rate that rises linearly to `peak` over `warmup` steps, and falls to 0 over the last fraction `decay` (0..1) of all steps."""

    peak: float
    warmup: int
    decay: float
    shape: Decay = "linear"

    def at(self, step: int, total: int) -> float:
        """Return the learning rate of `step` (from 0) of `total`."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        if self.decay <= 0:
            return self.peak * rise
        left = min(1.0, max(0.0, (total - step) / (self.decay * total)))
        return self.peak * (rise * (left if self.shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)))
