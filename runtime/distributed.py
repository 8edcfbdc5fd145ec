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
    """This process among those that torchrun or accelerate launch started, on one machine or several; alone without them."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether it is the one that prints and records."""
        return self.rank == 0

    def rows(self, count: int, batch: int) -> list[int]:
        """Which of `count` items are this process's: every world-th batch, whole, so that each is computed in the same company as in a
        single process, and gives the same bytes."""
        return [row for row in range(count) if row // batch % self.world == self.rank]

    def largest(self, count: int, most: int) -> int:
        """`most` items at once, or fewer where else a process would have nothing to do."""
        return max(1, min(most, -(-count // self.world)))

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """The items of all processes, by rank, in every one of them; all have to call it."""
        if self.world == 1:
            return list(items)
        found: list[list[Item]] = [[] for _ in range(self.world)]
        dist.all_gather_object(found, list(items))
        return [item for part in found for item in part]


ALONE = Shard()


@contextmanager
def sharing() -> Iterator[Shard]:
    """This process's shard; where there are several, they are connected until the block ends. Only small things travel, on the CPU."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=timedelta(days=7))  # one may wait long for another's share
    try:
        yield Shard(dist.get_rank(), dist.get_world_size())
        dist.barrier()
    finally:
        dist.destroy_process_group()
