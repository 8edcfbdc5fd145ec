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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import repository_root  # noqa: F401  # isort: split
import tyro

from miniature.scenery.concepts import write_concept_pictures, write_pictures
from miniature.scenery.render import as_tensor, render
from miniature.scenery.scenes import (
    ALL_KINDS,
    ALL_STYLES,
    COLOURS,
    HELD_OUT_KINDS,
    HELD_OUT_PAIRS,
    HELD_OUT_STYLES,
    KINDS,
    STYLES,
    SceneSpec,
    sample_scene,
)
from runtime.cli import BadInput, check_not_negative, log, run_script
from runtime.files import ROOT, check_writable_file, output_folder, write_json
from runtime.images import labelled_grid
from runtime.seeds import derived_seed

# ---------------------------------------------------------------- pictures


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
    captions: bool = False
    """Also writes 00.txt, 01.txt, ..: sentences that tell what else a picture shows, {} for the concept, for P3_textual_inversion.py."""


@dataclass(frozen=True)
class List:
    """The vocabulary as json on stdout."""


@dataclass(frozen=True)
class Sheet:
    """An overview picture: a row per style, a column per object."""

    output: Path = ROOT / "runs" / "miniature" / "sheet.png"
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
    write_concept_pictures(command.output, command.name, command.count, command.seed, command.captions)
    print(f"{command.count} pictures of {command.name} in {command.output}")


def draw_sheet(command: Sheet) -> None:
    """Every object in every style."""
    check_writable_file(command.output, "--output")
    cells = [(style, kind) for style in ALL_STYLES for kind in ALL_KINDS]
    seeds = [derived_seed(command.seed, index) for index in range(len(cells))]
    scenes = [
        sample_scene(seed, SceneSpec(kinds=(kind,), style=style))
        for seed, (style, kind) in zip(seeds, cells, strict=True)
    ]
    images = as_tensor(np.stack([render(scene) for scene in scenes]))
    labelled_grid(command.output, images, ALL_STYLES, ALL_KINDS, "The miniature world", inch=0.75)
    log(f"sheet: {command.output}")


def write_zeroshot(command: Zeroshot) -> None:
    """val/{class_id}_{image_id}.png and id2label.json."""
    check_numbers(command)
    classes = [index % len(KINDS) for index in range(command.count)]
    scenes = [
        sample_scene(derived_seed(command.seed, index), SceneSpec(kinds=(KINDS[label],), pairs="held_out"))
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
    check_not_negative(command, "seed")


if __name__ == "__main__":
    command: Any = Concept | List | Sheet | Zeroshot  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
