"""Seeds and batches of generation: every picture has its own seed, every batch the same shape."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def derived_seed(*key: int) -> int:
    """A 63-bit seed from any integers (run seed, domain, digit, index ..); other keys, of whatever length, give unrelated seeds."""
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def padded_batches(items: Sequence[Item], batch: int) -> Iterator[tuple[list[Item], int]]:
    """(batch items, how many of them count): the last batch repeats its last item up to the full shape, so that kernels round alike."""
    for start in range(0, len(items), batch):
        chunk = list(items[start : start + batch])
        yield chunk + [chunk[-1]] * (batch - len(chunk)), len(chunk)
