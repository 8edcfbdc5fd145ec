"""Batches of one shape, halved when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from runtime.cli import BadInput, log

Item = TypeVar("Item")
Result = TypeVar("Result")


def even_batch(count: int, most: int) -> int:
    """Return the smallest batch that needs as few calls as `most` at once: ten items, at most eight at once, go as 5, 5."""
    calls = -(-count // most)
    return -(-count // calls)


def in_batches(
    work: Callable[[list[Item]], Result], items: Sequence[Item], batch: int
) -> Iterator[tuple[list[Item], Result]]:
    """Yield (items, work(items)) in batches of one shape, so that kernels round alike.

    `work` receives the last batch padded with its last item. When memory runs out, the batch is halved for the rest.
    Raise BadInput when one item is too large.
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
    """Return whether torch refused a tensor whose number of bytes is no 64-bit number."""
    return isinstance(error, RuntimeError) and "overflow" in str(error)
