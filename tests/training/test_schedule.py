"""The learning rate: warm-up, constant part, and decay to zero."""

from __future__ import annotations

import math

import pytest

from training.schedule import Decay, LearningRate


def test_lr_rises_linearly_over_the_warmup() -> None:
    assert [LearningRate(1.0, 4, 0.5).at(step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_lr_stays_until_the_decay_begins() -> None:
    assert {LearningRate(1.0, 4, 0.5).at(step, 100) for step in range(3, 51)} == {1.0}


@pytest.mark.parametrize(("shape", "expected"), [("linear", 0.8), ("cosine", 0.5 - 0.5 * math.cos(0.8 * math.pi))])
def test_lr_falls_in_the_chosen_shape(shape: Decay, expected: float) -> None:
    assert LearningRate(1.0, 4, 0.5, shape).at(60, 100) == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_lr_ends_at_zero(shape: Decay) -> None:
    assert LearningRate(1.0, 4, 0.5, shape).at(100, 100) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_lr_is_above_zero_at_the_last_step_that_is_taken(shape: Decay) -> None:
    assert 0 < LearningRate(1.0, 4, 0.5, shape).at(99, 100) < 0.05


def test_lr_without_decay_stays_to_the_end() -> None:
    assert LearningRate(1.0, 4, 0.0).at(99, 100) == 1.0


def test_lr_without_warmup_starts_at_one() -> None:
    assert LearningRate(1.0, 0, 0.5).at(0, 100) == 1.0


def test_lr_of_a_decay_inside_the_warmup_takes_both() -> None:
    assert LearningRate(1.0, 100, 1.0).at(50, 100) == pytest.approx(0.51 * 0.5)


def test_lr_is_the_factor_times_its_peak() -> None:
    lr = LearningRate(2e-3, 4, 0.5, "cosine")
    assert lr.at(60, 100) == pytest.approx(2e-3 * LearningRate(1.0, 4, 0.5, "cosine").at(60, 100))
