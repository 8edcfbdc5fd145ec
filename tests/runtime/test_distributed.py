"""Several processes that share the work."""

from __future__ import annotations

from runtime.distributed import sharing


def test_a_process_alone_gathers_what_it_has() -> None:
    with sharing() as shard:
        assert (shard.main, shard.world, shard.gather([1, 2])) == (True, 1, [1, 2])
