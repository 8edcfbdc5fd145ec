"""Images of one concept, an object or a style, for textual inversion, and image folders that hold nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

from miniature.scenery.captions import with_article
from miniature.scenery.render import as_tensor, render
from miniature.scenery.scenes import (
    ALL_KINDS,
    ALL_STYLES,
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PLACES,
    Scene,
    SceneSpec,
    allowed,
    fits,
    sample_scene,
)
from runtime.cli import BadInput, progress
from runtime.files import atomic, output_folder
from runtime.images import save_image
from runtime.seeds import derived_seed


def concept_scenes(name: str, count: int, seed: int) -> list[Scene]:
    """Return scenes of single objects that have only the concept `name` in common.

    For an object, all are in flat style. For a style, the objects differ. Colours, backgrounds, sizes and places differ.
    """
    order = Random(seed)
    kinds, colours, grounds, places = (
        order.sample(x, len(x)) for x in map(list, (KINDS, COLOURS, BACKGROUNDS, PLACES))
    )
    scenes = []
    for index in range(count):
        kind = name if name in ALL_KINDS else kinds[index % len(kinds)]
        style = name if name in ALL_STYLES else "flat"
        background, place = grounds[index % len(grounds)], places[index % len(places)]
        colour = next(c for c in colours if fits(c, background) and allowed(c, kind, "trained"))
        colours.append(colours.pop(colours.index(colour)))  # so that the other colours are used first
        spec = SceneSpec(kinds=(kind,), colours=(colour,), background=background, place=place, style=style)
        scenes.append(sample_scene(derived_seed(seed, index), spec))
    return scenes


def write_concept_pictures(folder: Path, name: str, count: int, seed: int, captions: bool) -> None:
    """Render a concept to 00.png, .. and, with `captions`, write 00.txt, ..; raise BadInput if the folder holds other files."""
    scenes, names = concept_scenes(name, count, seed), [f"{index:02d}" for index in range(count)]
    texts = [f"{stem}.txt" for stem in names] if captions else []
    write_images(folder, [f"{stem}.png" for stem in names], scenes, texts)
    for file, scene in zip(texts, scenes, strict=False):
        with atomic(folder / file) as temporary:
            temporary.write_text("\n".join(concept_captions(name, scene)) + "\n", encoding="utf-8")


def concept_captions(name: str, scene: Scene) -> list[str]:
    """Return captions of a concept's image, with {} in the place of the concept."""
    (thing,), ground = scene.things, f" on {with_article(scene.background.colour)} background"
    coloured = f"a photo of {with_article(thing.colour)}"
    if name in ALL_STYLES:
        objects = [f"{coloured} {thing.kind}{ground}", f"{with_article(thing.kind)}{ground}"]
        return [f"{x} in the style of {{}}" for x in [*objects, f"a photo of {with_article(thing.kind)}"]]
    return [f"{coloured} {{}}{ground}", f"a {{}}{ground}", f"{coloured} {{}}"]


def write_images(folder: Path, names: Sequence[str], scenes: Sequence[Scene], texts: Sequence[str] = ()) -> None:
    """Render the scenes into `folder`.

    Raise BadInput if files other than `names` and `texts` are there: they would count as images later.
    """
    foreign = sorted({path.name for path in output_folder(folder).iterdir()} - {*names, *texts})
    if foreign:
        raise BadInput(f"{folder} holds other files, such as {foreign[0]}: name another --output")
    for name, scene in progress(list(zip(names, scenes, strict=True)), "rendering", leave=False):
        save_image(folder / name, as_tensor(render(scene)[None])[0])
