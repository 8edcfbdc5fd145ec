"""What diffusion/ promises: schedules, step rules, samplers, guidance and noise, checked against formulas and diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from diffusion.guidance import Guidance, guided, rescaled
from diffusion.loss import min_snr_weight
from diffusion.noise import draw, generators, slerp
from diffusion.noise import linear as linear_way
from diffusion.samplers import ddim, ddpm, dpm_solver
from diffusion.schedule import Schedule, add_noise, cosine, linear, make_schedule, target
from diffusion.steps import Rule, Steps, step_rule

CPU = torch.device("cpu")
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}  # our name: diffusers' name
SHAPE = (2, 3, 4, 4)
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


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures() -> Tensor:
    """x0 that stays inside [-1, 1], so that no clamp touches it."""
    return random(5).clamp(-0.9, 0.9)


def smooth(x: Tensor, t: int) -> Tensor:
    """A tame stand-in for a network: depends on x and t, and amplifies nothing."""
    return 0.6 * x.tanh() + 0.2 * math.sin(t)


def knows(x0: Tensor, schedule: Schedule) -> Callable[[Tensor, int], Tensor]:
    """The denoiser that knows the clean picture."""

    def denoise(x: Tensor, t: int) -> Tensor:
        alpha = torch.tensor(schedule.alpha_bar_at(t), dtype=torch.float64)
        eps = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        return target(x0, eps, alpha, schedule.prediction)

    return denoise


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize(("t", "expected"), HOMEWORK_ALPHA_BARS.items())
def test_linear_schedule_has_the_homeworks_cumulative_products(t: int, expected: float) -> None:
    assert float(linear(1000).alpha_bar[t]) == pytest.approx(expected, abs=6e-11)  # listed with ten decimals


@pytest.mark.parametrize("schedule", [linear(1000), cosine(1000)], ids=["linear", "cosine"])
def test_schedules_are_float64_on_the_cpu(schedule: Schedule) -> None:
    assert (schedule.alpha_bar.dtype, schedule.alpha_bar.device) == (torch.float64, CPU)


def test_linear_schedules_betas_are_the_line_it_was_made_from() -> None:
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


def test_alpha_of_a_step_is_rounded_to_float32() -> None:
    schedule = linear(1000)
    assert schedule.alpha_bar_at(0) == float(torch.tensor(0.9999, dtype=torch.float32)) != 0.9999


def test_alpha_before_the_first_step_is_one() -> None:
    assert linear(1000).alpha_bar_at(-1) == 1.0


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_make_schedule_finds_schedules_by_name(name: str) -> None:
    schedule = make_schedule(name, 30, "v")
    assert torch.equal(schedule.alpha_bar, {"linear": linear, "cosine": cosine}[name](30).alpha_bar)
    assert schedule.prediction == "v"


def test_make_schedule_refuses_another_name() -> None:
    with pytest.raises(KeyError, match="sigmoid"):
        make_schedule("sigmoid", 30, "v")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [0, 10, 500, 999])
def test_x0_and_eps_inverts_add_noise_and_target(prediction: str, t: int) -> None:
    schedule = make_schedule("linear", 1000, prediction)
    x0, eps = random(1), random(2)
    alpha = torch.full((2, 1, 1, 1), schedule.alpha_bar_at(t), dtype=torch.float64)
    x, output = add_noise(x0, eps, alpha), target(x0, eps, alpha, prediction)
    found = schedule.x0_and_eps(output, x, t)
    torch.testing.assert_close(found, (x0, eps), rtol=1e-9, atol=1e-9)


def test_add_noise_uses_every_pictures_own_alpha_bar() -> None:
    alpha = torch.tensor([1.0, 0.0], dtype=torch.float64).view(2, 1, 1, 1)
    x0, eps = random(1), random(2)
    assert torch.equal(add_noise(x0, eps, alpha), torch.stack([x0[0], eps[1]]))


@pytest.mark.parametrize(
    ("prediction", "snr", "weight"),
    [("eps", 10.0, 5 / 10), ("eps", 2.0, 1.0), ("v", 10.0, 5 / 11), ("v", 2.0, 2 / 3)],
)
def test_min_snr_weight_with_gamma_5(prediction: str, snr: float, weight: float) -> None:
    alpha = torch.tensor([snr / (1 + snr)], dtype=torch.float64)
    assert float(min_snr_weight(alpha, 5.0, prediction)) == pytest.approx(weight, rel=1e-9)


# ---------------------------------------------------------------- step rules


def test_homework_rule_goes_from_981_to_1_and_ends_at_0() -> None:
    pairs = step_rule("homework", 1000, 50).pairs
    assert pairs == tuple((t, t - 20 if t > 1 else 0) for t in range(981, 0, -20))


@pytest.mark.parametrize("rule", ["ddim", "diffusers"])
def test_ddim_rule_goes_from_980_to_0_and_ends_clean(rule: Rule) -> None:
    pairs = step_rule(rule, 1000, 50).pairs
    assert pairs == tuple((t, t - 20 if t else -1) for t in range(980, -1, -20))


@pytest.mark.parametrize("steps", [1, 3, 7, 12, 20, 50, 333, 1000])
@pytest.mark.parametrize(("rule", "spacing"), [("trailing", "trailing"), ("diffusers", "leading")])
def test_grid_equals_diffusers(rule: Rule, spacing: str, steps: int) -> None:
    reference = DDIMScheduler(1000, timestep_spacing=spacing)
    reference.set_timesteps(steps)
    assert [t for t, _ in step_rule(rule, 1000, steps).pairs] == reference.timesteps.tolist()


def test_trailing_rule_starts_at_the_last_step_and_ends_clean() -> None:
    pairs = step_rule("trailing", 1000, 50).pairs
    assert (pairs[0], pairs[-1]) == ((999, 979), (19, -1))


@pytest.mark.parametrize(
    ("rule", "clamped"), [("homework", True), ("diffusers", True), ("trailing", True), ("ddim", False)]
)
def test_every_rule_but_plain_ddim_clamps_x0(rule: Rule, clamped: bool) -> None:
    assert step_rule(rule, 1000, 50).clamp is clamped


@pytest.mark.parametrize("rule", ["homework", "ddim", "diffusers", "trailing"])
@pytest.mark.parametrize("steps", [-1, 0, 101])
def test_steps_that_do_not_fit_are_refused(rule: Rule, steps: int) -> None:
    with pytest.raises(ValueError, match=f"{steps} steps"):
        step_rule(rule, 100, steps)


def test_homework_rule_cannot_visit_all_steps_because_it_starts_one_later() -> None:
    with pytest.raises(ValueError, match="would start at 1000, the last is 999"):
        step_rule("homework", 1000, 1000)


# ---------------------------------------------------------------- samplers against references


LIKE_DIFFUSERS = {  # the options with which that library follows each rule
    "homework": {"steps_offset": 1, "set_alpha_to_one": False},
    "diffusers": {},
    "ddim": {"clip_sample": False},
    "trailing": {"timestep_spacing": "trailing"},
}


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("rule", LIKE_DIFFUSERS)
def test_each_ddim_update_equals_diffusers(rule: Rule, prediction: str, eta: float) -> None:
    schedule = linear(1000, prediction=prediction)
    reference = DDIMScheduler(1000, 1e-4, 0.02, prediction_type=PREDICTIONS[prediction], **LIKE_DIFFUSERS[rule])
    reference.set_timesteps(10)
    steps = step_rule(rule, 1000, 10)
    assert [t for t, _ in steps.pairs] == reference.timesteps.tolist()
    for (t, previous), seeds in zip(steps.pairs, [(k, k + 100) for k in range(10)], strict=True):
        x, output = random(t).float(), random(t + 1).float()
        noise = draw(generators(seeds), SHAPE[1:], CPU)
        expected = reference.step(output, t, x, eta, variance_noise=noise).prev_sample
        one = Steps(((t, previous),), steps.clamp)
        found = ddim(lambda *_, output=output: output, x, schedule, one, generators(seeds), eta)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


DESCRIBED = {  # timesteps of 50 steps, abar at the end (None: 1), clamp
    "homework": (range(981, 0, -20), 0, True),
    "ddim": (range(980, -1, -20), None, False),
    "diffusers": (range(980, -1, -20), None, True),
    "trailing": (range(999, 18, -20), None, True),
}


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rule", DESCRIBED)
def test_each_rule_equals_a_loop_written_from_its_description(rule: Rule, eta: float) -> None:
    times, end, clamp = DESCRIBED[rule]
    abar = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64).neg().add(1).cumprod(0).float().double()
    streams, start = generators([1, 2]), random(3)
    x = start
    for t, after in zip(times, [*times[1:], end], strict=True):
        now, before = abar[t], abar.new_ones(()) if after is None else abar[after]
        eps = smooth(x, t)
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x0 = x0.clamp(-1, 1) if clamp else x0
        sigma = eta * ((1 - before) / (1 - now)).sqrt() * (1 - now / before).sqrt()
        x = before.sqrt() * x0 + (1 - before - sigma**2).sqrt() * eps
        if sigma:
            x = x + sigma * draw(streams, SHAPE[1:], CPU)
    found = ddim(smooth, start, linear(1000), step_rule(rule, 1000, 50), generators([1, 2]), eta)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_ddim_without_eta_draws_no_noise() -> None:
    streams = generators([1, 2])
    ddim(smooth, random(3), linear(100), step_rule("trailing", 100, 5), streams)
    assert torch.equal(draw(streams, (4,), CPU), draw(generators([1, 2]), (4,), CPU))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_equals_diffusers(prediction: str) -> None:
    schedule = linear(60, prediction=prediction)
    reference = DDPMScheduler(
        60, 1e-4, 0.02, variance_type="fixed_small", clip_sample=True, prediction_type=PREDICTIONS[prediction]
    )
    streams, start = generators([1, 2]), random(3).float()
    x = start
    for t in reversed(range(60)):
        x = reference.step(smooth(x, t), t, x, generator=streams).prev_sample
    found = ddpm(smooth, start, schedule, generators([1, 2]))
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver_equals_diffusers_driven_by_hand(prediction: str) -> None:
    reference = DPMSolverMultistepScheduler(
        1000,
        1e-4,
        0.02,
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    reference.set_timesteps(8)
    x = start = random(3).float()
    for t in reference.timesteps:
        x = reference.step(smooth(x, int(t)), t, x).prev_sample
    found = dpm_solver(smooth, start, linear(1000, prediction=prediction), 8)
    torch.testing.assert_close(found, x.clamp(-1, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [0, 21])
def test_dpm_solver_refuses_steps_that_do_not_fit(steps: int) -> None:
    with pytest.raises(ValueError, match=f"{steps} steps"):
        dpm_solver(smooth, random(3), cosine(20), steps)


def test_dpm_solver_returns_pictures_within_the_range() -> None:
    found = dpm_solver(knows(3 * random(5), linear(1000)), random(3), linear(1000), 4)
    assert float(found.abs().max()) == 1.0


# ---------------------------------------------------------------- samplers with the truth


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("rule", ["ddim", "diffusers", "trailing"])
def test_ddim_recovers_a_known_picture(rule: Rule, eta: float, prediction: str, name: str) -> None:
    schedule, x0 = make_schedule(name, 100, prediction), pictures()
    found = ddim(knows(x0, schedule), random(3), schedule, step_rule(rule, 100, 7), generators([1, 2]), eta)
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_recovers_a_known_picture(prediction: str, name: str) -> None:
    schedule, x0 = make_schedule(name, 200, prediction), pictures()
    found = ddpm(knows(x0, schedule), random(3), schedule, generators([1, 2]))
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver_recovers_a_known_picture(prediction: str, name: str) -> None:
    schedule, x0 = make_schedule(name, 100, prediction), pictures()
    found = dpm_solver(knows(x0, schedule), random(3), schedule, 7)
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-4)  # diffusers works in float32


def test_homework_rule_leaves_a_known_picture_at_the_first_noise_level() -> None:
    schedule, x0, start = linear(1000), pictures(), random(3)
    found = ddim(knows(x0, schedule), start, schedule, step_rule("homework", 1000, 50))
    alpha, first = schedule.alpha_bar_at(0), schedule.alpha_bar_at(981)
    eps = (start - math.sqrt(first) * x0) / math.sqrt(1 - first)  # eta 0 keeps it along the path
    torch.testing.assert_close(found, math.sqrt(alpha) * x0 + math.sqrt(1 - alpha) * eps, rtol=0, atol=1e-9)


def test_ddim_watcher_sees_the_state_on_arrival_at_every_step() -> None:
    schedule, x0, seen = linear(100), pictures(), {}
    found = ddim(
        knows(x0, schedule), random(3), schedule, step_rule("ddim", 100, 5), callback=lambda t, x: seen.update({t: x})
    )
    assert list(seen) == [60, 40, 20, 0]
    assert torch.equal(seen[0], found)


def test_ddpm_watcher_sees_every_step_down_to_0() -> None:
    seen: list[int] = []
    ddpm(smooth, random(3), linear(10), generators([1, 2]), callback=lambda t, _: seen.append(t))
    assert seen == list(reversed(range(10)))


# ---------------------------------------------------------------- guidance


class Recorder:
    """A network whose output is the condition's number everywhere, and that remembers the batches it was called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, _: int, condition: Tensor) -> Tensor:
        self.batches.append(len(x))
        return condition.view(-1, 1, 1, 1) + 0.1 * x


