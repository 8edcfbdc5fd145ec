"""Seeds of generation: every image of a run has its own."""

from __future__ import annotations

import hashlib


def derived_seed(*key: int) -> int:
    """Return a 63-bit seed for a key of any integers (run seed, domain, digit, index ..). Different keys give unrelated seeds."""
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
