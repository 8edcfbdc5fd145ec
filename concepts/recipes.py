"""The recipes of textual inversion: training settings for each kind of concept, on Stable Diffusion v1 and on small models."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

from concepts.dataset import Kind
from concepts.single_file import TEXT

RecipeName = Literal["auto", "small", "v1"]
V1_WIDTH: int = TEXT["hidden_size"]


@dataclass(frozen=True)
class InversionRecipe:
    """The settings that a recipe holds. A flag of the same name has priority."""

    steps: int = 500
    batch: int = 8  # images of every concept per step
    vectors: int = 1
    lr: float = 5e-3
    max_norm: float = 1.0
    max_loss_weight: float = 1.0
    flip: bool = True
    embedding_noise: float = 0.0


RECIPES: dict[str, dict[Kind, InversionRecipe]] = {
    # the learning rate of Gal et al. 2022; no weights of this size were at hand to measure it
    "v1": {"object": InversionRecipe(), "style": InversionRecipe()},
    # measured on the miniature, the small model of miniature/
    "small": {
        "object": InversionRecipe(steps=60, flip=False),
        "style": InversionRecipe(steps=800, batch=24, vectors=2, lr=1e-2, max_loss_weight=30.0, embedding_noise=1.0),
    },
}


def recipe_name(name: RecipeName, text_width: int) -> str:
    """Return `name`; for auto, v1 if the text encoder is as wide as Stable Diffusion v1's, else small."""
    return ("v1" if text_width == V1_WIDTH else "small") if name == "auto" else name


def resolve_recipe(name: str, kinds: Collection[Kind], flags: dict[str, Any]) -> InversionRecipe:
    """Return the recipe of a run that learns concepts of these kinds, overridden by `flags`.

    A run with both kinds takes the style's recipe, which is the longer one, but the object's `flip`.
    """
    recipes = RECIPES[name]
    recipe = recipes["style" if "style" in kinds else "object"]
    if "object" in kinds:
        recipe = replace(recipe, flip=recipes["object"].flip)
    return replace(recipe, **flags)


def recipe_values(field: str) -> str:
    """Return a field's value in every recipe, for --help: "v1 500, small object 60, small style 800"."""
    values: dict[str, Any] = {}
    for name, recipes in RECIPES.items():
        by_kind = {kind: getattr(recipe, field) for kind, recipe in recipes.items()}
        same = len(set(by_kind.values())) == 1
        values |= {name: by_kind["object"]} if same else {f"{name} {kind}": value for kind, value in by_kind.items()}
    if len(set(values.values())) == 1:
        return str(values["v1"])
    return ", ".join(f"{who} {value}" for who, value in values.items())
