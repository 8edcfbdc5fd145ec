"""The learning rate: warm-up, constant part, and decay to zero."""

from __future__ import annotations

import math

import pytest

from training.schedule import Decay, LearningRate, lr_factor


def test_lr_rises_linearly_over_the_warmup() -> None:
    assert [lr_factor(step, 100, 4, 0.5) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_lr_stays_until_the_decay_begins() -> None:
    assert {lr_factor(step, 100, 4, 0.5) for step in range(3, 51)} == {1.0}


@pytest.mark.parametrize(("shape", "expected"), [("linear", 0.8), ("cosine", 0.5 - 0.5 * math.cos(0.8 * math.pi))])
def test_lr_falls_in_the_chosen_shape(shape: Decay, expected: float) -> None:
    assert lr_factor(60, 100, 4, 0.5, shape) == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_lr_ends_at_zero(shape: Decay) -> None:
    assert lr_factor(100, 100, 4, 0.5, shape) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_lr_is_above_zero_at_the_last_step_that_is_taken(shape: Decay) -> None:
    assert 0 < lr_factor(99, 100, 4, 0.5, shape) < 0.05


def test_lr_without_decay_stays_to_the_end() -> None:
    assert lr_factor(99, 100, 4, 0.0) == 1.0


def test_lr_without_warmup_starts_at_one() -> None:
    assert lr_factor(0, 100, 0, 0.5) == 1.0


def test_lr_of_a_decay_inside_the_warmup_takes_both() -> None:
    assert lr_factor(50, 100, 100, 1.0) == pytest.approx(0.51 * 0.5)


def test_lr_is_the_factor_times_its_peak() -> None:
    lr = LearningRate(2e-3, 4, 0.5, "cosine")
    assert lr.at(60, 100) == pytest.approx(2e-3 * lr_factor(60, 100, 4, 0.5, "cosine"))
