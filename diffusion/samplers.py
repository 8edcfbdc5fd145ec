"""Samplers as free functions: (denoise, x, schedule, steps, streams) -> x.

`denoise(x, t)` returns what the schedule says the network predicts; x [B,C,H,W] starts as standard normal noise; pictures are in [-1, 1].
`watch(t, x)`, where given, sees the state after the step that arrives at t; `nudge(x, t)` may change it before the network sees it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion.guidance import Denoise
from diffusion.noise import draw
from diffusion.schedule import Schedule
from diffusion.steps import Steps

Watch = Callable[[int, Tensor], None]
Nudge = Callable[[Tensor, int], Tensor]
Streams = Sequence[torch.Generator]
ALL = slice(None)


def _ignore(t: int, x: Tensor) -> None:
    """The watcher that does nothing."""


def unchanged(x: Tensor, t: int) -> Tensor:
    """No nudge."""
    return x


def ddpm(denoise: Denoise, x: Tensor, schedule: Schedule, streams: Streams, watch: Watch = _ignore) -> Tensor:
    """Ancestral sampling over all T steps with the posterior variance (Ho et al. 2020, eq. 6, 7), x0 clamped to [-1, 1]."""
    for t in reversed(range(len(schedule))):
        alpha, before = schedule.alpha(t), schedule.alpha(t - 1)
        beta = 1 - alpha / before
        x0, _ = schedule.clean_and_noise(denoise(x, t), x, t)
        x0 = x0.clamp(-1, 1)
        x = (math.sqrt(before) * beta * x0 + math.sqrt(alpha / before) * (1 - before) * x) / (1 - alpha)
        if t:
            variance = (1 - before) / (1 - alpha) * beta
            x = x + math.sqrt(variance) * draw(streams, x.shape[1:], x.device)
        watch(t, x)
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    steps: Steps,
    streams: Streams = (),
    eta: float = 0.0,
    watch: Watch = _ignore,
    nudge: Nudge = unchanged,
) -> Tensor:
    """Song et al. 2021, eq. 12, on any grid; eta 0 is deterministic, eta 1 as random as DDPM. eps is not recomputed after the clamp."""
    for t, previous in steps.pairs:
        alpha, before = schedule.alpha(t), schedule.alpha(previous)
        x = nudge(x, t)
        x0, eps = schedule.clean_and_noise(denoise(x, t), x, t)
        x0 = x0.clamp(-1, 1) if steps.clamp else x0
        sigma = eta * math.sqrt((1 - before) / (1 - alpha)) * math.sqrt(max(0.0, 1 - alpha / before))
        x = math.sqrt(before) * x0 + math.sqrt(max(0.0, 1 - before - sigma**2)) * eps
        if sigma:
            x = x + sigma * draw(streams, x.shape[1:], x.device)
        watch(max(previous, 0), x)
    return x


def dpm_solver(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    watch: Watch = _ignore,
    clamp: bool = True,
    nudge: Nudge = unchanged,
    span: slice = ALL,
) -> Tensor:
    """DPM-Solver++ (2M) in few steps (Lu et al. 2022), by diffusers; deterministic, trailing grid, ends at the clean picture, which is
    clamped to [-1, 1] unless it is a latent. `span`: these steps of the grid only, the first of them of first order."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler  # slow to import

    if not 1 <= steps <= len(schedule):
        raise ValueError(f"{steps} steps: give 1 to {len(schedule)}")
    solver = DPMSolverMultistepScheduler(
        num_train_timesteps=len(schedule),
        trained_betas=schedule.betas.tolist(),
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[schedule.prediction],
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        solver_order=2,
    )
    solver.set_timesteps(steps)
    times = solver.timesteps.tolist()  # on the CPU: no device sync
    for t, previous in list(zip(times, [*times[1:], 0], strict=True))[span]:
        x = nudge(x, t)
        x = solver.step(denoise(x, t), t, x, return_dict=False)[0]
        watch(previous, x)
    return x.clamp(-1, 1) if clamp else x
