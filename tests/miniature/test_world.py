"""The rendered world: what a seed gives, what is held out, what captions say, and the commands."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from miniature.scenery.captions import ALONE, STYLE_TRAITS, TRAITS, caption
from miniature.scenery.concepts import concept_scenes
from miniature.scenery.render import dataset, render, render_batch
from miniature.scenery.scenes import (
    ALL_KINDS,
    ALL_STYLES,
    BACKGROUNDS,
    COLOURS,
    GROUNDS,
    HELD_OUT_KINDS,
    HELD_OUT_PAIRS,
    HELD_OUT_STYLES,
    KINDS,
    PLACES,
    STYLES,
    Background,
    Scene,
    SceneSpec,
    sample_scene,
)
from miniature.scenery.shapes import sprite
from miniature.world import ListVocabulary, RenderConcept, RenderSheet, RenderZeroshot, main
from runtime.cli import BadInput
from runtime.files import ROOT
from runtime.seeds import derived_seed

SEEDS = range(3000)
GOLDEN_SCENE = ([("moon", "white", (14, 25, 46, 57), 0)], "green", "gradient", "mosaic", 1616176219)
GOLDEN_FIELDS = [
    [116.2, 100.6, 95.5, 86.9],
    [109.7, 118.1, 105.2, 78.5],
    [108.6, 102.1, 159.9, 73.5],
    [95.5, 125.0, 104.8, 68.9],
]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(seed) for seed in SEEDS]


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


# ---------------------------------------------------------------- scenes


def test_a_seed_gives_this_scene_for_ever() -> None:
    """A picture's seed is its name: what it means must not change with the libraries."""
    scene = sample_scene(2024)
    found = [(thing.kind, thing.colour, thing.box, thing.angle) for thing in scene.things]
    assert (found, scene.background.colour, scene.background.ground, scene.style, scene.noise_seed) == GOLDEN_SCENE


def test_every_word_occurs_and_all_objects_equally_often(scenes: list[Scene]) -> None:
    things = [thing for scene in scenes for thing in scene.things]
    counts = np.array([sum(thing.kind == kind for thing in things) for kind in ALL_KINDS])
    assert counts.min() > 0.75 * counts.mean()
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {thing.place for thing in things} == set(PLACES)
    assert {scene.style for scene in scenes} == set(ALL_STYLES)
    assert {scene.background.colour for scene in scenes} == set(BACKGROUNDS)
    assert {scene.background.ground for scene in scenes} == set(GROUNDS)
    assert {len(scene.things) for scene in scenes} == {1, 2, 3}


def test_held_out_pairs_never_occur_unless_asked_for(scenes: list[Scene]) -> None:
    assert not {(thing.colour, thing.kind) for scene in scenes for thing in scene.things} & set(HELD_OUT_PAIRS)
    drawn = [sample_scene(seed, SceneSpec(count=1, pairs="held_out", among=KINDS)) for seed in range(300)]
    assert {(thing.colour, thing.kind) for scene in drawn for thing in scene.things} == set(HELD_OUT_PAIRS)
    red = [sample_scene(seed, SceneSpec(colours=("red",))).things[0].kind for seed in range(300)]
    assert set(red) == set(ALL_KINDS) - {kind for colour, kind in HELD_OUT_PAIRS if colour == "red"}


def test_every_named_object_lacks_exactly_one_colour_and_every_colour_some_object() -> None:
    assert sorted(kind for _, kind in HELD_OUT_PAIRS) == sorted(KINDS)
    assert {colour for colour, _ in HELD_OUT_PAIRS} == set(COLOURS)


def test_objects_lie_apart_within_the_picture_in_even_squares(scenes: list[Scene]) -> None:
    for scene in scenes:
        for thing in scene.things:
            left, top, right, bottom = thing.box
            assert 0 < left < right < 64
            assert 0 < top < bottom < 64
            assert right - left == bottom - top >= 18
        for a, b in itertools.combinations(scene.things, 2):
            assert min(a.box[2], b.box[2]) <= max(a.box[0], b.box[0]) or min(a.box[3], b.box[3]) <= max(
                a.box[1], b.box[1]
            )
            assert a.kind != b.kind
            assert a.colour != b.colour


