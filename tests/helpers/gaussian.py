"""Seeded standard normal tensors in float64."""

from __future__ import annotations

import torch
from torch import Tensor

SHAPE = (2, 3, 4, 4)


def gaussian(seed: int, *shape: int) -> Tensor:
    """Draw [*shape], by default SHAPE."""
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
