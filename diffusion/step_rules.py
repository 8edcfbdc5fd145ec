"""Named step rules: the timesteps at which a sampler calls the network, and whether it clamps x0."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

OneStateRule = Literal["homework", "ddim", "diffusers", "trailing"]
Rule = Literal[OneStateRule, "bdia"]


@dataclass(frozen=True)
class Steps:
    """The steps of a sampler as pairs (t, t_prev), from noise to image; t_prev = -1 is the clean image, where alpha_bar is 1."""

    pairs: tuple[tuple[int, int], ...]
    clamp: bool  # the predicted x0 to [-1, 1] in every step
    two_states: bool = False  # for samplers.bdia, whose step needs the last two states

    def backwards(self) -> Steps:
        """Return the same timesteps from image to noise, without clamp.

        They start at 0: the image counts as the state at alpha_bar[0], even if sampling ends at t_prev = -1.
        """
        pairs = tuple((max(t_prev, 0), t) for t, t_prev in reversed(self.pairs) if t)
        return replace(self, pairs=pairs, clamp=False)


def step_rule(rule: Rule, total: int, steps: int) -> Steps:
    """Return `steps` of `total` timesteps by a rule; raise ValueError when they don't fit.

    The timesteps below are for 50 of 1000. After the last one comes the image, at alpha_bar[0] or at 1.

    homework   981 .. 21, 1; image at alpha_bar[0]; x0 clamped
    ddim       980 .. 20, 0; image at alpha_bar 1; no clamp (Song et al. 2021)
    diffusers  as ddim, but x0 clamped, which is that library's default
    trailing   999 .. 39, 19; image at alpha_bar 1; x0 clamped: starts at pure noise (Lin et al. 2024)
    bdia       timesteps and image as in homework; no clamp; two states (Zhang et al. 2023)
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
