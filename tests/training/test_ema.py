"""Averaged weights: the warm-up of the decay, and an average that can be saved and restored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.ema import Ema


def averaged(values: list[float], decay: float) -> float:
    """Return the average over these values of a network's only weight, one update each."""
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, decay)
    for value in values:
        nn.init.constant_(model.weight, value)
        ema.update_parameters(model)
    return ema.module.get_parameter("weight").item()


def test_first_update_copies_the_weights() -> None:
    assert averaged([3.0], 0.999) == 3.0


@pytest.mark.parametrize(("update", "factor"), [(1, 2 / 11), (2, 3 / 12), (5, 6 / 15)])
def test_warmup_factor_of_update_n_is_1_plus_n_over_10_plus_n(update: int, factor: float) -> None:
    assert averaged([1.0] * update + [0.0], 0.999) == pytest.approx(factor)


def test_after_the_warmup_the_average_has_the_chosen_decay() -> None:
    assert averaged([1.0] * 100 + [0.0] * 3, 0.5) == pytest.approx(0.5**3)


def test_average_equals_a_loop_by_hand() -> None:
    values = torch.randn(300, generator=torch.Generator().manual_seed(0)).tolist()
    expected = values[0]
    for n, value in enumerate(values[1:], start=1):
        factor = min(0.9, (1 + n) / (10 + n))
        expected = factor * expected + (1 - factor) * value
    assert averaged(values, 0.9) == pytest.approx(expected, abs=1e-5)


def test_average_copies_buffers() -> None:
    model = nn.BatchNorm1d(2)
    ema = Ema(model, 0.9)
    model.get_buffer("running_mean").fill_(4.0)
    ema.update_parameters(model)
    assert ema.module.get_buffer("running_mean").tolist() == [4.0, 4.0]


def test_average_leaves_the_model_alone_and_takes_no_gradient() -> None:
    model = nn.Linear(1, 1)
    ema = Ema(model, 0.9)
    assert [p.requires_grad for p in model.parameters()] == [True, True]
    assert [p.requires_grad for p in ema.parameters()] == [False, False]


def test_a_restored_average_continues_with_the_decay_of_its_update() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, 0.999)
    ema.load_state_dict({"n_averaged": torch.tensor(41), "module.weight": torch.ones(1, 1)})
    nn.init.zeros_(model.weight)
    ema.update_parameters(model)
    assert ema.module.get_parameter("weight").item() == pytest.approx(42 / 51)
