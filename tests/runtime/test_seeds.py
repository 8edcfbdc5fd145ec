"""Seeds of images: fixed for ever, different for every key."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime.seeds import derived_seed


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
def test_derived_seeds_of_other_tuples_differ_whatever_their_length(others: tuple[tuple[int, ...], ...]) -> None:
    assert derived_seed(*others[0]) != derived_seed(*others[1])


def test_derived_seeds_of_numpys_integers_are_those_of_pythons() -> None:
    assert derived_seed(*np.array([1, 2])) == derived_seed(1, 2)


def test_derived_seeds_fit_a_torch_generator() -> None:
    seeds = [derived_seed(0, index) for index in range(1000)]
    assert 0 <= min(seeds) < max(seeds) < 2**63
    torch.Generator().manual_seed(max(seeds))
