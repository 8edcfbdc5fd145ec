"""Recipes of textual inversion: which one a run takes, and what it decides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from concepts.recipes import RECIPES, recipe_name, recipe_values, resolve_recipe
from P3_textual_inversion import Settings, concepts_of, recipe_of
from runtime.cli import BadInput


def test_auto_is_v1_for_a_text_encoder_of_768_only() -> None:
    assert [recipe_name("auto", width) for width in (128, 768, 1024)] == ["small", "v1", "small"]
    assert [recipe_name(name, 128) for name in ("small", "v1")] == ["small", "v1"]


def test_objects_and_styles_in_one_run_take_the_styles_recipe_and_the_objects_smaller_views() -> None:
    objects, styles = RECIPES["small"]["object"], RECIPES["small"]["style"]
    assert resolve_recipe("small", {"object"}, {}) == objects
    assert resolve_recipe("small", {"style"}, {}) == styles
    both = resolve_recipe("small", {"object", "style"}, {"lr": 0.5})
    assert (both.steps, both.batch, both.zoom_out, both.lr) == (styles.steps, styles.batch, objects.zoom_out, 0.5)


def test_the_help_shows_one_value_where_all_recipes_agree() -> None:
    assert recipe_values("flip") == "True"
    assert recipe_values("max_norm") == "v1 1.0, small object 0.0, small style 1.0"
    assert recipe_values("lr") == "v1 0.005, small 0.01"
    assert recipe_values("steps").startswith("v1 500, small object ")


def test_concepts_of_a_file_have_their_kinds_number_of_vectors_unless_it_says_another(tmp_path: Path) -> None:
    entries = [
        {"token": "<a>", "images": "a", "init": "star"},
        {"token": "<b>", "images": "b", "init": "star", "kind": "style"},
        {"token": "<c>", "images": "c", "init": "star", "kind": "style", "vectors": 1},
    ]
    (tmp_path / "concepts.json").write_text(json.dumps(entries))
    concepts = concepts_of(Settings("model", concepts=tmp_path / "concepts.json"), "small")
    assert [concept.vectors for concept in concepts] == [1, RECIPES["small"]["style"].vectors, 1]
    assert RECIPES["small"]["style"].vectors == 2


def test_random_crops_switch_the_recipes_smaller_views_off_but_not_the_flags(tmp_path: Path) -> None:
    flags = Settings("model", images=tmp_path, init="star", crop="random")
    assert recipe_of(flags, "small", concepts_of(flags, "small")).zoom_out == 0
    flags = Settings("model", images=tmp_path, init="star", crop="random", zoom_out=0.5)
    with pytest.raises(BadInput, match="--zoom-out 0.5: goes with --crop center"):
        recipe_of(flags, "small", concepts_of(flags, "small"))
