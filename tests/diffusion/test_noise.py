"""Noise streams, one per image, and interpolation between two noises."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from gaussian import gaussian
from torch import Tensor

from diffusion.noise import draw, generators, linear, mean, slerp

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 2, 3)])
def test_the_noise_of_an_image_does_not_depend_on_its_batch(shape: tuple[int, ...]) -> None:
    alone = draw(generators([7]), shape, CPU)[0]
    together = draw(generators([5, 6, 7, 8]), shape, CPU)[2]
    assert torch.equal(alone, together)


def test_later_draws_of_an_image_do_not_depend_on_its_batch_either() -> None:
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


# ---------------------------------------------------------------- interpolation


def test_slerp_is_the_formula_on_the_flattened_tensors() -> None:
    a, b = gaussian(1), gaussian(2)
    theta = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    expected = (0.7 * theta).sin() / theta.sin() * a + (0.3 * theta).sin() / theta.sin() * b
    torch.testing.assert_close(slerp(a, b, 0.3), expected)


@pytest.mark.parametrize("interpolate", [slerp, linear])
def test_both_ways_start_at_the_first_and_end_at_the_second(
    interpolate: Callable[[Tensor, Tensor, float], Tensor],
) -> None:
    a, b = gaussian(1).float(), gaussian(2).float()
    torch.testing.assert_close(interpolate(a, b, 0.0), a)
    torch.testing.assert_close(interpolate(a, b, 1.0), b)


def test_half_way_slerp_keeps_the_norm_of_noise_and_linear_loses_it() -> None:
    a, b = gaussian(1, 3, 64, 64), gaussian(2, 3, 64, 64)
    assert float(slerp(a, b, 0.5).norm() / a.norm()) == pytest.approx(1, abs=0.02)
    assert float(linear(a, b, 0.5).norm() / a.norm()) == pytest.approx(math.sqrt(0.5), abs=0.02)


@pytest.mark.parametrize("scale", [1.0, 2.0, 1 + 1e-9])
def test_slerp_of_parallel_vectors_is_linear(scale: float) -> None:
    a = gaussian(1)
    torch.testing.assert_close(slerp(a, scale * a, 0.25), linear(a, scale * a, 0.25))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_slerp_of_opposite_vectors_goes_around_and_keeps_the_norm(alpha: float) -> None:
    a = gaussian(1)
    middle = slerp(a, -a, alpha)
    assert float(middle.norm()) == pytest.approx(float(a.norm()))
    assert float((middle * a).sum() / a.norm() ** 2) == pytest.approx(math.cos(alpha * math.pi), abs=1e-6)


def test_slerp_with_a_zero_vector_is_linear() -> None:
    a = gaussian(1)
    assert torch.equal(slerp(a, torch.zeros_like(a), 0.5), 0.5 * a)


# ---------------------------------------------------------------- means


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_mean_of_noises_is_their_weighted_sum_over_the_length_of_the_weights(scale: float) -> None:
    a, b, c = gaussian(1), gaussian(2), gaussian(3)
    expected = (0.5 * a + 0.3 * b + 0.2 * c) / math.sqrt(0.38)
    torch.testing.assert_close(mean([a, b, c], [0.5 * scale, 0.3 * scale, 0.2 * scale]), expected)


def test_the_mean_of_noises_has_the_variance_of_one_where_a_plain_mean_has_less() -> None:
    noises = [gaussian(seed, 3, 64, 64).float() for seed in range(5)]
    assert mean(noises, [1, 1, 1, 1, 1]).dtype == torch.float32
    assert float(mean(noises, [1, 1, 1, 1, 1]).std()) == pytest.approx(1, abs=0.02)
    assert float(torch.stack(noises).mean(0).std()) == pytest.approx(math.sqrt(1 / 5), abs=0.02)


def test_the_mean_of_one_noise_is_that_noise() -> None:
    torch.testing.assert_close(mean([gaussian(1), gaussian(2)], [0.7, 0.0]), gaussian(1))