def guide(guidance: Guidance, t: int = 500) -> tuple[Tensor, list[int], Tensor]:
    """The guided output at step t of 1000, the batches of the network, and x; cond is 2 and 3, uncond 0 and 0."""
    network, x, condition = Recorder(), random(1), torch.tensor([2.0, 3.0], dtype=torch.float64)
    both = torch.cat([condition, torch.zeros(2, dtype=torch.float64)])
    return guided(network, condition, both, guidance, 1000)(x, t), network.batches, x


@pytest.mark.parametrize("scale", [0.0, 2.5, 7.5])
def test_guidance_is_uncond_plus_scale_times_the_difference(scale: float) -> None:
    found, _, x = guide(Guidance(scale))
    expected = 0.1 * x + scale * torch.tensor([2.0, 3.0], dtype=torch.float64).view(2, 1, 1, 1)
    torch.testing.assert_close(found, expected)


def test_guidance_asks_for_both_halves_in_one_call_of_twice_the_batch() -> None:
    assert guide(Guidance(2.5))[1] == [4]


def test_guidance_scale_1_costs_one_call_of_the_batch() -> None:
    found, batches, x = guide(Guidance(1.0))
    assert batches == [2]
    assert torch.equal(found, 0.1 * x + torch.tensor([2.0, 3.0], dtype=torch.float64).view(2, 1, 1, 1))


