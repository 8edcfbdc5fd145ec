"""The best candidates of a training: a folder that keeps the highest scores, and of equal scores the later step."""

from __future__ import annotations

from pathlib import Path

from training.best import BestCandidates


def offer(candidates: BestCandidates, *scores: float) -> list[bool]:
    """Offer one file per score, at steps 1, 2, ..; return which were the best so far."""
    return [candidates.offer(step, score, lambda path: path.touch()) for step, score in enumerate(scores, start=1)]


def test_the_folder_keeps_the_highest_scores_best_first(tmp_path: Path) -> None:
    candidates = BestCandidates(tmp_path, 2)
    assert offer(candidates, 0.5, 0.9, 0.7, 0.6) == [True, True, False, False]
    assert [path.name for path in candidates.ranked()] == ["000002_0.900000.safetensors", "000003_0.700000.safetensors"]
    assert len(list(tmp_path.iterdir())) == 2


def test_of_equal_scores_the_later_step_is_the_best(tmp_path: Path) -> None:
    candidates = BestCandidates(tmp_path, 1)
    assert offer(candidates, 0.5, 0.5) == [True, True]
    assert [path.name for path in candidates.ranked()] == ["000002_0.500000.safetensors"]


def test_weights_outside_the_best_are_not_saved(tmp_path: Path) -> None:
    candidates = BestCandidates(tmp_path, 1)
    saves: list[Path] = []
    candidates.offer(1, 0.9, lambda path: path.touch())
    assert not candidates.offer(2, 0.1, saves.append)
    assert not saves


def test_clear_deletes_the_candidates_of_an_earlier_run(tmp_path: Path) -> None:
    candidates = BestCandidates(tmp_path, 2)
    offer(candidates, 0.5, 0.9)
    candidates.clear()
    assert not list(tmp_path.iterdir())
