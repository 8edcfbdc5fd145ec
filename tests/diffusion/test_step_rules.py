"""Step rules: which timesteps are visited, where each rule ends, and whether it clamps x0."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from diffusers import DDIMScheduler

from diffusion.step_rules import Rule, step_rule


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
    reference: Any = DDIMScheduler(1000, timestep_spacing=spacing)
    reference.set_timesteps(steps)
    assert [t for t, _ in step_rule(rule, 1000, steps).pairs] == reference.timesteps.tolist()


def test_trailing_rule_starts_at_the_last_step_and_ends_clean() -> None:
    pairs = step_rule("trailing", 1000, 50).pairs
    assert (pairs[0], pairs[-1]) == ((999, 979), (19, -1))


@pytest.mark.parametrize(
    ("rule", "clamped"),
    [("homework", True), ("diffusers", True), ("trailing", True), ("ddim", False), ("bdia", False)],
)
def test_plain_ddim_and_bdia_alone_do_not_clamp_x0(rule: Rule, clamped: bool) -> None:
    assert step_rule(rule, 1000, 50).clamp is clamped


def test_bdia_has_the_grid_of_the_homework_and_two_states() -> None:
    assert step_rule("bdia", 1000, 50).pairs == step_rule("homework", 1000, 50).pairs
    assert [rule for rule in get_args(Rule) if step_rule(rule, 1000, 50).two_states] == ["bdia"]


@pytest.mark.parametrize(
    ("rule", "times"),
    [
        ("homework", [0, *range(1, 982, 20)]),
        ("bdia", [0, *range(1, 982, 20)]),
        ("ddim", [*range(0, 981, 20)]),
        ("trailing", [0, *range(19, 1000, 20)]),
    ],
)
def test_backwards_an_image_is_the_state_at_0_and_nothing_is_clamped(rule: Rule, times: list[int]) -> None:
    steps = step_rule(rule, 1000, 50).backwards()
    assert steps.pairs == tuple(zip(times, times[1:], strict=False))
    assert (steps.clamp, steps.two_states) == (False, rule == "bdia")


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("steps", [-1, 0, 101])
def test_steps_that_do_not_fit_are_refused(rule: Rule, steps: int) -> None:
    with pytest.raises(ValueError, match=f"{steps} steps"):
        step_rule(rule, 100, steps)


def test_homework_rule_cannot_visit_all_steps_because_it_starts_one_later() -> None:
    with pytest.raises(ValueError, match="would start at 1000, the last is 999"):
        step_rule("homework", 1000, 1000)