@pytest.mark.parametrize(("t", "batch"), [(199, 2), (200, 4), (799, 4), (800, 2)])
def test_guidance_acts_from_the_intervals_start_up_to_its_end(t: int, batch: int) -> None:
    assert guide(Guidance(2.5, (0.2, 0.8)), t)[1] == [batch]


def test_guidance_is_active_at_every_step_unless_told_otherwise() -> None:
    assert all(Guidance(2.5).active(t, 1000) for t in range(1000))


def test_full_rescale_gives_each_picture_the_standard_deviation_of_cond() -> None:
    out, cond = 4 * random(1) + 1, random(2)
    torch.testing.assert_close(rescaled(out, cond, 1.0).std((1, 2, 3)), cond.std((1, 2, 3)))


def test_rescale_0_changes_nothing() -> None:
    out = random(1)
    assert torch.equal(rescaled(out, random(2), 0.0), out)


def test_half_rescale_lies_half_way() -> None:
    out, cond = 4 * random(1), random(2)
    torch.testing.assert_close(rescaled(out, cond, 0.5), (out + rescaled(out, cond, 1.0)) / 2)


def test_guided_applies_the_rescale() -> None:
    cond = guide(Guidance(1.0))[0]
    torch.testing.assert_close(guide(Guidance(7.5, rescale=1.0))[0].std((1, 2, 3)), cond.std((1, 2, 3)))


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 2, 3)])
def test_a_pictures_noise_does_not_depend_on_its_batch(shape: tuple[int, ...]) -> None:
    alone = draw(generators([7]), shape, CPU)[0]
    together = draw(generators([5, 6, 7, 8]), shape, CPU)[2]
    assert torch.equal(alone, together)


