"""A small world rendered by code: 64x64 pictures, captions and the whole truth about each, from a seed.

  python miniature/world.py list                                          the vocabulary as json
  python miniature/world.py sheet --output sheet.png                      every object in every style
  python miniature/world.py concept fish --output concepts/fish           five pictures of an object or style that no caption names
  python miniature/world.py zeroshot --count 600 --seed 1 --output DIR    val/{class_id}_{image_id}.png and id2label.json

Training pictures never show a held-out (colour, object) pair; held-out objects and styles they show, but no caption names them.
"""

from __future__ import annotations

import difflib
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script lies below the packages it uses

from miniature.captions import Caption, an, caption
from miniature.scenes import (
    ALL_KINDS,
    ALL_STYLES,
    BACKGROUNDS,
    COLOURS,
    FREE,
    HELD_OUT_KINDS,
    HELD_OUT_PAIRS,
    HELD_OUT_STYLES,
    KINDS,
    PLACES,
    SIDE,
    STYLES,
    Scene,
    Wish,
    allowed,
    fits,
    sample_scene,
)
from miniature.styles import paint
from runtime.cli import BadInput, note, progress, require_not_negative, run_script
from runtime.device import len_cores
from runtime.figures import labelled_grid, save_picture
from runtime.files import atomic, output_folder, require_place, write_json
from runtime.generation import derived_seed

HERE = Path(__file__).resolve().parent
CHUNK = 500  # pictures that a process renders at a time
Images = npt.NDArray[np.uint8]


# ---------------------------------------------------------------- pictures


class Batch(NamedTuple):
    """Pictures [N,64,64,3] uint8, their captions and scenes."""

    images: Images
    captions: list[Caption]
    scenes: list[Scene]


def render(scene: Scene) -> Images:
    """[64,64,3] uint8: the same scene gives the same picture on every machine, rounding aside (one grey level)."""
    return paint(scene)


def batch(seeds: Sequence[int], wish: Wish = FREE) -> Batch:
    """One picture per seed (0 or more), with what `wish` fixes; raises ValueError where that can't be had."""
    scenes = [sample_scene(seed, wish) for seed in seeds]
    captions = [caption(scene, derived_seed(seed)) for seed, scene in zip(seeds, scenes, strict=True)]
    images = np.empty((len(scenes), SIDE, SIDE, 3), np.uint8)
    for image, scene in zip(images, scenes, strict=True):
        image[:] = render(scene)
    return Batch(images, captions, scenes)


def dataset(count: int, seed: int, wish: Wish = FREE, file: Path | None = None, processes: int | None = None) -> Batch:
    """`count` pictures, rendered by all cores: picture k depends on (seed, k) alone. 12 KiB each: in memory, or as a .npy
    `file` that the returned array maps."""
    shape = (count, SIDE, SIDE, 3)
    images = np.lib.format.open_memmap(file, "w+", np.uint8, shape) if file else np.empty(shape, np.uint8)
    captions: list[Caption] = []
    scenes: list[Scene] = []
    seeds = [derived_seed(seed, index) for index in range(count)]
    with progress(None, "rendering", total=count, unit="img", leave=False) as bar:  # type: ignore[arg-type]
        for done in stream(seeds, wish, processes):
            images[len(scenes) : len(scenes) + len(done.scenes)] = done.images
            captions += done.captions
            scenes += done.scenes
            bar.update(len(done.scenes))
    return Batch(images, captions, scenes)


def stream(seeds: Sequence[int], wish: Wish = FREE, processes: int | None = None) -> Iterator[Batch]:
    """One picture per seed, in order, at most CHUNK at a time, rendered by all cores. Forked processes start at once; where CUDA is in
    use, and off Linux, they have to be fresh ones."""
    parts = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    workers = min(processes or len_cores(), len(parts))
    if workers < 2:
        yield from (batch(part, wish) for part in parts)
        return
    start = "fork" if sys.platform == "linux" and not torch.cuda.is_initialized() else "spawn"
    with multiprocessing.get_context(start).Pool(workers) as pool:
        yield from pool.imap(partial(batch, wish=wish), parts)


