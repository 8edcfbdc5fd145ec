"""The strict measure of several objects passes right renders; it fails malformed, collapsed and leaking ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from small_pipeline import save_pipeline
from torch import Tensor

from benchmarks.p3_composition_cases import CASES, CaseName, LayoutCase, case_of, possible, question, scene_of
from benchmarks.p3_shape import renders
from benchmarks.p3_strict import (
    Images,
    NamedStyles,
    PartMeasure,
    StrictMeasure,
    Verdict,
    collapsed,
    half_styled,
    leaking,
    main,
    malformed,
    rendered,
    shares_of,
)
from concepts.sampling import Request
from miniature.judge_model import load_scene_classifier
from miniature.scenery.malformed import drawn_as, fish_without_tail
from miniature.scenery.render import render_scenes
from miniature.scenery.scenes import ALL_STYLES, HELD_OUT_KINDS, KINDS, STYLES, SceneSpec, fits, sample_scene
from miniature.style_fidelity import StyleMeasure
from runtime.cli import BadInput
from runtime.images import save_image

COUNT = 12


def same(images: Tensor) -> Tensor:
    return images


def cases_of(name: CaseName, count: int = COUNT) -> list[LayoutCase]:
    return [case_of(name, seed) for seed in range(count)]


@pytest.fixture(scope="module")
def two() -> StrictMeasure:
    return StrictMeasure(load_scene_classifier(), same, cases_of("two"), renders=48)


@pytest.fixture(scope="module")
def styles() -> StyleMeasure:
    return StyleMeasure(same, 60)


def shares(
    measure: StrictMeasure, name: CaseName, render: Callable[[LayoutCase, int], Tensor | None]
) -> dict[str, float]:
    pairs = [(case, render(case, 100 + index)) for index, case in enumerate(cases_of(name))]
    return shares_of([measure.verdict(case, image) for case, image in pairs if image is not None])


def test_right_renders_pass_and_neither_collapse_nor_leak(two: StrictMeasure) -> None:
    right = shares(two, "two", rendered)
    assert right["scene classifier"] >= 0.9
    assert right["strict"] >= 0.75
    assert right["collapse or leak"] <= 0.1
    assert two.ceiling()["strict"] >= 0.75


def test_a_malformed_object_fails_though_the_classifier_passes_it(two: StrictMeasure) -> None:
    wrong = shares(two, "two", malformed)
    assert wrong["scene classifier"] >= 0.4
    assert wrong["strict"] <= 0.1


def test_one_object_in_both_boxes_is_a_collapse(two: StrictMeasure) -> None:
    wrong = shares(two, "two", collapsed)
    assert wrong["strict"] == 0
    assert wrong["collapse"] >= 0.9


def test_objects_that_change_places_are_a_collapse(two: StrictMeasure) -> None:
    wrong = shares(two, "two", lambda case, seed: rendered(replace(case, kinds=case.kinds[::-1]), seed))
    assert wrong["strict"] == 0
    assert wrong["collapse"] >= 0.9


def test_an_object_outside_its_box_is_a_leak_and_no_collapse(two: StrictMeasure) -> None:
    wrong = shares(two, "two", leaking)
    assert wrong["leak"] >= 0.6
    assert wrong["collapse"] <= 0.1


def test_a_style_at_half_strength_fails_strictly() -> None:
    cases = cases_of("scene")
    measure = StrictMeasure(load_scene_classifier(), same, cases, renders=48, style_renders=18)
    assert shares(measure, "scene", half_styled)["strict"] <= 0.5 * shares(measure, "scene", rendered)["strict"]


def test_shares_count_verdicts() -> None:
    verdicts = [Verdict(True, True, False, False), Verdict(True, False, True, False), Verdict(False, False, True, True)]
    assert shares_of(verdicts) == {
        "scene classifier": 2 / 3, "strict": 1 / 3, "collapse": 2 / 3, "leak": 1 / 3, "collapse or leak": 2 / 3
    }  # fmt: skip


# ---------------------------------------------------------------- cases


@pytest.mark.parametrize("name", CASES)
def test_scenes_of_a_case_are_as_it_requires(name: CaseName) -> None:
    for seed in range(40):
        case = case_of(name, seed)
        scene = scene_of(case, seed)
        assert [(thing.kind, thing.box) for thing in scene.things] == list(zip(case.kinds, case.pixels, strict=True))
        for thing, colour in zip(scene.things, case.colours, strict=True):
            assert thing.colour == colour if colour else fits(thing.colour, scene.background.colour)
        colours = [thing.colour for thing in scene.things]
        assert len(set(colours)) == (1 if name == "alike" else len(colours))
        assert scene.style == case.whole.get("style", "flat")
        assert scene.background.colour == case.whole.get("background", scene.background.colour)


@pytest.mark.parametrize("name", ["four", "five"])
def test_four_and_five_objects_stand_in_two_rows_in_the_order_of_the_sentence(name: CaseName) -> None:
    for seed in range(20):
        case = case_of(name, seed)
        assert len(set(case.kinds)) == {"four": 4, "five": 5}[name]
        assert set(HELD_OUT_KINDS) == set(case.kinds[:4])
        assert all(kind in KINDS for kind in case.kinds[4:])
        rows = [box[1] // 32 for box in case.pixels]
        assert rows == ([0, 0, 1, 1] if name == "four" else [0, 0, 0, 1, 1])
        places = [case.layout.joint.index(kind) for kind in case.kinds]
        assert places == sorted(places)
        for index, (left, top, right, bottom) in enumerate(case.pixels):
            assert min(left, top) >= 0
            assert max(right, bottom) <= 64
            for a, b, c, d in case.pixels[:index]:
                assert right <= a or c <= left or bottom <= b or d <= top


def test_alike_objects_share_the_colour_that_both_phrases_name() -> None:
    for seed in range(20):
        case = case_of("alike", seed)
        colour, other = case.colours
        assert colour == other
        assert case.layout.joint.count(f"{colour} <") == 2
        assert case.parts == tuple(f"coloured {colour} {kind}" for kind in case.kinds)


# ---------------------------------------------------------------- parts alone


def test_a_part_alone_passes_strictly_with_its_shape_only() -> None:
    measure = PartMeasure(load_scene_classifier(), same, renders=20)
    right, answers = renders("fish", 12, 5), [{"kind": "fish"}] * 12
    with drawn_as("fish", fish_without_tail):
        wrong = renders("fish", 12, 5)
    assert measure.verdicts(right, answers)["strict"].float().mean() >= 0.75
    verdicts = measure.verdicts(wrong, answers)
    assert verdicts["strict"].float().mean() <= 0.1
    assert verdicts["scene classifier"].float().mean() >= 0.5


@pytest.mark.parametrize("style", ["outline", "relief"])
def test_shapes_in_a_style_are_compared_with_renders_of_that_style(style: str, styles: StyleMeasure) -> None:
    """Flat renders would set a bar that hardly any right shape with an outline reaches."""
    measure = PartMeasure(load_scene_classifier(), same, renders=20)
    measure.styles = styles
    answers = [{"kind": "fish", "style": style}] * 24
    right = measure.verdicts(renders("fish", 24, 5, style), answers)["strict"].float().mean()
    with drawn_as("fish", fish_without_tail):
        wrong = measure.verdicts(renders("fish", 24, 5, style), answers)["strict"].float().mean()
    assert right >= 0.6
    assert wrong < right
    assert not measure.verdicts(renders("star", 24, 5, style), answers)["strict"].any()
    assert not measure.verdicts(renders("fish", 24, 5), answers)["strict"].any()  # flat


def test_named_styles_are_drawn_and_graded_like_renders(
    styles: StyleMeasure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins are renders of the kind and style that the prompt names, but flat where it names mosaic."""
    prompts: list[str] = []

    def drawn(_sampler: Any, requests: list[Request]) -> Tensor:
        prompts.extend(request.prompt for request in requests)
        words = [request.prompt.split() for request in requests]
        styles = ["flat" if each[-1] == "mosaic" else each[-1] for each in words]
        return torch.cat(
            [
                renders(each[4], 1, request.seed, style)
                for each, request, style in zip(words, requests, styles, strict=True)
            ]
        )

    monkeypatch.setattr("concepts.sampling.StableDiffusionSampler.sample_images", drawn)
    monkeypatch.setattr("benchmarks.p3_strict.open_autoencoder", lambda *_: same)
    monkeypatch.setattr("benchmarks.p3_strict.PartMeasure", partial(PartMeasure, renders=10))
    monkeypatch.setattr("benchmarks.p3_strict.StyleMeasure", lambda _: styles)
    model, sheet, record = str(save_pipeline(tmp_path / "model")), tmp_path / "sheet.png", tmp_path / "record.json"
    main(NamedStyles(model=model, count=6, device="cpu", sheet=sheet, record=record))
    shares = json.loads(record.read_text())["metrics"]["passing"]
    assert list(shares["drawn"]) == list(STYLES)
    assert list(shares["rendered"]) == list(ALL_STYLES)
    means = {group: sum(each["strict"] for each in own.values()) / len(own) for group, own in shares.items()}
    assert means["rendered"] >= 0.4
    assert means["drawn"] >= 0.3
    assert shares["drawn"]["mosaic"]["strict"] == 0
    assert len(prompts) == 6 * len(STYLES)
    assert sheet.is_file()