def test_a_pictures_later_draws_do_not_depend_on_its_batch_either() -> None:
    alone, together = generators([7]), generators([5, 7])
    for _ in range(3):
        assert torch.equal(draw(alone, (3, 5, 5), CPU)[0], draw(together, (3, 5, 5), CPU)[1])


def test_successive_draws_differ() -> None:
    streams = generators([7])
    assert not torch.equal(draw(streams, (3, 5, 5), CPU), draw(streams, (3, 5, 5), CPU))


def test_other_seeds_give_other_noise() -> None:
    first, second = draw(generators([1, 2]), (3, 28, 28), CPU)
    assert abs(float((first * second).mean())) < 0.1


def test_noise_is_standard_normal_float32() -> None:
    noise = draw(generators(range(10)), (3, 28, 28), CPU)
    assert noise.dtype == torch.float32
    assert float(noise.mean()) == pytest.approx(0, abs=0.03)
    assert float(noise.std()) == pytest.approx(1, abs=0.03)


# ---------------------------------------------------------------- from one noise to another


def test_slerp_is_the_formula_on_the_flattened_tensors() -> None:
    a, b = random(1), random(2)
    theta = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    expected = (0.7 * theta).sin() / theta.sin() * a + (0.3 * theta).sin() / theta.sin() * b
    torch.testing.assert_close(slerp(a, b, 0.3), expected)


