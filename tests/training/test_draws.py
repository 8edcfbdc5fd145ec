"""Random numbers of a step: the same for any number of processes, and with the distributions they are named after."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from runtime.cli import BadInput
from training.draws import Draws, process_rows

CPU = torch.device("cpu")
BATCH = 12


def draw_step(seed: int = 0, step: int = 0, rank: int = 0, world: int = 1) -> list[Tensor]:
    """Draw what one process needs in one step: uniform numbers, strata, noise, uniform numbers again."""
    draws = Draws(seed, step, process_rows(BATCH, rank, world), BATCH, CPU)
    return [draws.uniform(), draws.stratified(), draws.normal(3, 4), draws.uniform()]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_draw_what_one_draws_alone(world: int) -> None:
    parts = zip(*[draw_step(rank=rank, world=world) for rank in range(world)], strict=True)
    assert all(torch.equal(torch.cat(part), whole) for part, whole in zip(parts, draw_step(), strict=True))


def test_the_same_seed_and_step_draw_the_same() -> None:
    assert all(torch.equal(a, b) for a, b in zip(draw_step(3, 5), draw_step(3, 5), strict=True))


@pytest.mark.parametrize(("seed", "step"), [(1, 0), (0, 1)])
def test_another_seed_or_step_draws_other_numbers(seed: int, step: int) -> None:
    assert not any(torch.equal(a, b) for a, b in zip(draw_step(), draw_step(seed, step), strict=True))


def test_seed_and_step_are_mixed_not_added() -> None:
    assert not any(torch.equal(a, b) for a, b in zip(draw_step(1, 0), draw_step(0, 1), strict=True))
    numbers = [float(draw_step(seed, step)[0][0]) for seed in range(20) for step in range(20)]
    assert len(set(numbers)) == 400


def test_successive_draws_of_a_step_differ() -> None:
    first, _, _, second = draw_step()
    assert not torch.equal(first, second)


def test_stratified_has_one_number_in_each_stratum() -> None:
    draws = Draws(0, 0, slice(0, 1000), 1000, CPU)
    assert (draws.stratified() * 1000).long().tolist() == list(range(1000))


def test_stratified_is_random_inside_the_strata() -> None:
    inside = (Draws(0, 0, slice(0, 1000), 1000, CPU).stratified() * 1000) % 1
    assert float(inside.std()) == pytest.approx(1 / math.sqrt(12), rel=0.1)


def test_uniform_and_normal_have_their_distributions() -> None:
    draws = Draws(0, 0, slice(0, 20_000), 20_000, CPU)
    uniform, normal = draws.uniform(), draws.normal()
    moments = [float(v) for v in (uniform.mean(), uniform.var(), normal.mean(), normal.var())]
    assert moments == pytest.approx([0.5, 1 / 12, 0, 1], abs=0.03)


def test_process_rows_cover_the_batch_without_overlap() -> None:
    rows = [row for rank in range(4) for row in range(BATCH)[process_rows(BATCH, rank, 4)]]
    assert rows == list(range(BATCH))


def test_process_rows_refuse_a_batch_that_does_not_divide() -> None:
    with pytest.raises(BadInput, match="--batch 10 does not divide by 4"):
        process_rows(10, 0, 4)
