"""Seeds of generation: every image of a run has its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

LARGEST_SEED = 2**32 - 1  # torch's CPU generator draws by the low 32 bits of a seed, which these are


def derived_seed(*key: int) -> int:
    """Return a seed for a key of any integers (run seed, domain, digit, index ..). Different keys give unrelated seeds.

    It is a number below 2^63, of which torch's CPU generator reads the low 32 bits: `distinct_seeds` keeps these apart.
    """
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def distinct_seeds(keys: Iterable[Sequence[int]], others: Iterable[int] = ()) -> list[int]:
    """Return the derived seed of each key; no two of them, and none of `others`, have the same low 32 bits and so the same noise.

    On such a clash the later key's seed is drawn again: with 1, 2 .. appended to the key.
    """
    used, seeds = {seed & LARGEST_SEED for seed in others}, []
    for key in keys:
        seed, again = derived_seed(*key), 0
        while seed & LARGEST_SEED in used:
            seed, again = derived_seed(*key, again + 1), again + 1
        used.add(seed & LARGEST_SEED)
        seeds.append(seed)
    return seeds
