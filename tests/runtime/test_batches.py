"""Batches of one shape, halved when memory runs out."""

from __future__ import annotations

import pytest
import torch

from runtime.batches import even_batch, in_batches
from runtime.cli import BadInput


def test_last_batch_is_padded_with_its_last_item_for_the_work_alone() -> None:
    assert list(in_batches("".join, "abcde", 3)) == [(["a", "b", "c"], "abc"), (["d", "e"], "dee")]


@pytest.mark.parametrize(("items", "batches"), [("ab", [(["a", "b"], "ab")]), ("", [])])
def test_full_batches_and_no_items_need_no_padding(items: str, batches: list[object]) -> None:
    assert list(in_batches("".join, items, 2)) == batches


class SmallMemory:
    """Work that fits in memory only `most` at once, and fails as the given device does."""

    def __init__(self, most: int, error: Exception):
        self.most, self.error = most, error
        self.sizes: list[int] = []

    def __call__(self, items: list[str]) -> str:
        self.sizes.append(len(items))
        if len(items) > self.most:
            raise self.error
        return "".join(items)


CPU_ALLOCATOR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried .."
)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), CPU_ALLOCATOR])
def test_a_batch_is_halved_when_memory_runs_out_and_nothing_is_done_twice(error: Exception) -> None:
    work = SmallMemory(3, error)
    assert [items for items, _ in in_batches(work, "abcdefgh", 8)] == [list("ab"), list("cd"), list("ef"), list("gh")]
    assert work.sizes == [8, 4, 2, 2, 2, 2]


def test_one_item_that_does_not_fit_is_bad_input() -> None:
    with pytest.raises(BadInput, match="out of memory"):
        list(in_batches(SmallMemory(0, MemoryError()), "ab", 2))


def test_other_errors_of_the_work_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches(SmallMemory(0, RuntimeError("shapes differ")), "ab", 2))


@pytest.mark.parametrize(("count", "most", "batch"), [(10, 4, 4), (10, 8, 5), (8, 4, 4), (1, 10**9, 1), (5, 1, 1)])
def test_even_batch_spreads_the_items_over_as_few_calls(count: int, most: int, batch: int) -> None:
    assert even_batch(count, most) == batch
