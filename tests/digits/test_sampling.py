"""Digits from labels and seeds: the guided image of every label, distinct seeds, and redrawing what is misread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch
from small_digits import TINY
from torch import Tensor, nn

from diffusion.noise import draw, generators
from diffusion.schedule import Schedule, make_schedule
from digits.classifier import DigitClassifier
from digits.sampling import DigitRequest, DigitSampler, DigitSamplerConfig, graded_requests, labels_of, redraw, sample
from P1_model import IMAGE_SHAPE, NO_DIGIT, Network
from runtime.cli import BadInput
from runtime.images import to_uint8
from runtime.seeds import LARGEST_SEED, derived_seed


class Formula(nn.Module):
    """A network that is sure of an image of one grey, `grey(digit, domain)`, at every noise level."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule, self.anchor, self.config = schedule, nn.Parameter(torch.zeros(1)), TINY

    def forward(self, x: Tensor, t: Tensor, digit: Tensor, domain: Tensor) -> Tensor:
        alpha_bar = self.schedule.alpha_bar[t].float()[:, None, None, None]
        x0 = grey(digit, domain)[:, None, None, None]
        return (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()


def grey(digit: Tensor, domain: Tensor) -> Tensor:
    """Return the grey of a label: each digit and domain has another, and so has a domain whose digit is dropped."""
    return 0.02 * digit.where(digit != NO_DIGIT, torch.tensor(-5)) + 0.3 * domain - 0.3


class DistilledFormula(Formula):
    """One that takes the guidance scale, 1 .. 5, and is sure of the guided image; it records images and scale of each call."""

    def __init__(self, schedule: Schedule):
        super().__init__(schedule)
        self.config, self.calls = replace(TINY, max_guidance=5.0), list[tuple[int, float]]()

    def forward(self, x: Tensor, t: Tensor, digit: Tensor, domain: Tensor, guidance: Tensor | None = None) -> Tensor:
        scale = torch.ones(len(x)) if guidance is None else guidance
        self.calls.append((len(x), scale.unique().item()))
        cond, uncond = (
            super(DistilledFormula, self).forward(x, t, d, domain) for d in (digit, torch.full_like(digit, NO_DIGIT))
        )
        return uncond + scale[:, None, None, None] * (cond - uncond)


def formula_network(kind: type[Formula] = Formula) -> Network:
    schedule = make_schedule("linear", 50, "eps")
    return Network(cast(Any, kind(schedule)), schedule, "linear", {}, {})


def sampler(batch: int = 7, **config: Any) -> DigitSampler:
    return DigitSampler(formula_network(), DigitSamplerConfig(**{"steps": 10, **config}), batch)


# ---------------------------------------------------------------- the labels


@pytest.mark.parametrize("name", ["dpm", "ddim", "ddpm"])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_goes_from_the_domains_image_without_a_digit_to_the_digits_image_and_beyond(
    name: str, guidance: float
) -> None:
    requests = graded_requests(0, 1)
    digits, domains = labels_of(requests)
    cond, uncond = grey(digits, domains), grey(torch.full_like(digits, NO_DIGIT), domains)
    expected = uncond + guidance * (cond - uncond)
    images = sampler(name=name, guidance=guidance).images(requests, "test")
    torch.testing.assert_close(images, expected[:, None, None, None].expand(-1, *IMAGE_SHAPE), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"name": "dpm", "steps": 4, "guidance": 3.0}, [3.0] * 4),
        ({"name": "dpm", "steps": 4, "guidance": 1.0}, [1.0] * 4),
        ({"name": "dpm", "steps": 5, "guidance": 5.0, "interval": (0.3, 0.7)}, [1.0, 1.0, 5.0, 5.0, 1.0]),  # t 49 .. 10
        ({"name": "ddim", "steps": 10, "guidance": 2.0, "eta": 1.0}, [2.0] * 10),
        ({"name": "ddim", "steps": 10, "guidance": 2.0, "rule": "homework"}, [2.0] * 10),
        ({"name": "ddpm", "guidance": 2.5}, [2.5] * 50),
    ],
)
def test_a_distilled_network_draws_the_guided_images_by_one_call_per_step_and_image(
    config: dict[str, Any], scales: list[float]
) -> None:
    requests, network = graded_requests(0, 1), formula_network(DistilledFormula)
    images = DigitSampler(network, DigitSamplerConfig(**config), 20).images(requests, "test")
    assert cast(Any, network.unet).calls == [(20, scale) for scale in scales]
    torch.testing.assert_close(images, sampler(batch=20, **config).images(requests, "test"), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"guidance": 5.5}, "--guidance 5.5: this checkpoint is distilled, it takes scales from 1 to 5.0"),
        ({"guidance": 0.5}, "--guidance 0.5: .* from 1 to 5.0"),
        ({"guidance": 2.0, "rescale": 0.5}, "--guidance-rescale 0.5: this checkpoint is distilled"),
    ],
)
def test_a_guidance_that_a_distilled_network_has_not_learned_is_refused(config: dict[str, Any], message: str) -> None:
    network = formula_network(DistilledFormula)
    with pytest.raises(BadInput, match=message):
        DigitSampler(network, DigitSamplerConfig(**config), 20).images(graded_requests(0, 1), "test")
    assert not cast(Any, network.unet).calls


