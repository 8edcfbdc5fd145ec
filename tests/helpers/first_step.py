"""The loss of a training's first step, by the training's own command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from training.loop import TrainingRun


class FirstStepDone(Exception):
    """The first step's loss is known: nothing is updated."""


def first_loss(train: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> float:
    """Return the loss that the first step hands to the training loop, and end the training there."""
    losses: list[float] = []

    def update(_: TrainingRun, loss: Tensor, **__: Any) -> None:
        losses.append(float(loss.detach()))
        raise FirstStepDone

    monkeypatch.setattr(TrainingRun, "update", update)
    with pytest.raises(FirstStepDone):
        train()
    return losses[0]
