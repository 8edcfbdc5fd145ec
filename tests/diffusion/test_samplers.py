"""Samplers, against diffusers, against loops written from the rules' description, and with a denoiser that predicts the clean images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from gaussian import SHAPE, gaussian
from torch import Tensor

from diffusion.noise import draw, generators
from diffusion.samplers import bdia, bdia_step, ddim, ddim_invert, ddpm, dpm_solver
from diffusion.schedule import Prediction, Schedule, cosine, linear, make_schedule, target
from diffusion.step_rules import Rule, Steps, step_rule

CPU = torch.device("cpu")
PREDICTIONS: dict[Prediction, str] = {"eps": "epsilon", "v": "v_prediction"}  # our name: diffusers' name


def smooth(x: Tensor, t: int) -> Tensor:
    """Return a smooth function of x and t that amplifies nothing: a stand-in for a network."""
    return 0.6 * x.tanh() + 0.2 * math.sin(t)


def clean_images() -> Tensor:
    """Return x0 inside [-1, 1], so that no clamp changes it."""
    return gaussian(5).clamp(-0.9, 0.9)


def oracle(x0: Tensor, schedule: Schedule) -> Callable[[Tensor, int], Tensor]:
    """Return a denoiser that always predicts x0."""

    def denoise(x: Tensor, t: int) -> Tensor:
        alpha_bar = torch.tensor(schedule.alpha_bar_at(t), dtype=torch.float64)
        eps = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        return target(x0, eps, alpha_bar, schedule.prediction)

    return denoise


# ---------------------------------------------------------------- samplers against references


DIFFUSERS_OPTIONS: dict[Rule, dict[str, Any]] = {  # with these, diffusers follows each rule
    "homework": {"steps_offset": 1, "set_alpha_to_one": False},
    "diffusers": {},
    "ddim": {"clip_sample": False},
    "trailing": {"timestep_spacing": "trailing"},
}


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("rule", DIFFUSERS_OPTIONS)
def test_each_ddim_update_equals_diffusers(rule: Rule, prediction: Prediction, eta: float) -> None:
    schedule = linear(1000, prediction=prediction)
    reference: Any = DDIMScheduler(1000, 1e-4, 0.02, prediction_type=PREDICTIONS[prediction], **DIFFUSERS_OPTIONS[rule])
    reference.set_timesteps(10)
    steps = step_rule(rule, 1000, 10)
    assert [t for t, _ in steps.pairs] == reference.timesteps.tolist()
    for (t, previous), seeds in zip(steps.pairs, [(k, k + 100) for k in range(10)], strict=True):
        x, output = gaussian(t).float(), gaussian(t + 1).float()
        noise = draw(generators(seeds), SHAPE[1:], CPU)
        expected = reference.step(output, t, x, eta, variance_noise=noise).prev_sample
        one = Steps(((t, previous),), steps.clamp)
        images = ddim(lambda *_, output=output: output, x, schedule, one, generators(seeds), eta)
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)


# per rule: the timesteps of 50 steps, the step of alpha_bar at the end (None: alpha_bar = 1), clamp
DESCRIBED: dict[Rule, tuple[range, int | None, bool]] = {
    "homework": (range(981, 0, -20), 0, True),
    "ddim": (range(980, -1, -20), None, False),
    "diffusers": (range(980, -1, -20), None, True),
    "trailing": (range(999, 18, -20), None, True),
}


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rule", DESCRIBED)
def test_each_rule_equals_a_loop_written_from_its_description(rule: Rule, eta: float) -> None:
    times, end, clamp = DESCRIBED[rule]
    alpha_bars = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64).neg().add(1).cumprod(0).float().double()
    streams, start = generators([1, 2]), gaussian(3)
    x = start
    for t, after in zip(times, [*times[1:], end], strict=True):
        alpha_bar = alpha_bars[t]
        alpha_bar_prev = alpha_bars.new_ones(()) if after is None else alpha_bars[after]
        eps = smooth(x, t)
        x0 = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        x0 = x0.clamp(-1, 1) if clamp else x0
        sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()
        x = alpha_bar_prev.sqrt() * x0 + (1 - alpha_bar_prev - sigma**2).sqrt() * eps
        if sigma:
            x = x + sigma * draw(streams, SHAPE[1:], CPU)
    images = ddim(smooth, start, linear(1000), step_rule(rule, 1000, 50), generators([1, 2]), eta)
    torch.testing.assert_close(images, x, rtol=1e-9, atol=1e-9)


def test_ddim_without_eta_draws_no_noise() -> None:
    streams = generators([1, 2])
    ddim(smooth, gaussian(3), linear(100), step_rule("trailing", 100, 5), streams)
    assert torch.equal(draw(streams, (4,), CPU), draw(generators([1, 2]), (4,), CPU))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_equals_diffusers(prediction: Prediction) -> None:
    schedule = linear(60, prediction=prediction)
    reference: Any = DDPMScheduler(
        60, 1e-4, 0.02, variance_type="fixed_small", clip_sample=True, prediction_type=PREDICTIONS[prediction]
    )
    streams, start = generators([1, 2]), gaussian(3).float()
    x = start
    for t in reversed(range(60)):
        x = reference.step(smooth(x, t), t, x, generator=streams).prev_sample
    images = ddpm(smooth, start, schedule, generators([1, 2]))
    torch.testing.assert_close(images, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("streams", [None, [1, 2]])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver_equals_diffusers_driven_by_hand(prediction: Prediction, streams: list[int] | None) -> None:
    """With streams of noise the stochastic form, without them the deterministic one."""
    reference: Any = DPMSolverMultistepScheduler(
        1000,
        1e-4,
        0.02,
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        algorithm_type="sde-dpmsolver++" if streams else "dpmsolver++",
    )
    reference.set_timesteps(8)
    x = start = gaussian(3).float()
    theirs = generators(streams or [])
    for t in reference.timesteps:
        x = reference.step(smooth(x, int(t)), t, x, generator=theirs or None).prev_sample
    images = dpm_solver(smooth, start, linear(1000, prediction=prediction), 8, generators=generators(streams or []))
    torch.testing.assert_close(images, x.clamp(-1, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [0, 21])
def test_dpm_solver_refuses_steps_that_do_not_fit(steps: int) -> None:
    with pytest.raises(ValueError, match=f"{steps} steps"):
        dpm_solver(smooth, gaussian(3), cosine(20), steps)


def test_dpm_solver_returns_images_within_the_range() -> None:
    images = dpm_solver(oracle(3 * gaussian(5), linear(1000)), gaussian(3), linear(1000), 4)
    assert float(images.abs().max()) == 1.0


# ---------------------------------------------------------------- samplers with a denoiser that predicts the clean images


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("rule", ["ddim", "diffusers", "trailing"])
def test_ddim_recovers_the_images_that_the_denoiser_predicts(
    rule: Rule, eta: float, prediction: Prediction, name: str
) -> None:
    schedule, x0 = make_schedule(name, 100, prediction), clean_images()
    images = ddim(oracle(x0, schedule), gaussian(3), schedule, step_rule(rule, 100, 7), generators([1, 2]), eta)
    torch.testing.assert_close(images, x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_recovers_the_images_that_the_denoiser_predicts(prediction: Prediction, name: str) -> None:
    schedule, x0 = make_schedule(name, 200, prediction), clean_images()
    images = ddpm(oracle(x0, schedule), gaussian(3), schedule, generators([1, 2]))
    torch.testing.assert_close(images, x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver_recovers_the_images_that_the_denoiser_predicts(prediction: Prediction, name: str) -> None:
    schedule, x0 = make_schedule(name, 100, prediction), clean_images()
    images = dpm_solver(oracle(x0, schedule), gaussian(3), schedule, 7)
    torch.testing.assert_close(images, x0, rtol=0, atol=1e-4)  # diffusers works in float32


def test_homework_rule_ends_at_the_first_noise_level() -> None:
    schedule, x0, start = linear(1000), clean_images(), gaussian(3)
    images = ddim(oracle(x0, schedule), start, schedule, step_rule("homework", 1000, 50))
    alpha_bar, first = schedule.alpha_bar_at(0), schedule.alpha_bar_at(981)
    eps = (start - math.sqrt(first) * x0) / math.sqrt(1 - first)  # eta 0 keeps it along the path
    torch.testing.assert_close(images, math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps, rtol=0, atol=1e-9)


def test_ddim_passes_the_state_on_arrival_at_every_step_to_its_callback() -> None:
    schedule, x0 = linear(100), clean_images()
    states: dict[int, Tensor] = {}
    images = ddim(
        oracle(x0, schedule),
        gaussian(3),
        schedule,
        step_rule("ddim", 100, 5),
        callback=lambda t, x: states.update({t: x}),
    )
    assert list(states) == [60, 40, 20, 0]
    assert torch.equal(states[0], images)


def test_ddpm_calls_its_callback_at_every_step_down_to_0() -> None:
    arrivals: list[int] = []
    ddpm(smooth, gaussian(3), linear(10), generators([1, 2]), callback=lambda t, _: arrivals.append(t))
    assert arrivals == list(reversed(range(10)))


def test_dpm_solver_passes_the_state_on_arrival_at_every_step_to_its_callback() -> None:
    states: dict[int, Tensor] = {}
    images = dpm_solver(smooth, gaussian(3).float(), linear(100), 4, lambda t, x: states.update({t: x}), clamp=False)
    assert list(states) == [74, 49, 24, 0]
    assert torch.equal(states[0], images)


def test_inverted_steps_are_those_of_ddim_backwards() -> None:
    """With one eps for all steps, which needs no step to be exact."""
    schedule, steps, eps, x0 = linear(100), step_rule("ddim", 100, 5), gaussian(1), gaussian(2)
    called: list[int] = []

    def denoise(x: Tensor, t: int) -> Tensor:
        called.append(t)
        return eps

    states = ddim_invert(denoise, x0, schedule, steps)
    assert called == list(states) == [0, 20, 40, 60, 80]
    for t, x in states.items():
        alpha_bar = schedule.alpha_bar_at(t)
        torch.testing.assert_close(x, math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps)
    torch.testing.assert_close(ddim(denoise, states[80], schedule, steps), x0)


# ---------------------------------------------------------------- from images to noise


def move(x: Tensor, output: Tensor, schedule: Schedule, t: int, target_t: int) -> Tensor:
    """Return x moved from t to another timestep along the straight line of DDIM."""
    now, then = (torch.tensor(schedule.alpha_bar_at(k), dtype=torch.float64) for k in (t, target_t))
    if schedule.prediction == "v":
        x0, eps = now.sqrt() * x - (1 - now).sqrt() * output, (1 - now).sqrt() * x + now.sqrt() * output
    else:
        x0, eps = (x - (1 - now).sqrt() * output) / now.sqrt(), output
    return then.sqrt() * x0 + (1 - then).sqrt() * eps


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("rule", ["homework", "ddim"])
def test_ddim_backwards_equals_a_loop_from_the_image_at_timestep_0(rule: Rule, prediction: Prediction) -> None:
    schedule, x = linear(1000, prediction=prediction), clean_images()
    times = range(1, 982, 20) if rule == "homework" else range(20, 981, 20)
    expected, before = x, 0
    for t in times:
        expected, before = move(expected, smooth(expected, before), schedule, before, t), t
    found = ddim(smooth, x, schedule, step_rule(rule, 1000, 50).backwards())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("backwards", [False, True])
def test_bdia_equals_a_loop_written_from_its_description(backwards: bool, prediction: Prediction) -> None:
    """x_{i-1} = x_{i+1} - (DDIM(x_i to i+1) - x_i) + (DDIM(x_i to i-1) - x_i), gamma 1; the first step is DDIM's."""
    schedule, start = linear(1000, prediction=prediction), gaussian(3)
    times = [*range(981, 0, -20), 0]
    times = times[::-1] if backwards else times
    states = [start, move(start, smooth(start, times[0]), schedule, times[0], times[1])]
    for before, t, after in zip(times, times[1:], times[2:], strict=False):
        x, output = states[-1], smooth(states[-1], t)
        backward = move(x, output, schedule, t, before) - x
        forward = move(x, output, schedule, t, after) - x
        states.append(states[-2] - backward + forward)
    steps = step_rule("bdia", 1000, 50)
    arrivals: dict[int, Tensor] = {}
    last, before_last = bdia(
        smooth,
        start,
        schedule,
        steps.backwards() if backwards else steps,
        callback=lambda t, x: arrivals.update({t: x}),
    )
    for x, expected in ((last, states[-1]), (before_last, states[-2])):
        assert float((x - expected).abs().max() / expected.abs().max()) < 1e-9
    assert list(arrivals) == times[1:]
    assert torch.equal(arrivals[times[-1]], last)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
