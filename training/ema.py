"""Exponential moving average of the weights, by torch's own averaging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]


class WarmupDecay:
    """Averaging with min(decay, (1 + n) / (10 + n)) at update n, so that the first weights are soon forgotten."""

    def __init__(self, decay: float):
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def __call__(self, averaged: Tensors, current: Tensors, _: Tensor | int) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(averaged, current, 1 - decay)


class Ema(AveragedModel):
    """A copy of a network, `module`, that `update_parameters(network)` moves towards the current weights."""

    def __init__(self, network: nn.Module, decay: float):
        self.averaging = WarmupDecay(decay)
        super().__init__(network, multi_avg_fn=self.averaging)
        self.requires_grad_(False)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights and the number of updates, which the decay depends on."""
        result = super().load_state_dict(state_dict, strict, assign)
        self.averaging.updates = max(0, int(self.n_averaged) - 1)  # the first update is a copy
        return result
