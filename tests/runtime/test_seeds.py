"""Seeds of images: fixed for ever, different for every key."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime.seeds import LARGEST_SEED, derived_seed, distinct_seeds


@pytest.mark.parametrize(
    ("key", "seed"),
    [((0,), 7210762507766007076), ((0, 0, 3, 49), 8954498028786423518), ((2024, 1, 9, 7), 8021369162835155518)],
)
def test_derived_seeds_never_change(key: tuple[int, ...], seed: int) -> None:
    assert derived_seed(*key) == seed


def test_derived_seeds_differ_within_and_between_runs() -> None:
    keys = [(s, d, c, i) for s in range(2) for d in range(2) for c in range(10) for i in range(50)]
    assert len({derived_seed(*key) for key in keys}) == len(keys)


def test_derived_seeds_depend_on_the_order_of_the_key() -> None:
    assert derived_seed(1, 2) != derived_seed(2, 1)


@pytest.mark.parametrize("others", [((1,), (1, 0)), ((2**32,), (0, 1))], ids=["trailing zero", "large number"])
def test_derived_seeds_of_other_tuples_of_any_length_differ(others: tuple[tuple[int, ...], ...]) -> None:
    assert derived_seed(*others[0]) != derived_seed(*others[1])


def test_derived_seeds_of_numpys_integers_are_those_of_pythons() -> None:
    assert derived_seed(*np.array([1, 2])) == derived_seed(1, 2)


def test_derived_seeds_fit_a_torch_generator() -> None:
    seeds = [derived_seed(0, index) for index in range(1000)]
    assert 0 <= min(seeds) < max(seeds) < 2**63
    torch.Generator().manual_seed(max(seeds))


CLASH = (6143, 1, 7, 5), (6143, 0, 9, 30)  # found by search: the same low 32 bits


def noise(seed: int) -> list[float]:
    """Return what torch's CPU generator draws first."""
    values: list[float] = torch.randn(4, generator=torch.Generator().manual_seed(seed)).tolist()
    return values


def test_torchs_cpu_generator_draws_by_the_low_32_bits_of_a_seed() -> None:
    assert noise(5) == noise(5 + 2**32) != noise(6)
    first, second = (derived_seed(*key) for key in CLASH)
    assert first != second
    assert noise(first) == noise(second)


def test_of_two_keys_whose_noise_would_be_the_same_the_later_draws_another() -> None:
    first, second = distinct_seeds(CLASH)
    assert (first, second) == (derived_seed(*CLASH[0]), derived_seed(*CLASH[1], 1))
    assert noise(first) != noise(second)


def test_keys_that_do_not_clash_keep_their_seeds() -> None:
    keys = [(0, domain, digit, index) for domain in range(2) for digit in range(10) for index in range(50)]
    assert distinct_seeds(keys) == [derived_seed(*key) for key in keys]


def test_the_seeds_of_others_are_not_drawn_again() -> None:
    assert distinct_seeds(CLASH[1:], [derived_seed(*CLASH[0]) & LARGEST_SEED]) == [derived_seed(*CLASH[1], 1)]


def test_a_seed_is_drawn_again_as_often_as_it_clashes() -> None:
    key = (3, 1)
    others = [derived_seed(*key), derived_seed(*key, 1), derived_seed(*key, 2)]
    assert distinct_seeds([key], others) == [derived_seed(*key, 3)]
