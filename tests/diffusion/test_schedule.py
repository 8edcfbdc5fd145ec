"""Noise schedules: alpha_bar as in the papers and the homework, and the ways between x0, eps and the network's output."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import gaussian

from diffusion.samplers import ddim
from diffusion.schedule import Prediction, Schedule, add_noise, cosine, linear, make_schedule, target
from diffusion.step_rules import Steps

CPU = torch.device("cpu")
HOMEWORK_ALPHA_BARS = {
    0: 0.9999,
    1: 0.9997800921,
    21: 0.9932203573,
    101: 0.8932511307,
    501: 0.0770124774,
    961: 0.0000857310,
    981: 0.0000578779,
    999: 0.0000403583,
}


@pytest.mark.parametrize(("t", "expected"), HOMEWORK_ALPHA_BARS.items())
def test_linear_schedule_has_the_homeworks_cumulative_products(t: int, expected: float) -> None:
    assert float(linear(1000).alpha_bar[t]) == pytest.approx(expected, abs=6e-11)  # listed with ten decimals


@pytest.mark.parametrize("schedule", [linear(1000), cosine(1000)], ids=["linear", "cosine"])
def test_schedules_are_float64_on_the_cpu(schedule: Schedule) -> None:
    assert (schedule.alpha_bar.dtype, schedule.alpha_bar.device) == (torch.float64, CPU)


def test_the_betas_of_the_linear_schedule_are_a_line() -> None:
    expected = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(linear(1000).betas, expected, rtol=1e-9, atol=1e-14)


def test_cosine_schedule_follows_nichol_and_dhariwal() -> None:
    total, offset = 100, 0.008

    def f(step: int) -> float:
        return math.cos((step / total + offset) / (1 + offset) * math.pi / 2) ** 2

    expected = [f(t + 1) / f(0) for t in range(total - 1)]  # the last beta is clipped
    assert cosine(total).alpha_bar[:-1].tolist() == pytest.approx(expected, rel=1e-9)


def test_cosine_schedule_clips_its_last_beta_at_0_999() -> None:
    assert float(cosine(100).betas[-1]) == pytest.approx(0.999, rel=1e-9)


@pytest.mark.parametrize("steps", [20, 1000])
def test_cosine_schedule_falls_strictly_and_stays_positive(steps: int) -> None:
    alpha_bar = cosine(steps).alpha_bar
    assert bool((alpha_bar.diff() < 0).all())
    assert float(alpha_bar[-1]) > 0


def test_alpha_bar_of_a_step_is_rounded_to_float32() -> None:
    schedule = linear(1000)
    assert schedule.alpha_bar_at(0) == float(torch.tensor(0.9999, dtype=torch.float32)) != 0.9999


def test_alpha_bar_before_the_first_step_is_one() -> None:
    assert linear(1000).alpha_bar_at(-1) == 1.0


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_make_schedule_finds_schedules_by_name(name: str) -> None:
    schedule = make_schedule(name, 30, "v")
    expected = linear(30) if name == "linear" else cosine(30)
    assert torch.equal(schedule.alpha_bar, expected.alpha_bar)
    assert schedule.prediction == "v"


def test_make_schedule_refuses_another_name() -> None:
    with pytest.raises(KeyError, match="sigmoid"):
        make_schedule("sigmoid", 30, "v")


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("t", [0, 10, 500, 999])
def test_x0_and_eps_inverts_add_noise_and_target(prediction: Prediction, t: int) -> None:
    schedule = make_schedule("linear", 1000, prediction)
    x0, eps = gaussian(1), gaussian(2)
    alpha_bar = torch.full((2, 1, 1, 1), schedule.alpha_bar_at(t), dtype=torch.float64)
    x, output = add_noise(x0, eps, alpha_bar), target(x0, eps, alpha_bar, prediction)
    torch.testing.assert_close(schedule.x0_and_eps(output, x, t), (x0, eps), rtol=1e-9, atol=1e-9)


def test_add_noise_takes_one_alpha_bar_per_image() -> None:
    alpha_bar = torch.tensor([1.0, 0.0], dtype=torch.float64).view(2, 1, 1, 1)
    x0, eps = gaussian(1), gaussian(2)
    assert torch.equal(add_noise(x0, eps, alpha_bar), torch.stack([x0[0], eps[1]]))


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("t", "t_prev"), [(49, 40), (20, 3), (9, -1)])
def test_a_ddim_step_with_step_output_leads_to_the_given_state(prediction: Prediction, t: int, t_prev: int) -> None:
    stream, schedule = torch.Generator().manual_seed(0), linear(50, prediction=prediction)
    x, x_prev = torch.randn(2, 4, 3, 8, 8, generator=stream, dtype=torch.float64)
    output = schedule.step_output(x, t, x_prev, t_prev)
    end = ddim(lambda x, t: output, x, schedule, Steps(((t, t_prev),), clamp=False))
    torch.testing.assert_close(end, x_prev, rtol=0, atol=1e-9)
