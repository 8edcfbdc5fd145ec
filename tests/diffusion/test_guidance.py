"""Classifier-free guidance: the formula, its cost, its interval and its rescale."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from gaussian import gaussian
from torch import Tensor

from diffusion.guidance import Guidance, guided, rescaled


class Recorder:
    """A network that returns 0.1 x plus the condition times 1 + x, and records the batch sizes of its calls."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, _: int, condition: Tensor) -> Tensor:
        self.batches.append(len(x))
        return condition.view(-1, 1, 1, 1) * (1 + x) + 0.1 * x


def guide(guidance: Guidance, t: int = 500) -> tuple[Tensor, list[int], Tensor]:
    """Return the guided output at step t of 1000, the batch sizes of the network's calls, and x; cond is 2 and 3, uncond 0 and 0."""
    network, x, condition = Recorder(), gaussian(1), torch.tensor([2.0, 3.0], dtype=torch.float64)
    both = torch.cat([condition, torch.zeros(2, dtype=torch.float64)])
    return guided(network, condition, both, guidance, 1000)(x, t), network.batches, x


@pytest.mark.parametrize("scale", [0.0, 2.5, 7.5])
def test_guidance_is_uncond_plus_scale_times_the_difference(scale: float) -> None:
    output, _, x = guide(Guidance(scale))
    expected = 0.1 * x + scale * torch.tensor([2.0, 3.0], dtype=torch.float64).view(2, 1, 1, 1) * (1 + x)
    torch.testing.assert_close(output, expected)


def test_guidance_computes_both_halves_in_one_call_of_twice_the_batch() -> None:
    assert guide(Guidance(2.5))[1] == [4]


def test_guidance_scale_1_costs_one_call_of_the_batch() -> None:
    output, batches, x = guide(Guidance(1.0))
    assert batches == [2]
    expected = torch.tensor([2.0, 3.0], dtype=torch.float64).view(2, 1, 1, 1) * (1 + x) + 0.1 * x
    assert torch.equal(output, expected)


@pytest.mark.parametrize(("t", "batch"), [(199, 2), (200, 4), (799, 4), (800, 2)])
def test_guidance_acts_from_the_intervals_start_up_to_its_end(t: int, batch: int) -> None:
    assert guide(Guidance(2.5, (0.2, 0.8)), t)[1] == [batch]


def test_guidance_is_active_at_every_step_by_default() -> None:
    assert all(Guidance(2.5).active(t, 1000) for t in range(1000))


def test_full_rescale_gives_each_image_the_standard_deviation_of_cond() -> None:
    out, cond = 4 * gaussian(1) + 1, gaussian(2)
    torch.testing.assert_close(rescaled(out, cond, 1.0).std((1, 2, 3)), cond.std((1, 2, 3)))


def test_rescale_0_changes_nothing() -> None:
    out = gaussian(1)
    assert torch.equal(rescaled(out, gaussian(2), 0.0), out)


def test_half_rescale_lies_half_way() -> None:
    out, cond = 4 * gaussian(1), gaussian(2)
    torch.testing.assert_close(rescaled(out, cond, 0.5), (out + rescaled(out, cond, 1.0)) / 2)


def test_guided_rescales_towards_the_standard_deviation_of_cond() -> None:
    """By diffusers, whose weight is the same."""
    cond, out = guide(Guidance(1.0))[0], guide(Guidance(7.5))[0]
    expected = rescale_noise_cfg(out, cond, 0.3)
    torch.testing.assert_close(guide(Guidance(7.5, rescale=0.3))[0], expected)
    assert (expected - out).abs().max() > 0.1