@pytest.mark.parametrize("way", [slerp, linear_way])
def test_both_ways_start_at_the_first_and_end_at_the_second(way: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    a, b = random(1).float(), random(2).float()
    torch.testing.assert_close(way(a, b, 0.0), a)
    torch.testing.assert_close(way(a, b, 1.0), b)


def test_half_way_slerp_keeps_the_norm_of_noise_and_linear_loses_it() -> None:
    a, b = random(1, 3, 64, 64), random(2, 3, 64, 64)
    assert float(slerp(a, b, 0.5).norm() / a.norm()) == pytest.approx(1, abs=0.02)
    assert float(linear_way(a, b, 0.5).norm() / a.norm()) == pytest.approx(math.sqrt(0.5), abs=0.02)


@pytest.mark.parametrize("scale", [1.0, 2.0, 1 + 1e-9])
def test_slerp_of_parallel_vectors_is_linear(scale: float) -> None:
    a = random(1)
    torch.testing.assert_close(slerp(a, scale * a, 0.25), linear_way(a, scale * a, 0.25))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_slerp_of_opposite_vectors_goes_around_and_keeps_the_norm(alpha: float) -> None:
    a = random(1)
    found = slerp(a, -a, alpha)
    assert float(found.norm()) == pytest.approx(float(a.norm()))
    assert float((found * a).sum() / a.norm() ** 2) == pytest.approx(math.cos(alpha * math.pi), abs=1e-6)


def test_slerp_with_a_zero_vector_is_linear() -> None:
    a = random(1)
    assert torch.equal(slerp(a, torch.zeros_like(a), 0.5), 0.5 * a)