def test_a_network_distilled_to_few_steps_takes_unclamped_ddim_steps_with_their_number_as_an_input(
    few_step_network: Network,
) -> None:
    requests = graded_requests(0, 1)
    labels, alpha_bars = labels_of(requests), [*few_step_network.schedule.alpha_bar.tolist(), 1.0]
    images = sample(few_step_network, requests, DigitSamplerConfig("distilled", 2, guidance=3.0))
    x = draw(generators([request.seed for request in requests]), IMAGE_SHAPE, torch.device("cpu"))
    numbers = {"guidance": torch.full((20,), 3.0), "steps": torch.full((20,), 2.0)}
    for t, t_prev in ((19, 9), (9, -1)):  # T = 20
        v = few_step_network.unet(x, torch.full((20,), t), *labels, **numbers)
        now, before = alpha_bars[t], alpha_bars[t_prev]
        x0, eps = now**0.5 * x - (1 - now) ** 0.5 * v, (1 - now) ** 0.5 * x + now**0.5 * v
        x = before**0.5 * x0 + (1 - before) ** 0.5 * eps
    torch.testing.assert_close(images, x.clamp(-1, 1), rtol=0, atol=1e-4)


def test_such_a_network_is_sampled_by_the_other_samplers_as_without_that_input(
    few_step_network: Network, distilled_network: Network
) -> None:
    requests, config = graded_requests(0, 1), DigitSamplerConfig("dpm", 5, guidance=3.0)
    assert torch.equal(sample(few_step_network, requests, config), sample(distilled_network, requests, config))


def test_requests_go_by_domain_digit_and_index() -> None:
    requests = graded_requests(5, 2, [3, 1], [1, 0])
    assert [(request.domain, request.digit) for request in requests[::2]] == [(1, 3), (1, 1), (0, 3), (0, 1)]
    assert [request.seed for request in requests[:2]] == [derived_seed(5, 1, 3, 0), derived_seed(5, 1, 3, 1)]


# ---------------------------------------------------------------- the seeds

CLASH = (6143, 0, 9, 30)  # its seed draws the same noise as that of (6143, 1, 7, 5)


def test_no_two_images_of_a_graded_run_share_their_noise() -> None:
    requests = graded_requests(CLASH[0], 50)
    assert len({request.seed & LARGEST_SEED for request in requests}) == 1000
    keys = [(CLASH[0], request.domain, request.digit, row % 50) for row, request in enumerate(requests)]
    changed = [key for key, request in zip(keys, requests, strict=True) if request.seed != derived_seed(*key)]
    assert changed == [CLASH]


def test_a_part_of_a_graded_run_has_the_seeds_of_the_whole() -> None:
    whole = set(graded_requests(CLASH[0], 50))
    assert set(graded_requests(CLASH[0], 31, [9, 7], [0])) < whole
    assert set(graded_requests(CLASH[0], 31)) < whole


# ---------------------------------------------------------------- retries


