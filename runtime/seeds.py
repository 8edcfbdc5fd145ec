"""Seeds of generation: every image of a run has its own."""

from __future__ import annotations

import hashlib


def derived_seed(*key: int) -> int:
    """A 63-bit seed from any integers (run seed, domain, digit, index ..); other keys, of whatever length, give unrelated seeds."""
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
