"""Exponential moving average of the weights, by torch's own averaging."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]


class WarmupDecay:
    """Averages with min(decay, (1 + n) / (10 + n)) at update n, so that the first weights are soon forgotten."""

    def __init__(self, decay: float, updates: int = 0):
        self.decay, self.updates = decay, updates

    @torch.no_grad()
    def __call__(self, averaged: Tensors, current: Tensors, _: Tensor | int) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(averaged, current, 1 - decay)


def make_ema(model: nn.Module, decay: float, updates: int = 0) -> AveragedModel:
    """A copy of `model` whose `update_parameters(model)` moves it towards the current weights; `updates` were made before."""
    return AveragedModel(model, multi_avg_fn=WarmupDecay(decay, updates)).requires_grad_(False)
