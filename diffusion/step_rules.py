"""Named step rules: the timesteps that a sampler visits, where each leads, and whether x0 is clamped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

OneStateRule = Literal["homework", "ddim", "diffusers", "trailing"]
Rule = Literal[OneStateRule, "bdia"]


@dataclass(frozen=True)
class Steps:
    """Pairs (t, previous t) from noise to image; previous -1 is the clean end, where alpha_bar is 1."""

    pairs: tuple[tuple[int, int], ...]
    clamp: bool  # x0 to [-1, 1] before each update
    two_states: bool = False  # a step starts from the last two states: samplers.bdia

    def backwards(self) -> Steps:
        """Return the way from image to noise, without clamp: the image is the state at alpha_bar[0], also where sampling ends at 1."""
        pairs = tuple((max(t_prev, 0), t) for t, t_prev in reversed(self.pairs) if t)
        return replace(self, pairs=pairs, clamp=False)


def step_rule(rule: Rule, total: int, steps: int) -> Steps:
    """Return the grid of `steps` out of `total` timesteps; raise ValueError when they don't fit.

    homework   981 .. 21, 1 (for 50 of 1000), last alpha_bar = alpha_bar[0], x0 clamped
    ddim       980 .. 20, 0, last alpha_bar = 1, no clamp (Song et al. 2021)
    diffusers  the same grid with that library's default: x0 clamped
    trailing   999 .. 39, 19, last alpha_bar = 1, x0 clamped: starts at pure noise (Lin et al. 2024)
    bdia       the grid of homework, no clamp, two states (Zhang et al. 2023)
    """
    if not 1 <= steps <= total:
        raise ValueError(f"{steps} steps: give 1 to {total}")
    stride, offset = total // steps, int(rule in ("homework", "bdia"))
    if rule == "trailing":
        times = [round(total - k * total / steps) - 1 for k in range(steps)]
    else:
        times = [k * stride + offset for k in reversed(range(steps))]
    if times[0] >= total:
        raise ValueError(f"{steps} steps: rule {rule} would start at {times[0]}, the last is {total - 1}")
    pairs = tuple(zip(times, [*times[1:], 0 if offset else -1], strict=True))
    return Steps(pairs, rule not in ("ddim", "bdia"), rule == "bdia")
