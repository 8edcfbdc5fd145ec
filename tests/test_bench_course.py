"""The baselines that the benchmark sets for the course's grades."""

from __future__ import annotations

import pytest

from benchmarks.p3_course import baselines_of


def test_baselines_lie_two_deviations_from_the_initial_words_mean() -> None:
    rounds = [{"fish": [[60.0, 30.0], [50.0, 28.0]]}, {"fish": [[62.0, 30.0], [52.0, 26.0]]}]
    baselines, margin = baselines_of(rounds)
    assert margin == pytest.approx([2 * 2**0.5, -2.0], abs=0.01)  # variances 2 and 2; 0 and 2, of which the mean is 1
    assert baselines["fish"] == [pytest.approx([63.83, 28.0]), pytest.approx([53.83, 25.0])]


def test_baselines_keep_concepts_and_prompts_apart() -> None:
    rounds = [{"a": [[1.0, 2.0]], "b": [[3.0, 4.0], [5.0, 6.0]]}] * 2
    assert baselines_of(rounds) == ({"a": [[1.0, 2.0]], "b": [[3.0, 4.0], [5.0, 6.0]]}, [0.0, 0.0])
