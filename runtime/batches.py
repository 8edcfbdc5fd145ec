"""Batches of one shape, halved when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from runtime.cli import BadInput, log

Item = TypeVar("Item")
Result = TypeVar("Result")


def even_batch(count: int, most: int) -> int:
    """Return the smallest batch size that needs as few calls as batches of `most`: 5 for ten items with `most` 8."""
    calls = -(-count // most)
    return -(-count // calls)


def in_batches(
    work: Callable[[list[Item]], Result], items: Sequence[Item], batch: int
) -> Iterator[tuple[list[Item], Result]]:
    """Yield (chunk, work(chunk)) for chunks of `batch` items.

    All calls have one shape, so that kernels round alike: `work` gets the last chunk padded with its last item.
    That chunk is yielded without padding, its result with it. When memory runs out, `batch` is halved for the rest.
    Raise BadInput when memory runs out with a single item.
    """
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
        log(f"out of memory: going on with batches of {batch}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _unless_out_of_memory(work: Callable[[list[Item]], Result], items: list[Item]) -> Result | None:
    """Return None when memory ran out: leaving the `except` block drops the frames that hold the tensors to free."""
    try:
        return work(items)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the error means a lack of memory: of a GPU, of Python, or of torch on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def is_overflow(error: Exception) -> bool:
    """Return whether torch refused a tensor whose size in bytes exceeds 64 bits."""
    return isinstance(error, RuntimeError) and "overflow" in str(error)
