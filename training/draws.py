"""Random numbers of a training as a function of seed, step and row of the global batch, which spans all processes.

So resuming needs no saved generator state, and the number of processes does not change the numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.cli import BadInput
from runtime.seeds import derived_seed


class Draws:
    """The random numbers of one training step for the rows of the global batch that this process computes.

    Each method draws for all `total` rows, and returns those of `rows`.
    """

    def __init__(self, seed: int, step: int, rows: slice, total: int, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(derived_seed(seed, step))
        self.rows, self.total, self.device = rows, total, device

    def uniform(self) -> Tensor:
        """[rows] in [0, 1)."""
        return torch.rand(self.total, generator=self.generator, device=self.device)[self.rows]

    def stratified(self) -> Tensor:
        """[rows] in [0, 1]: row i of the global batch is uniform in [i, i + 1] / total. Less variance than `uniform`."""
        offsets = torch.rand(self.total, generator=self.generator, device=self.device)
        return ((torch.arange(self.total, device=self.device) + offsets) / self.total)[self.rows]

    def timesteps(self, total: int) -> Tensor:
        """[rows] int64 in 0 .. total - 1, stratified over the global batch. `total` is T here."""
        return (self.stratified() * total).long().clamp(max=total - 1)

    def normal(self, *shape: int) -> Tensor:
        """[rows, *shape] standard normal."""
        noise = torch.randn(self.total, *shape, generator=self.generator, device=self.device)
        return noise[self.rows]


def process_rows(batch: int, rank: int, world: int) -> slice:
    """Return the rows of the global batch for process `rank` of `world`; raise BadInput if `world` does not divide `batch`."""
    if batch % world:
        raise BadInput(f"--batch {batch} does not divide by {world} processes")
    return slice(rank * (batch // world), (rank + 1) * (batch // world))
