"""Exponential moving average of the weights, by torch's own averaging."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]


class Ema(AveragedModel):
    """The moving average of a network's weights, in its copy `module`; `update_parameters(network)` adds the current weights.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that the initial weights soon lose their influence.
    """

    def __init__(self, network: nn.Module, decay: float):
        super().__init__(network, multi_avg_fn=self.average)
        self.decay = decay
        self.requires_grad_(False)

    @torch.no_grad()
    def average(self, averaged: Tensors, current: Tensors, _: Tensor | int) -> None:
        """Move the averaged tensors, in place, towards the current ones. torch copies at the first update and calls this at later ones."""
        n = int(self.n_averaged)  # stays on the CPU, unlike the argument: no device sync
        torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + n) / (10 + n)))