@dataclass(frozen=True)
class Drawing(DigitSampler):
    """A sampler that records its requests; its images show, in all values, what is read, plus 20 in the second domain."""

    outcomes: dict[int, int]  # an attempt's seed -> what is read
    drawn: list[list[DigitRequest]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    def images(self, requests: Sequence[DigitRequest], title: str) -> Tensor:
        self.drawn.append(list(requests))
        self.batches.append(self.batch)
        digits = torch.tensor([self.outcomes[request.seed] + 20 * request.domain for request in requests])
        return (digits / 127.5 - 1)[:, None, None, None].expand(-1, *IMAGE_SHAPE)


class Reader(DigitClassifier):
    """A classifier that reads such images of its domain."""

    def __init__(self, domain: int):
        nn.Module.__init__(self)
        self.domain = domain

    def read(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, 0].long() - 20 * self.domain


READERS = [Reader(0), Reader(1)]


def drawing(requests: Sequence[DigitRequest], right_at: Sequence[int], batch: int) -> Drawing:
    """Return a sampler that draws request k right from attempt right_at[k] on; attempt 0 is the first try."""
    outcomes: dict[int, int] = {}
    for request, right in zip(requests, right_at, strict=True):
        seeds = [request.seed, *(derived_seed(request.seed, attempt) for attempt in range(1, 6))]
        outcomes |= {seed: request.digit + (attempt < right) for attempt, seed in enumerate(seeds)}
    return Drawing(formula_network(), DigitSamplerConfig(), batch, outcomes)


def first_try(sampler: Drawing, requests: Sequence[DigitRequest]) -> dict[int, Tensor]:
    """Return the images of all requests, {row: uint8}."""
    images = dict(enumerate(to_uint8(sampler.images(requests, ""))))
    sampler.drawn.clear()
    sampler.batches.clear()
    return images


@pytest.mark.parametrize("batch", [2, 3, 50])
def test_exactly_the_misread_images_are_drawn_again_each_time_from_another_seed(batch: int) -> None:
    requests = graded_requests(1, 1, [2, 5, 7])
    right_at = [0, 3, 1, 9, 2, 0]  # row 3 stays misread
    sampler = drawing(requests, right_at, batch)
    images = first_try(sampler, requests)

    first, left = redraw(sampler, READERS, requests, images, retries=3)

    assert (first, left) == ([1, 2, 3, 4], [3])
    again = [[1, 2, 3, 4], [1, 3, 4], [1, 3]]  # the rows of each attempt
    expected = [
        [replace(requests[row], seed=derived_seed(requests[row].seed, attempt)) for row in rows]
        for attempt, rows in enumerate(again, start=1)
    ]
    assert sampler.drawn == expected
    assert sampler.batches == [min(batch, 32)] * 3  # the last batch is padded: few images don't fill a large one
    shown = {row: int(image[0, 0, 0]) for row, image in images.items()}
    assert shown == {row: request.digit + (row == 3) + 20 * request.domain for row, request in enumerate(requests)}


def test_without_a_misread_image_nothing_is_drawn_again() -> None:
    requests = graded_requests(1, 1)
    sampler = drawing(requests, [0] * 20, 8)
    images = first_try(sampler, requests)
    assert redraw(sampler, READERS, requests, images, retries=3) == ([], [])
    assert not sampler.drawn


def test_the_seed_of_a_retry_is_not_that_of_another_image() -> None:
    """Two requests: the retry of the first would share its noise with the second."""
    first = DigitRequest(4, 0, 11)
    second = DigitRequest(6, 0, derived_seed(first.seed, 1) & LARGEST_SEED)
    sampler = drawing([first, second], [1, 0], 8)
    again = replace(first, seed=derived_seed(first.seed, 1, 1))
    sampler.outcomes[again.seed] = first.digit
    images = first_try(sampler, [first, second])
    assert redraw(sampler, READERS, [first, second], images, retries=1) == ([0], [])
    assert sampler.drawn == [[again]]


def test_the_seed_of_a_retry_is_not_that_of_an_earlier_retry() -> None:
    """By their seeds alone, the second retry of the other would share its noise with the first retry of the one."""
    one, other = DigitRequest(4, 0, 16707), DigitRequest(6, 0, 32719)
    assert (derived_seed(one.seed, 1) ^ derived_seed(other.seed, 2)) & LARGEST_SEED == 0
    sampler = drawing([one, other], [1, 2], 8)
    again = replace(other, seed=derived_seed(other.seed, 2, 1))
    sampler.outcomes[again.seed] = other.digit
    images = first_try(sampler, [one, other])
    assert redraw(sampler, READERS, [one, other], images, retries=2) == ([0, 1], [])
    assert sampler.drawn[1] == [again]


def test_the_expected_time_is_that_of_a_step_times_the_passes_of_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 13.0])
    monkeypatch.setattr("digits.sampling.time.perf_counter", lambda: next(clock))
    drawing = sampler(batch=4, name="ddim", steps=6)
    assert drawing.expected_seconds(9) == pytest.approx(
        3.0 / 2 * drawing.config.passes(len(drawing.network.schedule)) * 3
    )