@pytest.mark.parametrize("times", [(981, 961, 941), (501, 481, 461), (21, 1, 0)])
def test_a_bdia_step_is_undone_by_the_step_with_both_ends_exchanged(
    times: tuple[int, int, int], dtype: torch.dtype, bound: float, prediction: Prediction
) -> None:
    schedule = linear(1000, prediction=prediction)
    x_prev, x, output = (gaussian(seed).to(dtype) for seed in (1, 2, 3))
    x_next = bdia_step(x_prev, x, output, schedule, times)
    found = bdia_step(x_next, x, output, schedule, (times[2], times[1], times[0]))
    assert float((x_next - x_prev).abs().max()) > 1e-3
    assert float((found - x_prev).abs().max()) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_images_come_back_from_their_two_states_with_one_call_of_the_network_per_step(
    dtype: torch.dtype, bound: float
) -> None:
    schedule, steps, x0 = linear(1000), step_rule("bdia", 1000, 50), clean_images().to(dtype)
    called: list[int] = []

    def denoise(x: Tensor, t: int) -> Tensor:
        called.append(t)
        return 0.5 * x + 0.1 * x.tanh() * math.cos(t)

    x_T, x_next = bdia(denoise, x0, schedule, steps.backwards())
    assert called == [0, *range(1, 962, 20)]
    called.clear()
    found, before = bdia(denoise, x_T, schedule, steps, x_next)
    assert called == [*range(961, 0, -20)]
    assert float((found - x0).abs().max()) < bound
    assert float((before - x0).abs().max()) > bound