@pytest.mark.parametrize("colour", ["green", "red"])
def test_folders_of_images_are_graded_each_by_its_own_prompt(
    colour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of right fish and one of fish without tails; red is another colour than that of the images."""
    monkeypatch.setattr("benchmarks.p3_strict.open_autoencoder", lambda *_: same)
    spec = SceneSpec(kinds=("fish",), colours=("green",), background="white", style="flat")
    scenes = [sample_scene(seed, spec) for seed in range(6)]
    folders = {"right": render_scenes(scenes)}
    with drawn_as("fish", fish_without_tail):
        folders["wrong"] = render_scenes(scenes)
    for name, images in folders.items():
        (tmp_path / name).mkdir()
        for index, image in enumerate(images):
            save_image(tmp_path / name / f"{index}.png", image)
    paths = tuple(tmp_path / name for name in folders)
    main(Images(paths, ("fish", "fish"), (colour, "green"), ("white", "white"), record=tmp_path / "record.json"))
    right, wrong = json.loads((tmp_path / "record.json").read_text())["metrics"]["folders"]
    assert (right["kind"], right["colour"], right["background"]) == ("fish", colour, "white")
    assert len(right["strict"]) == len(wrong["strict"]) == 6
    assert sum(right["strict"]) >= 4 if colour == "green" else not any(right["strict"])
    assert sum(wrong["strict"]) == 0
    assert sum(wrong["scene classifier"]) >= 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": ()}, "--kind .*each of the 1 folders"),
        ({"kind": ("whale",)}, "--kind whale: the miniature has three"),
        ({"colour": ("mauve",)}, "--colour mauve"),
        ({"background": ("night",)}, "--background night"),
        ({"folders": (Path("empty"),)}, "empty holds no images"),
        ({"folders": (Path("small"),)}, "small: the images are not 64x64"),
    ],
)
def test_folders_that_cannot_be_graded_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, side in (("fine", 64), ("small", 32), ("empty", 0)):
        (tmp_path / name).mkdir()
        if side:
            save_image(tmp_path / name / "0.png", torch.zeros(3, side, side, dtype=torch.uint8))
    images = Images((Path("fine"),), ("fish",), ("red",), ("white",), record=tmp_path / "record.json")
    with pytest.raises(BadInput, match=message):
        main(replace(images, **changes))


@pytest.mark.parametrize(
    ("part", "prompt", "answers"),
    [
        ("coloured red key", "a photo of a red <key>", {"kind": "key", "colour": "red"}),
        ("ordinary star", "a photo of a star", {"kind": "star"}),
        ("kind cup", "a photo of a <cup>", {"kind": "cup"}),
    ],
)
def test_a_part_alone_is_asked_for_by_its_name(part: str, prompt: str, answers: dict[str, str]) -> None:
    assert question(part, Random(0)) == (prompt, answers)


def test_what_is_possible_is_the_mean_product_of_the_parts() -> None:
    cases = cases_of("two", 1)
    first, second = cases[0].parts
    assert possible(cases, {first: 0.5, second: 0.8}) == pytest.approx(0.4)
