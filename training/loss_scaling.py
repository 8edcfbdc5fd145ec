"""Loss scaling for trainings in fp16, by torch's own GradScaler."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler


class LossScaler(GradScaler):
    """The factor on the loss that keeps small gradients from rounding to zero in fp16; in other precisions it does nothing.

    A step whose gradients overflow is skipped and halves the factor. 2,000 steps in a row without an overflow double it.
    Several processes skip the same steps, since they see the same averaged gradients.
    """

    def __init__(self, device: torch.device, precision: str):
        super().__init__(device.type, enabled=precision == "fp16")
        self.skipped = 0  # steps of the whole training

    def take_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Step the optimizer, whose gradients are unscaled already, and adapt the factor. Return False if the step was skipped."""
        before = self.get_scale()
        self.step(optimizer)
        self.update()
        overflow = self.get_scale() < before
        self.skipped += overflow
        return not overflow

    def state_dict(self) -> dict[str, Any]:
        """Return the factor, its counters and the number of skipped steps; {} in other precisions than fp16."""
        return super().state_dict() | ({"skipped": self.skipped} if self.is_enabled() else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. An empty state, from a checkpoint of another precision, changes nothing."""
        if state:
            super().load_state_dict(state)
            self.skipped = state["skipped"]
