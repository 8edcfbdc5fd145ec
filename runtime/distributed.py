"""Several processes that share the work of one script."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """This process among those that torchrun or accelerate launch started, on one machine or several."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Return whether this process prints and records for all."""
        return self.rank == 0

    def rows(self, count: int, batch: int) -> list[int]:
        """Return the indices of this process's items among `count`: those of every world-th batch of `batch` items.

        Batches stay whole, so that each gives the same bytes as in a single process.
        """
        return [row for row in range(count) if row // batch % self.world == self.rank]

    def largest(self, count: int, most: int) -> int:
        """Return the batch size `most`, or each process's even share of `count` items, rounded up, if that is smaller."""
        return max(1, min(most, -(-count // self.world)))

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """Return the items of all processes, in order of rank, in every process. All processes must call it."""
        if self.world == 1:
            return list(items)
        parts: list[list[Item]] = [[] for _ in range(self.world)]
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]


ALONE = Shard()


@contextmanager
def sharing() -> Iterator[Shard]:
    """Yield this process's Shard; within the block several processes are connected, on the CPU, for small objects only.

    At its end every process waits for all others.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=timedelta(days=7))  # others may take hours longer
    try:
        yield Shard(dist.get_rank(), dist.get_world_size())
        dist.barrier()
    finally:
        dist.destroy_process_group()
