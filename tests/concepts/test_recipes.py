"""Recipes of textual inversion: which one a run takes, and what it decides."""

from __future__ import annotations

import json
from pathlib import Path

from concepts.recipes import RECIPES, recipe_name, recipe_values, resolve_recipe
from P3_textual_inversion import Settings, concepts_of


def test_auto_is_v1_for_a_text_encoder_of_768_only() -> None:
    assert [recipe_name("auto", width) for width in (128, 768, 1024)] == ["small", "v1", "small"]
    assert [recipe_name(name, 128) for name in ("small", "v1")] == ["small", "v1"]


def test_objects_and_styles_in_one_run_take_the_styles_recipe_and_the_objects_mirroring() -> None:
    objects, styles = RECIPES["small"]["object"], RECIPES["small"]["style"]
    assert resolve_recipe("small", {"object"}, {}) == objects
    assert resolve_recipe("small", {"style"}, {}) == styles
    both = resolve_recipe("small", {"object", "style"}, {"lr": 0.5})
    assert (both.steps, both.batch, both.flip, both.lr) == (styles.steps, styles.batch, objects.flip, 0.5)
    assert objects.flip != styles.flip


def test_the_help_shows_one_value_where_all_recipes_agree() -> None:
    assert recipe_values("max_norm") == "1.0"
    assert recipe_values("flip") == "v1 True, small object False, small style True"
    assert recipe_values("lr") == "v1 0.005, small object 0.005, small style 0.01"
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