def test_objects_never_have_the_colour_of_the_background(scenes: list[Scene]) -> None:
    assert all(thing.colour != scene.background.colour for scene in scenes for thing in scene.things)


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_was_asked_for_is_where_the_object_lies(place: str) -> None:
    for seed in range(100):
        thing = sample_scene(seed, SceneSpec(place=place)).things[0]
        assert thing.place == place
        box = thing.box
        right, down = (box[0] + box[2]) / 2 - 32, (box[1] + box[3]) / 2 - 32
        assert {"left": -right, "right": right, "above": -down, "below": down, "centre": 8}[place] >= 8


def test_what_is_fixed_is_kept_and_the_rest_varies() -> None:
    spec = SceneSpec(
        kinds=("fish", "star"), colours=("red", "blue"), boxes=((2, 4, 30, 40), (34, 20, 62, 50)),
        style="ripple", background="white", ground="gradient",
    )  # fmt: skip
    drawn = [sample_scene(seed, spec) for seed in range(20)]
    for scene in drawn:
        assert [(t.kind, t.colour, t.box) for t in scene.things] == [
            ("fish", "red", (2, 8, 30, 36)), ("star", "blue", (34, 21, 62, 49)),
        ]  # fmt: skip
        assert (scene.style, scene.background.colour, scene.background.ground) == ("ripple", "white", "gradient")
    assert len({scene.noise_seed for scene in drawn}) > 10
    assert len({scene.things[0].tint for scene in drawn}) > 10


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"kinds": ("dog",)}, "dog is not one of"),
        ({"colours": ("black",)}, "black is not one of"),
        ({"style": "oil"}, "oil is not one of"),
        ({"kinds": ("star", "ring"), "colours": ("red",)}, "agree in length"),
        ({"count": 4}, "one to three"),
        ({"colours": ("red",), "background": "red"}, "can't be seen"),
        ({"boxes": ((-2, 0, 20, 20),)}, "must lie within"),
        ({"boxes": ((0, 0, 6, 30),)}, "12 pixels"),
        ({"count": 2, "place": "left"}, "single object"),
    ],
)
def test_impossible_specs_are_refused(spec: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SceneSpec(**spec)


def test_a_spec_without_any_colour_left_is_refused() -> None:
    with pytest.raises(ValueError, match="no held_out colours are left for fish"):
        sample_scene(0, SceneSpec(kinds=("fish",), pairs="held_out"))


# ---------------------------------------------------------------- pictures


def test_the_same_scene_gives_the_same_picture_in_another_process() -> None:
    code = (
        "import sys; from miniature.scenery.scenes import sample_scene; from miniature.scenery.styles import render\n"
        "for seed in range(40): sys.stdout.buffer.write(render(sample_scene(seed)).tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout == render_batch(range(40)).images.tobytes()


def test_a_picture_is_as_it_always_was() -> None:
    """The means of 4x4 fields of one picture; other machines may round a grey level differently, no more."""
    fields = render(sample_scene(2024)).reshape(4, 16, 4, 16, 3).mean((1, 3, 4))
    np.testing.assert_allclose(fields, GOLDEN_FIELDS, atol=1)


@pytest.mark.parametrize("style", ALL_STYLES)
def test_an_object_is_painted_in_its_box_and_nowhere_else(style: str) -> None:
    """Contours, shadows and waves reach a few pixels beyond."""
    for seed in range(40):
        scene = sample_scene(seed, SceneSpec(style=style))
        changed = np.any(render(scene) != render(replace(scene, things=())), axis=2)
        allowed = np.zeros((64, 64), bool)
        for left, top, right, bottom in (thing.box for thing in scene.things):
            assert changed[top:bottom, left:right].mean() > 0.15
            allowed[max(0, top - 5) : bottom + 5, max(0, left - 5) : right + 5] = True
        assert not (changed & ~allowed).any()


@pytest.mark.parametrize("style", ALL_STYLES)
def test_an_object_keeps_its_colour_in_every_style(style: str) -> None:
    """Of all colour names, the object's own is nearest to the mean of its pixels, by direction from grey (white: by lightness)."""
    for seed in range(60):
        scene = sample_scene(seed, SceneSpec(kinds=("square",), style=style, pairs="any"))
        left, top, right, bottom = scene.things[0].box
        seen = render(scene)[top + 6 : bottom - 6, left + 6 : right - 6].reshape(-1, 3).mean(0)
        shades = {name: np.outer(np.linspace(0.55, 1, 10), rgb) for name, rgb in COLOURS.items()}
        nearest = min(shades, key=lambda name: np.abs(shades[name] - seen).sum(1).min())
        assert nearest == scene.things[0].colour, (seed, seen)


def test_outlines_differ() -> None:
    """No two objects share four fifths of their area."""
    areas = {kind: sprite(kind, 44, 0, False).alpha for kind in ALL_KINDS}
    for a, b in itertools.combinations(ALL_KINDS, 2):
        shared = np.minimum(areas[a], areas[b]).sum() / np.maximum(areas[a], areas[b]).sum()
        assert shared < 0.8, (a, b, shared)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_an_outline_fills_its_box(kind: str) -> None:
    """In at least one direction, without leaving it."""
    for angle in (0, -8, 8):
        rows, columns = np.nonzero(sprite(kind, 40, angle, False).alpha > 0.5)
        assert min(rows.min(), columns.min()) >= 5  # the margin is 6
        assert max(rows.max(), columns.max()) <= 46
        assert max(np.ptp(rows), np.ptp(columns)) >= 0.8 * 40


def test_styles_differ_on_one_scene() -> None:
    scene = sample_scene(5, SceneSpec(count=2, ground="plain"))
    images = [render(replace(scene, style=style)).astype(int) for style in ALL_STYLES]
    assert all(abs(a - b).mean() > 1.5 for a, b in itertools.combinations(images, 2))


def test_grounds_differ_and_stay_near_their_colour() -> None:
    for colour, rgb in BACKGROUNDS.items():
        images = [render(Scene((), Background(colour, ground), noise_seed=3)) for ground in GROUNDS]
        assert images[0].std((0, 1)).max() == 0
        assert all(image.std((0, 1)).max() > 5 for image in images[1:])
        assert all(np.abs(image.mean((0, 1)) - rgb).max() < 30 for image in images)


# ---------------------------------------------------------------- captions


def test_captions_name_nothing_that_is_held_out(scenes: list[Scene]) -> None:
    words = {word.strip(",:") for seed, scene in enumerate(scenes) for word in caption(scene, seed).text.split()}
    assert not words & {*HELD_OUT_KINDS, *HELD_OUT_STYLES}
    assert words >= {*KINDS, *STYLES, *COLOURS, *BACKGROUNDS, *GROUNDS, *TRAITS, *STYLE_TRAITS, "object", "unusual"}


@pytest.mark.parametrize(
    ("traits", "named", "held_out"), [(TRAITS, KINDS, HELD_OUT_KINDS), (STYLE_TRAITS, STYLES, HELD_OUT_STYLES)]
)
def test_no_describing_word_singles_out_what_is_held_out_but_two_do(
    traits: dict[str, tuple[str, ...]], named: tuple[str, ...], held_out: tuple[str, ...]
) -> None:
    for holders in traits.values():
        assert set(holders) <= {*named, *held_out}
        assert not set(holders) <= set(held_out)
    for name in held_out:
        words = [set(holders) for holders in traits.values() if name in holders]
        assert any(first & second == {name} for first, second in itertools.combinations(words, 2))


def test_captions_say_what_they_claim_to_name(scenes: list[Scene]) -> None:
    for seed, scene in enumerate(scenes):
        found = caption(scene, seed)
        words = found.text.replace(",", " ").split()
        for index, thing in enumerate(scene.things):
            assert (f"kind{index}" in found.named) == (thing.kind in words)
            if f"colour{index}" in found.named:
                assert thing.colour in words
            for word, holders in TRAITS.items():
                assert f"{word}{index}" not in found.named or (word in words and thing.kind in holders)
        back = f"{scene.background.colour} "
        assert ("background" in found.named) == ("background" in found.text or "backdrop" in found.text)
        assert "background" not in found.named or back in found.text.split(" on ")[-1]
        assert ("style" in found.named) == (scene.style in words)
        for word, holders in STYLE_TRAITS.items():
            assert (word in found.named) == (word in words)
            assert word not in words or scene.style in holders


def test_one_scene_has_many_wordings() -> None:
    scene = sample_scene(1, SceneSpec(count=2))
    assert len({caption(scene, seed).text for seed in range(200)}) > 100


def test_captions_of_placed_pairs_have_the_right_order() -> None:
    spec = SceneSpec(kinds=("star", "ring"), boxes=((2, 20, 26, 44), (36, 20, 60, 44)))
    seen = 0
    for seed in range(300):
        text = caption(sample_scene(seed, spec), seed).text
        for word, first in (("to the left of", "star"), ("to the right of", "ring"), (" left of", "star")):
            if word in text and "object" not in text and "thing" not in text:
                assert first in text.split(word)[0]
                seen += 1
    assert seen > 30


@pytest.mark.parametrize("place", PLACES)
def test_a_single_objects_caption_names_its_own_place_or_none(place: str) -> None:
    named = 0
    for seed in range(150):
        words = caption(sample_scene(seed, SceneSpec(place=place)), seed)
        places = {name for name, wordings in ALONE.items() if any(f" {wording}" in words.text for wording in wordings)}
        assert places == ({place} if "place" in words.named else set()), words.text
        named += bool(places)
    assert 50 < named < 100


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_the_caption_of_a_placed_pair_is_true(column: bool, first: int) -> None:
    """Whichever of the two the scene lists first: `first` is left of the other, or above it."""
    boxes = ((20, 2, 44, 26), (20, 36, 44, 60)) if column else ((2, 20, 26, 44), (36, 20, 60, 44))
    kinds = ("star", "ring")
    spec = SceneSpec(kinds=kinds, boxes=boxes if first == 0 else boxes[::-1])
    ordered, other = kinds[first], kinds[1 - first]
    wordings = {
        False: {
            " to the left of ": ordered,
            " to the right of ": other,
            " on the left and ": ordered,
            " left of ": ordered,
        },
        True: {" above ": ordered, " below ": other, " at the top and ": ordered, " over ": ordered},
    }
    seen = set()
    for seed in range(400):
        words = caption(sample_scene(seed, spec), seed)
        if {"kind0", "kind1"} <= words.named:
            for wording, name in wordings[column].items():
                if wording in words.text:
                    assert name in words.text.split(wording)[0], words.text
                    seen.add(wording)
            assert not any(wording in words.text for wording in wordings[not column])
    assert seen == set(wordings[column])


@pytest.mark.parametrize("column", [False, True])
def test_the_caption_of_three_in_a_row_is_true(column: bool) -> None:
    starts = ((2, 24), (24, 24), (44, 24))
    boxes = tuple((y, x, y + 18, x + 18) if column else (x, y, x + 18, y + 18) for x, y in starts)
    spec = SceneSpec(kinds=("star", "ring", "moon"), boxes=(boxes[2], boxes[0], boxes[1]))  # ring, moon, star
    ends = ("from top to bottom", "in a column") if column else ("from left to right", "in a row")
    seen = set()
    for seed in range(600):
        words = caption(sample_scene(seed, spec), seed)
        if {"kind0", "kind1", "kind2"} <= words.named:
            order = re.findall(r"\b(star|ring|moon)\b", words.text)
            for end in ends:
                if end in words.text:
                    assert order == ["ring", "moon", "star"], words.text
                    seen.add(end)
            if " between " in words.text:
                assert order[0] == "moon", words.text
    assert seen == set(ends)


# ---------------------------------------------------------------- batches


def test_a_data_set_depends_on_neither_processes_nor_its_size() -> None:
    whole = dataset(1030, seed=3, processes=2)
    part = dataset(20, seed=3, processes=1)
    assert (part.images == whole.images[:20]).all()
    assert part.captions == whole.captions[:20]
    assert part.scenes == whole.scenes[:20]
    assert (whole.images[1029] == render_batch([derived_seed(3, 1029)]).images[0]).all()
    assert whole.images.shape == (1030, 64, 64, 3)


# ---------------------------------------------------------------- the commands


def test_the_list_has_exactly_these_keys(capsys: pytest.CaptureFixture[str]) -> None:
    main(ListVocabulary())
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"objects", "colours", "styles", "held_out_objects", "held_out_styles", "held_out_pairs"}
    assert (len(found["held_out_objects"]), len(found["held_out_styles"])) == (4, 2)
    assert not set(found["objects"]) & set(found["held_out_objects"])


@pytest.mark.parametrize("name", [*HELD_OUT_KINDS, *HELD_OUT_STYLES])
def test_a_concept_is_all_that_its_pictures_share(name: str, tmp_path: Path) -> None:
    main(RenderConcept(name, tmp_path / "out"))
    assert list(pictures(tmp_path / "out")) == [f"{index:02d}.png" for index in range(5)]
    assert all(image.shape == (64, 64, 3) for image in pictures(tmp_path / "out").values())
    drawn = concept_scenes(name, 5, seed=0)
    shared = "kind" if name in HELD_OUT_KINDS else "style"
    assert len({scene.things[0].kind for scene in drawn}) == (1 if shared == "kind" else 5)
    assert {scene.style for scene in drawn} == ({"flat"} if shared == "kind" else {name})
    assert len({scene.things[0].colour for scene in drawn}) >= 4
    assert len({scene.background.colour for scene in drawn}) == 5
    assert {scene.things[0].place for scene in drawn} == set(PLACES)


@pytest.mark.parametrize("name", ["key", "relief"])
def test_sentences_in_a_concepts_folder_name_what_else_the_pictures_show(name: str, tmp_path: Path) -> None:
    main(RenderConcept(name, tmp_path, captions=True))
    for index, scene in enumerate(concept_scenes(name, 5, seed=0)):
        lines = (tmp_path / f"{index:02d}.txt").read_text().splitlines()
        assert len(lines) == 3
        assert all(line.count("{}") == 1 and name not in line for line in lines)
        assert scene.things[0].colour in lines[0]
        assert f"{scene.background.colour} background" in lines[0]
        assert (scene.things[0].kind in lines[0]) == (name == "relief")
    main(RenderConcept(name, tmp_path, captions=True))
    with pytest.raises(BadInput, match=r"holds other files, such as 00\.txt"):
        main(RenderConcept(name, tmp_path))


def test_zeroshot_pictures_are_of_held_out_pairs_in_the_course_layout(tmp_path: Path) -> None:
    main(RenderZeroshot(tmp_path, count=30, seed=4))
    labels = json.loads((tmp_path / "id2label.json").read_text())
    assert list(labels.values()) == list(KINDS)
    found = pictures(tmp_path / "val")
    assert len(found) == 30
    assert {name.split("_")[0] for name in found} == set(labels)
    for name, image in found.items():
        label, index = name.removesuffix(".png").split("_")
        spec = SceneSpec(kinds=(labels[label],), pairs="held_out")
        again = render_batch([derived_seed(4, int(index))], spec)
        assert (image == again.images[0]).all()
        assert (again.scenes[0].things[0].colour, labels[label]) in HELD_OUT_PAIRS


def test_the_sheet_is_one_picture(tmp_path: Path) -> None:
    main(RenderSheet(tmp_path / "sheet.png"))
    assert Image.open(tmp_path / "sheet.png").width > 64 * len(ALL_KINDS)


def bad_commands(folder: Path) -> list[tuple[Any, str]]:
    return [
        (RenderConcept("fich", folder / "out"), "no concept 'fich'; try fish"),
        (RenderConcept("xyz", folder / "out"), "try key, fish, mushroom, cup, relief, ripple"),
        (RenderConcept("fish", folder / "out", count=0), "--count 0"),
        (RenderZeroshot(folder / "out", count=0), "--count 0"),
        (RenderZeroshot(folder / "out", count=10**11), "--count 100000000000: at most 100,000"),
        (RenderZeroshot(folder / "out", seed=-1), "--seed -1"),
        (RenderConcept("fish", folder / "file"), "a file is in the way"),
        (RenderZeroshot(folder / "file"), "a file is in the way"),
        (RenderConcept("fish", folder / "mine"), "holds other files, such as dog.jpg"),
        (RenderSheet(folder), "is a folder"),
    ]


@pytest.mark.parametrize("index", range(10))
def test_bad_input_is_named_and_nothing_written(index: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dog.jpg").write_text("mine")
    command, named = bad_commands(tmp_path)[index]
    with pytest.raises(BadInput, match=named):
        main(command)
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "mine", "dog.jpg"}
    assert (tmp_path / "file").read_text() == "precious"
