"""A small world rendered by code: 64x64 images from seeds, with a caption and full knowledge of what each shows.

  python miniature/world.py list                                          the vocabulary as json
  python miniature/world.py sheet --output sheet.png                      every object in every style
  python miniature/world.py concept fish --output out/fish                five images of an object or style that no caption names
  python miniature/world.py zeroshot --count 600 --seed 1 --output DIR    val/{class_id}_{image_id}.png and id2label.json

Training images never show a held-out (colour, object) pair. They show held-out objects and styles, but no caption names them.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import repository_root  # noqa: F401  # isort: split
import tyro

from miniature.scenery.concepts import write_concept_pictures, write_images
from miniature.scenery.render import render_scenes
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
from runtime.cli import BadInput, check_not_negative, check_positive, log, run_script
from runtime.files import ROOT, check_writable_file, output_folder, write_json
from runtime.images import labelled_grid
from runtime.seeds import derived_seed

MOST_IMAGES = 100_000  # most images of a command: their scenes are in memory at once


@tyro.conf.configure(tyro.conf.subcommand(name="list"))
@dataclass(frozen=True)
class ListVocabulary:
    """Print the vocabulary as json."""


@tyro.conf.configure(tyro.conf.subcommand(name="sheet"))
@dataclass(frozen=True)
class RenderSheet:
    """Render an overview: a row per style, a column per object."""

    output: Path = ROOT / "runs" / "miniature" / "sheet.png"
    """The PNG file."""
    seed: int = 0


@tyro.conf.configure(tyro.conf.subcommand(name="concept"))
@dataclass(frozen=True)
class RenderConcept:
    """Render images of one object in flat style, or of one style with changing objects: the data of textual inversion."""

    name: Annotated[str, tyro.conf.Positional]
    """One of the held-out objects and styles (any other object or style works too)."""
    output: Path
    """Folder for 00.png, 01.png, ..; it must hold no other files."""
    count: int = 5
    """Number of images."""
    seed: int = 0
    captions: bool = False
    """Write 00.txt, 01.txt, .. as well: captions for P3_textual_inversion.py, with {} in the place of the concept."""


@tyro.conf.configure(tyro.conf.subcommand(name="zeroshot"))
@dataclass(frozen=True)
class RenderZeroshot:
    """Render images of held-out (colour, object) pairs, one object each, in the layout of the course's clip_zeroshot/."""

    output: Path
    """Folder for val/ and id2label.json."""
    count: int = 600
    """Number of images, spread evenly over the objects that captions name."""
    seed: int = 0


def _check_count(command: RenderConcept | RenderZeroshot) -> None:
    check_positive(command, "count")
    check_not_negative(command, "seed")
    if command.count > MOST_IMAGES:
        raise BadInput(f"--count {command.count}: at most {MOST_IMAGES:,}")


def list_vocabulary() -> None:
    """Print as JSON the objects and styles that captions name, all colours, and the held-out objects, styles and (colour, object) pairs."""
    vocabulary = {
        "objects": KINDS,
        "colours": list(COLOURS),
        "styles": STYLES,
        "held_out_objects": HELD_OUT_KINDS,
        "held_out_styles": HELD_OUT_STYLES,
        "held_out_pairs": HELD_OUT_PAIRS,
    }
    print(json.dumps(vocabulary, indent=2))


def render_sheet(command: RenderSheet) -> None:
    """Render every object in every style, as one labelled image."""
    check_not_negative(command, "seed")
    check_writable_file(command.output, "--output", [".png"])
    cells = [SceneSpec(kinds=(kind,), style=style) for style in ALL_STYLES for kind in ALL_KINDS]
    scenes = [sample_scene(derived_seed(command.seed, index), spec) for index, spec in enumerate(cells)]
    images = render_scenes(scenes)
    labelled_grid(command.output, images, ALL_STYLES, ALL_KINDS, "The miniature world", inch=0.75)
    log(f"sheet: {command.output}")


def render_concept(command: RenderConcept) -> None:
    """Render a concept's images; raise BadInput for a word that the world does not have."""
    words = ALL_KINDS + ALL_STYLES
    if command.name not in words:
        near = difflib.get_close_matches(command.name, words, 3, 0.5) or HELD_OUT_KINDS + HELD_OUT_STYLES
        raise BadInput(f"there is no concept {command.name!r}; try {', '.join(near)}")
    _check_count(command)
    write_concept_pictures(command.output, command.name, command.count, command.seed, command.captions)
    print(f"{command.count} images of {command.name} in {command.output}")


def render_zeroshot(command: RenderZeroshot) -> None:
    """Render val/{class_id}_{image_id}.png, and write id2label.json."""
    _check_count(command)
    classes = [index % len(KINDS) for index in range(command.count)]
    scenes = [
        sample_scene(derived_seed(command.seed, index), SceneSpec(kinds=(KINDS[label],), pairs="held_out"))
        for index, label in enumerate(classes)
    ]
    folder = output_folder(command.output)
    write_images(folder / "val", [f"{label}_{index}.png" for index, label in enumerate(classes)], scenes)
    write_json(folder / "id2label.json", {str(index): kind for index, kind in enumerate(KINDS)})
    print(f"{command.count} images of {len(set(classes))} objects in {folder}")


def main(command: RenderConcept | ListVocabulary | RenderSheet | RenderZeroshot) -> None:
    """Run the chosen subcommand."""
    if isinstance(command, RenderConcept):
        render_concept(command)
    elif isinstance(command, RenderSheet):
        render_sheet(command)
    elif isinstance(command, RenderZeroshot):
        render_zeroshot(command)
    else:
        list_vocabulary()


if __name__ == "__main__":
    command: Any = RenderConcept | ListVocabulary | RenderSheet | RenderZeroshot  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
