"""Images of one object or style for textual inversion, and image folders that hold nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from miniature.scenery.captions import an
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
    """Single objects that share nothing but the object (all in flat style) or the style (each another object): colours, backgrounds,
    sizes and places differ."""
    order = Random(seed)
    kinds, colours, grounds, places = (
        order.sample(x, len(x)) for x in map(list, (KINDS, COLOURS, BACKGROUNDS, PLACES))
    )
    scenes = []
    for index in range(count):
        kind = name if name in ALL_KINDS else kinds[index % len(kinds)]
        background = grounds[index % len(grounds)]
        colour = next(c for c in colours if fits(c, background) and allowed(c, kind, "trained"))
        colours.append(colours.pop(colours.index(colour)))  # the others are due first
        wish = SceneSpec(kinds=(kind,), colours=(colour,), background=background, place=places[index % len(places)])
        wish = replace(wish, style=name if name in ALL_STYLES else "flat")
        scenes.append(sample_scene(derived_seed(seed, index), wish))
    return scenes


def write_concept_pictures(folder: Path, name: str, count: int, seed: int, captions: bool) -> None:
    """00.png, .. and, with `captions`, 00.txt, ..; raises BadInput where the folder holds other files."""
    scenes, names = concept_scenes(name, count, seed), [f"{index:02d}" for index in range(count)]
    texts = (
        {f"{stem}.txt": sentences_about(name, scene) for stem, scene in zip(names, scenes, strict=True)}
        if captions
        else {}
    )
    write_pictures(folder, [f"{stem}.png" for stem in names], scenes, tuple(texts))
    for file, lines in texts.items():
        with atomic(folder / file) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def sentences_about(name: str, scene: Scene) -> list[str]:
    """What a concept's picture shows, {} for the concept."""
    (thing,), ground = scene.things, f" on {an(scene.background.colour)} background"
    if name in ALL_STYLES:
        what = [
            f"a photo of {an(thing.colour)} {thing.kind}{ground}",
            f"{an(thing.kind)}{ground}",
            f"a photo of {an(thing.kind)}",
        ]
        return [f"{words} in the style of {{}}" for words in what]
    return [f"a photo of {an(thing.colour)} {{}}{ground}", f"a {{}}{ground}", f"a photo of {an(thing.colour)} {{}}"]


def write_pictures(folder: Path, names: Sequence[str], scenes: Sequence[Scene], beside: tuple[str, ...] = ()) -> None:
    """Renders and saves; raises BadInput where the folder holds files of something else, which its readers would take in; those named
    `beside` may be there."""
    foreign = sorted({path.name for path in output_folder(folder).iterdir()} - {*names, *beside})
    if foreign:
        raise BadInput(f"{folder} holds other files, such as {foreign[0]}: name another --output")
    for name, scene in progress(list(zip(names, scenes, strict=True)), "rendering", leave=False):
        save_image(folder / name, as_tensor(render(scene)[None])[0])
