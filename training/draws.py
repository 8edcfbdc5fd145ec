"""Random numbers of training as a function of (seed, step, global sample index).

Resuming needs no saved generator state, and the number of processes does not change what is drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.cli import BadInput
from runtime.seeds import derived_seed


class Draws:
    """The random numbers of one step: drawn for the whole global batch, of which this process keeps its rows."""

    def __init__(self, seed: int, step: int, rows: slice, total: int, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(derived_seed(seed, step))
        self.rows, self.total, self.device = rows, total, device

    def uniform(self) -> Tensor:
        """[rows] in [0, 1)."""
        return torch.rand(self.total, generator=self.generator, device=self.device)[self.rows]

    def stratified(self) -> Tensor:
        """[rows] in [0, 1], one in each of `total` equal strata over the global batch: less variance than `uniform`."""
        offsets = torch.rand(self.total, generator=self.generator, device=self.device)
        return ((torch.arange(self.total, device=self.device) + offsets) / self.total)[self.rows]

    def timesteps(self, total: int) -> Tensor:
        """[rows] int64 in 0 .. total - 1, stratified over the global batch."""
        return (self.stratified() * total).long().clamp(max=total - 1)

    def normal(self, *shape: int) -> Tensor:
        """[rows, *shape] standard normal."""
        noise = torch.randn(self.total, *shape, generator=self.generator, device=self.device)
        return noise[self.rows]


def process_rows(batch: int, rank: int, world: int) -> slice:
    """Return the rows of the global batch for process `rank` of `world`; raise BadInput if they don't divide."""
    if batch % world:
        raise BadInput(f"--batch {batch} does not divide by {world} processes")
    return slice(rank * (batch // world), (rank + 1) * (batch // world))
