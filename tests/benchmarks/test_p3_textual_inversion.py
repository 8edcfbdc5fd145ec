"""Baselines that the benchmark sets for the course's grades."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import p3_composition
from benchmarks.p3_textual_inversion import Concepts, Graded, Speed, baselines_of, main, ordinary_word
from runtime.cli import BadInput


@pytest.mark.parametrize("settings", [Speed(), Concepts(), Graded(), p3_composition.Settings()])
def test_without_the_miniature_the_commands_that_make_it_are_named(
    settings: Speed | Concepts | Graded | p3_composition.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="train_clip.py convert .* miniature/train_diffusion.py assemble"):
        p3_composition.main(settings) if isinstance(settings, p3_composition.Settings) else main(settings)


def test_baselines_lie_two_deviations_from_the_ordinary_words_mean() -> None:
    rounds = [{"fish": [[60.0, 30.0], [50.0, 28.0]]}, {"fish": [[62.0, 30.0], [52.0, 26.0]]}]
    baselines, margins = baselines_of(rounds)
    assert margins["object"] == pytest.approx(
        [2 * 2**0.5, -2.0], abs=0.01
    )  # variances 2 and 2; 0 and 2, of which the mean is 1
    assert baselines["fish"] == [pytest.approx([63.83, 28.0]), pytest.approx([53.83, 25.0])]


def test_baselines_keep_concepts_and_prompts_apart() -> None:
    scores = {"key": [[1.0, 2.0]], "cup": [[3.0, 4.0], [5.0, 6.0]]}
    assert baselines_of([scores] * 2) == (scores, {"object": [0.0, 0.0]})


def test_objects_and_styles_have_margins_of_their_own() -> None:
    rounds = [{"fish": [[60.0, 30.0]], "relief": [[50.0, 20.0]]}, {"fish": [[60.0, 30.0]], "relief": [[52.0, 20.0]]}]
    baselines, margins = baselines_of(rounds)
    assert margins["object"] == [0.0, 0.0]
    assert margins["style"] == pytest.approx([2.83, 0.0], abs=0.01)
    assert baselines == {"fish": [[60.0, 30.0]], "relief": [[53.83, 20.0]]}


def test_the_ordinary_word_shares_most_with_the_concept() -> None:
    # fish: marked, wide, pointed, curved; house: the first three
    assert ordinary_word("fish") == "house"
    # relief: smooth, soft, edged; outline: smooth, edged; watercolour, which comes later: soft, edged
    assert ordinary_word("relief") == "outline"