def as_tensor(images: Images) -> Tensor:
    """[N,64,64,3] -> [N,3,64,64] uint8, as networks and figures want it."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def vocabulary() -> dict[str, Any]:
    """All words, and what training never shows together."""
    return {
        "objects": list(KINDS),
        "colours": list(COLOURS),
        "styles": list(STYLES),
        "held_out_objects": list(HELD_OUT_KINDS),
        "held_out_styles": list(HELD_OUT_STYLES),
        "held_out_pairs": [list(pair) for pair in HELD_OUT_PAIRS],
    }


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
        wish = Wish(kinds=(kind,), colours=(colour,), background=background, place=places[index % len(places)])
        wish = replace(wish, style=name if name in ALL_STYLES else "flat")
        scenes.append(sample_scene(derived_seed(seed, index), wish))
    return scenes


# ---------------------------------------------------------------- the commands


@dataclass(frozen=True)
class Concept:
    """Pictures of one object or style, in flat style or of changing objects: what textual inversion learns from."""

    name: Annotated[str, tyro.conf.Positional]
    """One of the held-out objects and styles (any other object or style works too)."""
    output: Path
    """Folder for 00.png, 01.png, ..; it must hold no other pictures."""
    count: int = 5
    seed: int = 0
    told: bool = False
    """Also writes 00.txt, 01.txt, ..: sentences that tell what else a picture shows, {} for the concept, for P3_textual_inversion.py."""


@dataclass(frozen=True)
class List:
    """The vocabulary as json on stdout."""


@dataclass(frozen=True)
class Sheet:
    """An overview picture: a row per style, a column per object."""

    output: Path = HERE.parent / "runs" / "miniature" / "sheet.png"
    seed: int = 0


@dataclass(frozen=True)
class Zeroshot:
    """Pictures of held-out (colour, object) pairs, one object each, in the layout of clip_zeroshot/."""

    output: Path
    """Folder for val/ and id2label.json."""
    count: int = 600
    """Pictures, spread evenly over the named objects."""
    seed: int = 0


def main(command: Concept | List | Sheet | Zeroshot) -> None:
    """Runs the chosen command; raises BadInput."""
    if isinstance(command, Concept):
        write_concept(command)
    elif isinstance(command, Sheet):
        draw_sheet(command)
    elif isinstance(command, Zeroshot):
        write_zeroshot(command)
    else:
        print(json.dumps(vocabulary(), indent=2))


def write_concept(command: Concept) -> None:
    """Five pictures, unless told otherwise."""
    known = ALL_KINDS + ALL_STYLES
    if command.name not in known:
        near = difflib.get_close_matches(command.name, known, 3, 0.5) or HELD_OUT_KINDS + HELD_OUT_STYLES
        raise BadInput(f"there is no concept {command.name!r}; try {', '.join(near)}")
    check_numbers(command)
    write_concept_pictures(command.output, command.name, command.count, command.seed, command.told)
    print(f"{command.count} pictures of {command.name} in {command.output}")


def write_concept_pictures(folder: Path, name: str, count: int, seed: int, told: bool) -> None:
    """00.png, .. and, where they are `told`, 00.txt, ..; raises BadInput where the folder holds other files."""
    scenes, names = concept_scenes(name, count, seed), [f"{index:02d}" for index in range(count)]
    texts = (
        {f"{stem}.txt": sentences_about(name, scene) for stem, scene in zip(names, scenes, strict=True)} if told else {}
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


def draw_sheet(command: Sheet) -> None:
    """Every object in every style."""
    require_place(command.output, "--output")
    cells = [(style, kind) for style in ALL_STYLES for kind in ALL_KINDS]
    seeds = [derived_seed(command.seed, index) for index in range(len(cells))]
    scenes = [
        sample_scene(seed, Wish(kinds=(kind,), style=style)) for seed, (style, kind) in zip(seeds, cells, strict=True)
    ]
    images = as_tensor(np.stack([render(scene) for scene in scenes]))
    labelled_grid(command.output, images, ALL_STYLES, ALL_KINDS, "The miniature world", inch=0.75)
    note(f"sheet: {command.output}")


def write_zeroshot(command: Zeroshot) -> None:
    """val/{class_id}_{image_id}.png and id2label.json."""
    check_numbers(command)
    classes = [index % len(KINDS) for index in range(command.count)]
    scenes = [
        sample_scene(derived_seed(command.seed, index), Wish(kinds=(KINDS[label],), pairs="held_out"))
        for index, label in enumerate(classes)
    ]
    folder = output_folder(command.output)
    write_pictures(folder / "val", [f"{label}_{index}.png" for index, label in enumerate(classes)], scenes)
    write_json(folder / "id2label.json", {str(index): kind for index, kind in enumerate(KINDS)})
    print(f"{command.count} pictures of {len(set(classes))} objects in {folder}")


def check_numbers(command: Concept | Zeroshot) -> None:
    """Raises BadInput for counts that ask for nothing and seeds below zero."""
    if command.count < 1:
        raise BadInput(f"--count {command.count}: no pictures asked for")
    require_not_negative(command, "seed")


def write_pictures(folder: Path, names: Sequence[str], scenes: Sequence[Scene], beside: tuple[str, ...] = ()) -> None:
    """Renders and saves; raises BadInput where the folder holds files of something else, which its readers would take in; those named
    `beside` may be there."""
    foreign = sorted({path.name for path in output_folder(folder).iterdir()} - {*names, *beside})
    if foreign:
        raise BadInput(f"{folder} holds other files, such as {foreign[0]}: name another --output")
    for name, scene in progress(list(zip(names, scenes, strict=True)), "rendering", leave=False):
        save_picture(folder / name, as_tensor(render(scene)[None])[0])


if __name__ == "__main__":
    command: Any = Concept | List | Sheet | Zeroshot  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
