"""Seeds of generation: every image of a run has its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

LARGEST_SEED = 2**32 - 1  # torch's CPU generator uses only the low 32 bits of a seed


def derived_seed(*key: int) -> int:
    """Return a seed below 2^63 for a key of any integers (run seed, domain, digit, index ..), a hash of the key.

    torch's CPU generator reads only its low 32 bits, in which two keys may agree; see `distinct_seeds`.
    """
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def distinct_seeds(keys: Iterable[Sequence[int]], others: Iterable[int] = ()) -> list[int]:
    """Return the derived seed of each key, in order. All differ, also from `others`, in the low 32 bits, and so in their noise.

    When a key's seed agrees with an earlier one there, it is derived again with 1, 2 .. appended to the key.
    """
    used, seeds = {seed & LARGEST_SEED for seed in others}, []
    for key in keys:
        seed, again = derived_seed(*key), 0
        while seed & LARGEST_SEED in used:
            seed, again = derived_seed(*key, again + 1), again + 1
        used.add(seed & LARGEST_SEED)
        seeds.append(seed)
    return seeds
