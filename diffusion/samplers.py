"""Samplers as free functions: (denoise, x, schedule, steps, generators) -> x.

`denoise(x, t)` returns eps or v (`Schedule.prediction`). x [B,C,H,W]: standard normal noise at first, images in [-1, 1] at last.
`generators`: one per image, for the noise that stochastic steps add.
`callback(t, x)` is called with the state after each step. t is the timestep reached, at least 0; in `ddpm` the timestep left.
`nudge(x, t)` returns the state that replaces x before the network reads it at t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion.guidance import Denoise
from diffusion.noise import draw
from diffusion.schedule import Schedule
from diffusion.step_rules import Steps

Callback = Callable[[int, Tensor], None]
Nudge = Callable[[Tensor, int], Tensor]
Generators = Sequence[torch.Generator]
ALL = slice(None)


def ignore(t: int, x: Tensor) -> None:
    """Do nothing: the default callback."""


def unchanged(x: Tensor, t: int) -> Tensor:
    """Return x: the default nudge."""
    return x


def ddpm(
    denoise: Denoise, x: Tensor, schedule: Schedule, generators: Generators, callback: Callback = ignore
) -> Tensor:
    """Sample over all T steps with the posterior variance (Ho et al. 2020, eq. 6, 7), x0 clamped to [-1, 1]."""
    for t in reversed(range(len(schedule))):
        alpha_bar, alpha_bar_prev = schedule.alpha_bar_at(t), schedule.alpha_bar_at(t - 1)
        beta = 1 - alpha_bar / alpha_bar_prev
        x0, _ = schedule.x0_and_eps(denoise(x, t), x, t)
        x0 = x0.clamp(-1, 1)
        mean_x0 = math.sqrt(alpha_bar_prev) * beta * x0
        mean_x = math.sqrt(alpha_bar / alpha_bar_prev) * (1 - alpha_bar_prev) * x
        x = (mean_x0 + mean_x) / (1 - alpha_bar)
        if t:
            variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
            x = x + math.sqrt(variance) * draw(generators, x.shape[1:], x.device)
        callback(t, x)
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    steps: Steps,
    generators: Generators = (),
    eta: float = 0.0,
    callback: Callback = ignore,
    nudge: Nudge = unchanged,
) -> Tensor:
    """Sample at the timesteps of `steps` (Song et al. 2021, eq. 12): eta 0 is deterministic, eta 1 as random as DDPM.

    If `steps.clamp`, the predicted x0 is clamped to [-1, 1]; eps is not recomputed from it.
    """
    for t, t_prev in steps.pairs:
        alpha_bar, alpha_bar_prev = schedule.alpha_bar_at(t), schedule.alpha_bar_at(t_prev)
        x = nudge(x, t)
        x0, eps = schedule.x0_and_eps(denoise(x, t), x, t)
        x0 = x0.clamp(-1, 1) if steps.clamp else x0
        sigma = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar))
        sigma *= math.sqrt(max(0.0, 1 - alpha_bar / alpha_bar_prev))
        x = math.sqrt(alpha_bar_prev) * x0 + math.sqrt(max(0.0, 1 - alpha_bar_prev - sigma**2)) * eps
        if sigma:
            x = x + sigma * draw(generators, x.shape[1:], x.device)
        callback(max(t_prev, 0), x)
    return x


def bdia(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    steps: Steps,
    x_next: Tensor | None = None,
    callback: Callback = ignore,
) -> tuple[Tensor, Tensor]:
    """Sample by `bdia_step` at the timesteps of `steps`; return (last, previous), the states at the last two timesteps.

    x and x_next are the states at the first two timesteps. x_next None = computed from x by one DDIM step.
    This is reversible: bdia(denoise, last, schedule, steps.backwards(), previous) returns (x, x_next) up to rounding.
    """
    times = [steps.pairs[0][0], *(t for _, t in steps.pairs)]
    if x_next is None:
        x_next = ddim(denoise, x, schedule, Steps(steps.pairs[:1], clamp=False))
    callback(times[1], x_next)
    for around in zip(times, times[1:], times[2:], strict=False):
        x, x_next = x_next, bdia_step(x, x_next, denoise(x_next, around[1]), schedule, around)
        callback(around[2], x_next)
    return x_next, x


def bdia_step(x_prev: Tensor, x: Tensor, output: Tensor, schedule: Schedule, times: tuple[int, int, int]) -> Tensor:
    """Return x_next = x_prev - DDIM(x, t_prev) + DDIM(x, t_next), where `times` = (t_prev, t, t_next).

    x_prev, x and x_next are the states at these timesteps. `output` is the network's for x at t.
    DDIM(x, s) is the DDIM step from t to s. This is BDIA with gamma 1 (Zhang et al. 2023, arXiv 2307.10829).
    To invert the step, pass x_next as x_prev and `times` reversed.
    """
    alpha_bar_prev, _, alpha_bar_next = map(schedule.alpha_bar_at, times)
    x0, eps = schedule.x0_and_eps(output, x, times[1])
    signal = math.sqrt(alpha_bar_next) - math.sqrt(alpha_bar_prev)
    noise = math.sqrt(1 - alpha_bar_next) - math.sqrt(1 - alpha_bar_prev)
    return x_prev + (signal * x0 + noise * eps)


def ddim_invert(denoise: Denoise, x: Tensor, schedule: Schedule, steps: Steps) -> dict[int, Tensor]:
    """Invert `ddim` at eta 0: return {t: x_t}, the states from the clean image x up to noise, for every t of `steps`.

    A step to t computes eps from the state before it, as if that were x_t already.
    So the inversion is exact only in the limit of many steps (Dhariwal & Nichol 2021, appendix F).
    """
    states: dict[int, Tensor] = {}
    alpha_bar_prev = 1.0
    for t, _ in reversed(steps.pairs):
        alpha_bar = schedule.alpha_bar_at(t)
        _, eps = schedule.x0_and_eps(denoise(x, t), x, t)
        x0 = (x - math.sqrt(1 - alpha_bar_prev) * eps) / math.sqrt(alpha_bar_prev)
        x = states[t] = math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps
        alpha_bar_prev = alpha_bar
    return states


def dpm_solver(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    callback: Callback = ignore,
    clamp: bool = True,
    nudge: Nudge = unchanged,
    span: slice = ALL,
    generators: Generators = (),
) -> Tensor:
    """Sample by DPM-Solver++ (2M) in `steps` steps (Lu et al. 2022), at diffusers' trailing timesteps.

    Without generators it is deterministic. With generators it solves the reverse SDE (section 3.4 of the paper).
    Then each step adds noise, so later steps can mend errors of earlier ones.
    `clamp` clamps the result to [-1, 1]; off for latents. `span` selects the steps to run; x is the state before them.
    The first step run is of first order. Raise ValueError unless 1 <= steps <= T.
    """
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
        algorithm_type="sde-dpmsolver++" if generators else "dpmsolver++",
    )
    solver.set_timesteps(steps)
    timesteps = solver.timesteps.tolist()  # on the CPU: no device sync
    for t, t_prev in list(zip(timesteps, [*timesteps[1:], 0], strict=True))[span]:
        x = nudge(x, t)
        noise = draw(generators, x.shape[1:], x.device) if generators else None
        x = solver.step(denoise(x, t), t, x, variance_noise=noise, return_dict=False)[0]
        callback(t_prev, x)
    return x.clamp(-1, 1) if clamp else x
