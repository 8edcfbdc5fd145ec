"""Seeds, batches and shards of generation: every picture has its own seed, every batch the same shape, every process whole batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from runtime.cli import BadInput, note

Item = TypeVar("Item")
Result = TypeVar("Result")


def derived_seed(*key: int) -> int:
    """A 63-bit seed from any integers (run seed, domain, digit, index ..); other keys, of whatever length, give unrelated seeds."""
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def even_batch(count: int, most: int) -> int:
    """The smallest batch that needs no more calls than `most` does: ten pictures, at most four at once, go as 4, 4, 2."""
    calls = -(-count // most)
    return -(-count // calls)


def in_batches(
    work: Callable[[list[Item]], Result], items: Sequence[Item], batch: int
) -> Iterator[tuple[list[Item], Result]]:
    """(items, work(items)) in batches of one shape, so that kernels round alike: to `work` the last batch comes with its last item
    repeated. When memory runs out the batch is halved and the rest goes on with that; raises BadInput when one item is too large."""
    start = 0
    while start < len(items):
        chunk = list(items[start : start + batch])
        result = _unless_out_of_memory(work, chunk + [chunk[-1]] * (batch - len(chunk)))
        if result is not None:
            yield chunk, result
            start += len(chunk)
            continue
        if batch == 1:
            raise BadInput("out of memory with one picture at a time: take a smaller picture, or --device cpu")
        batch //= 2
        note(f"out of memory: going on with batches of {batch}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _unless_out_of_memory(work: Callable[[list[Item]], Result], items: list[Item]) -> Result | None:
    """None where memory ran out; returning drops the frames that hold what is to be freed."""
    try:
        return work(items)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def is_out_of_memory(error: Exception) -> bool:
    """A GPU's memory, Python's, or a CPU's as torch asks for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


# ---------------------------------------------------------------- several processes


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
