"""Layouts: boxes, masks, styles and references are read as they are meant, and what can't be meant is named in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from concepts.composition.layout import Layout, Region, Style, auto_layout, make_layout, read_layout, replace_words
from concepts.composition.masks import MASK_SIZE, bounds, box_mask, hard_masks
from runtime.cli import BadInput


def half(top: int, kind: type = np.uint8) -> np.ndarray:
    """Return an image whose left half is `top` and whose right half is 0."""
    return np.repeat([[top] * 16 + [0] * 16], 32, 0).astype(kind)


CLEAR = Image.new("L", (32, 32), 0)
EVERYWHERE = torch.ones(MASK_SIZE, MASK_SIZE)
LEFT, RIGHT, TOP = box_mask((0, 0, 0.5, 1)), box_mask((0.5, 0, 1, 1)), box_mask((0, 0, 1, 0.5))


def written(folder: Path, concepts: Any, **more: Any) -> Path:
    (folder / "layout.json").write_text(json.dumps({"prompt": "two things.", "concepts": concepts} | more))
    return folder / "layout.json"


def read(folder: Path, concepts: Any, **more: Any) -> Layout:
    return read_layout(written(folder, concepts, **more))


# ---------------------------------------------------------------- what is read


def test_boxes_masks_and_styles_are_read(tmp_path: Path) -> None:
    Image.new("L", (64, 32), 255).save(tmp_path / "mask.png")
    concepts = [
        {"token": "<new1>", "box": [0, 0, 0.5, 1]},
        {"token": "<new2>", "mask": "mask.png", "prompt": "my <new2>."},
        {"token": "<new3>", "style": True},
    ]
    plan = read(tmp_path, concepts)
    assert plan.prompts == [f"{x} in the style of <new3>" for x in ("two things", "a photo of a <new1>", "my <new2>")]
    assert plan.joint == "a photo of a <new1> next to a <new2> in the style of <new3>"
    assert torch.equal(plan.masks(2, 4), torch.tensor([[[1.0, 1, 0, 0]] * 2, [[0.0, 0, 1, 1]] * 2]))


def test_a_box_is_left_top_right_bottom_and_masks_are_rows_by_columns(tmp_path: Path) -> None:
    plan = read(tmp_path, [{"token": "<a>", "box": [0.125, 0.25, 0.875, 0.5]}])
    expected = torch.zeros(8, 8)
    expected[2:4, 1:7] = 1
    assert torch.equal(plan.masks(8, 8)[0], expected)
    assert torch.equal(plan.soft_masks(4, 8)[0], F.avg_pool2d(expected[None], (2, 1))[0])
    assert bounds(plan.regions[0].mask) == (slice(128, 256), slice(64, 448))


def test_words_put_tokens_into_the_base_prompt(tmp_path: Path) -> None:
    concepts = [
        {"token": "<new1>", "word": "dog", "box": [0, 0, 0.5, 1]},
        {"token": "<cat>", "word": "old cat", "box": [0.5, 0, 1, 1]},
    ]
    plan = read(tmp_path, concepts, prompt="a dog next to an old cat on a dogcart")
    assert plan.prompts[1:] == ["a photo of a <new1>", "a photo of a <cat>"]
    assert plan.joint == "a <new1> next to a <cat> on a dogcart"
    assert [region.plain_prompt for region in plan.regions] == ["a photo of a dog", "a photo of a old cat"]


def test_a_word_that_the_prompt_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    concepts = [{"token": "<dog>", "word": "dog", "box": [0, 0, 0.5, 1]}]
    read(tmp_path, concepts, prompt="a dogcart and a dog")
    assert capsys.readouterr().err == ""
    plan = read(tmp_path, concepts, prompt="a dogcart")
    assert "<dog>: the prompt doesn't hold its word 'dog'" in capsys.readouterr().err
    assert plan.prompts == ["a dogcart", "a photo of a <dog>"]


def test_objects_without_a_word_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    auto_layout("a <new1> next to a <new2> in the style of <new3>", {"<new1>": "dog"})
    assert "--words has none for <new2>, an object" in capsys.readouterr().err


def test_three_concepts_are_listed_alone(tmp_path: Path) -> None:
    names = ("dog", "cat", "fox")
    concepts = [{"token": f"<{x}>", "word": x, "box": [k / 3, 0, (k + 1) / 3, 1]} for k, x in enumerate(names)]
    plan = read(tmp_path, concepts, prompt="a dog, a cat and a fox on a bench")
    assert plan.prompts == ["a dog, a cat and a fox on a bench", *(f"a photo of a <{x}>" for x in names)]
    assert plan.joint == "a <dog>, a <cat> and a <fox> on a bench"
    again = auto_layout(plan.joint, {f"<{x}>": x for x in names})
    assert again.prompts == plan.prompts


def test_a_mask_of_another_size_is_resized(tmp_path: Path) -> None:
    mask = Image.new("L", (10, 30), 0)
    mask.paste(255, (0, 0, 10, 15))
    mask.save(tmp_path / "mask.png")
    plan = read(tmp_path, [{"token": "<a>", "mask": "mask.png"}])
    assert torch.equal(plan.regions[0].mask, TOP)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(half(1)),
        Image.fromarray(half(1, np.uint16)),
        Image.fromarray(half(255, np.uint16)),
        Image.fromarray(half(65535, np.uint16)),
        Image.fromarray(half(255)).convert("1"),
        Image.fromarray(half(255)).convert("P"),
        Image.merge("LA", [Image.fromarray(half(255)), Image.new("L", (32, 32), 255)]),
        Image.merge("LA", [Image.new("L", (32, 32), 255), Image.fromarray(half(255))]),
        Image.merge("LA", [Image.fromarray(half(255))] * 2),
    ],
    ids=[
        "0 1",
        "16 bit 0 1",
        "16 bit 0 255",
        "16 bit",
        "1 bit",
        "palette",
        "opaque",
        "white, cut out",
        "white on clear",
    ],
)
def test_a_mask_of_any_kind_is_white_where_its_concept_belongs(tmp_path: Path, image: Image.Image) -> None:
    image.save(tmp_path / "mask.png")
    assert torch.equal(read(tmp_path, [{"token": "<a>", "mask": "mask.png"}]).regions[0].mask, LEFT)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.merge("LA", [CLEAR, Image.fromarray(half(255))]), "mask.png is transparent and not white elsewhere"),
        (Image.merge("LA", [Image.fromarray(half(255)), CLEAR]), "no part of .*mask.png is white"),
        (Image.fromarray(half(100)), r"no part of .*mask.png is white \(the brightest is 100 of 255\)"),
        (Image.fromarray(half(256, np.uint16)), r"no part of .*mask.png is white \(the brightest is 1 of 255\)"),
        (Image.fromarray(half(1).astype(np.float32)), "mask.png is not a readable picture"),
    ],
    ids=["black, cut out", "all clear", "dark", "16 bit dark", "floating point"],
)
def test_a_mask_that_can_be_meant_in_two_ways_is_named(tmp_path: Path, image: Image.Image, message: str) -> None:
    image.save(tmp_path / "mask.png", "TIFF" if image.mode == "F" else "PNG")
    with pytest.raises(BadInput, match=message):
        read(tmp_path, [{"token": "<a>", "mask": "mask.png"}])


def clear_right(left: int | np.ndarray, right: int = 0) -> Image.Image:
    """Return 32x32 pixels: opaque `left` of 16 columns, eight black ones of opacity `right`, eight clear ones."""
    grey, alpha = half(0), half(255)
    grey[:, :16], alpha[:, 16:24] = left, right
    return Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])


def dark(count: int) -> np.ndarray:
    """Return [32,16] white but for `count` of its 512 pixels."""
    pixels = np.full(512, 255, np.uint8)
    pixels[:count] = 0
    return pixels.reshape(32, 16)


@pytest.mark.parametrize(
    ("image", "white"),
    [
        (clear_right(128), True),
        (clear_right(127), False),
        (clear_right(255, right=127), True),
        (clear_right(255, right=128), False),
        (clear_right(dark(25)), True),
        (clear_right(dark(26)), False),
    ],
    ids=["grey", "darker", "clear enough", "opaque", "20th part black", "more black"],
)
def test_a_partly_clear_mask_is_taken_if_19_of_20_opaque_pixels_are_brighter_than_grey(
    tmp_path: Path, image: Image.Image, white: bool
) -> None:
    image.save(tmp_path / "mask.png")
    if not white:
        with pytest.raises(BadInput, match=r"mask\.png is transparent and not white elsewhere"):
            read(tmp_path, [{"token": "<a>", "mask": "mask.png"}])
        return
    mask = read(tmp_path, [{"token": "<a>", "mask": "mask.png"}]).regions[0].mask
    assert (mask != LEFT).float().mean() <= 25 / 1024


def test_a_position_half_white_belongs_to_nobody(tmp_path: Path) -> None:
    stripes = np.full((1024, 1024), 255, np.uint8)
    stripes[:, 1:512:2] = 0
    Image.fromarray(stripes).save(tmp_path / "mask.png")
    assert torch.equal(read(tmp_path, [{"token": "<a>", "mask": "mask.png"}]).regions[0].mask, RIGHT)


def test_a_reference_is_read_with_its_prompt(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "reference.png")
    plan = read(tmp_path, [{"token": "<a>", "box": [0, 0, 1, 1]}], reference="reference.png", reference_prompt="a star")
    assert plan.reference is not None
    assert plan.reference[:, 0, 0].tolist() == [1, 2, 3]
    assert plan.reference_prompt == "a star"


def test_a_style_in_a_region_acts_there_only() -> None:
    regions = [Region("<a>", "an <a>", box_mask((0, 0, 0.25, 1))), Region("<b>", "a <b>", RIGHT)]
    plan = make_layout("a scene", regions, [Style("<s>", LEFT)])
    assert plan.prompts == ["a scene", "an <a> in the style of <s>", "a <b>", "a scene in the style of <s>"]
    assert torch.equal(plan.masks(1, 4)[:, 0], torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]]))


def test_a_layout_may_hold_styles_only(tmp_path: Path) -> None:
    plan = read(tmp_path, [{"token": "<s>", "style": True}])
    assert plan.prompts == ["two things in the style of <s>"]
    assert plan.masks(4, 4).shape == (0, 4, 4)


def test_the_later_mask_yields_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    masks = make_layout("x", [Region("<a>", "a <a>", LEFT), Region("<b>", "a <b>", EVERYWHERE)]).masks(8, 8)
    assert masks.sum(0).max() == 1
    assert "<b>: 50%" in capsys.readouterr().err


def test_the_share_of_a_region_that_others_take_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = [{"token": "<a>", "box": [0, 0, 0.5, 1]}, {"token": "<b>", "box": [0.25, 0, 1, 0.5]}]
    read(tmp_path, boxes)
    assert "<b>: 33% of its region belongs to concepts before it" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "named"), [({}, False), ({"word": "things"}, False), ({"word": "dog"}, True)])
def test_a_given_word_that_the_prompt_does_not_hold_is_named(
    word: dict[str, str], named: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read(tmp_path, [{"token": "<a>", "box": [0, 0, 0.5, 1]} | word])
    assert ("the prompt doesn't hold its word 'dog'" in capsys.readouterr().err) == named


def test_masks_never_overlap_at_any_resolution() -> None:
    plan = make_layout("x", [Region("<a>", "a", box_mask((0, 0, 0.53, 1))), Region("<b>", "b", EVERYWHERE)])
    for side in (3, 4, 7, 8, 16, 64):
        assert plan.masks(side, side).sum(0).max() == 1
        assert hard_masks(plan.soft_masks(16, 16)[:, None], side, side).sum(0).max() == 1


def test_a_region_smaller_than_a_position_keeps_the_one_it_fills_best() -> None:
    boxes = [(left / 64, 22 / 64, (left + 20) / 64, 42 / 64) for left in (0, 21, 43)]
    soft_masks = torch.stack([box_mask(box) for box in boxes])[:, None]
    masks = hard_masks(soft_masks, 4, 4)
    assert (masks.sum((1, 2, 3)) > 0).all()
    assert masks.sum(0).max() == 1
    assert hard_masks(soft_masks, 8, 8)[0, 0].nonzero().tolist() == [[y, x] for y in (3, 4) for x in (0, 1)]


def test_no_concept_has_a_position_that_two_fill_alike() -> None:
    halves = torch.stack([box_mask((0, 0, 0.5, 1)), box_mask((0.5, 0, 1, 1))])[:, None]
    assert hard_masks(halves, 1, 1).sum() == 0
    assert hard_masks(halves, 2, 2).sum() == 4


# ---------------------------------------------------------------- made of a prompt


def test_tokens_are_laid_side_by_side() -> None:
    plan = auto_layout("a <new1> next to a <new2> in the style of <new3>", {"<new1>": "dog", "<new2>": "cat"})
    ending = " in the style of <new3>"
    assert plan.prompts == [
        f"{prompt}{ending}" for prompt in ("a dog next to a cat", "a photo of a <new1>", "a photo of a <new2>")
    ]
    assert plan.joint == "a <new1> next to a <new2> in the style of <new3>"
    masks = plan.masks(16, 16)
    assert masks[0, :, 8:].sum() == 0
    assert masks[1, :, :8].sum() == 0


def test_a_prompt_of_styles_only_has_no_layout() -> None:
    with pytest.raises(BadInput, match="names no object's token"):
        auto_layout("a dog in the style of <s>", {})


def test_only_whole_words_are_replaced() -> None:
    assert replace_words("a cat, an old dog and a catfish", ["cat", "old dog"], "<x>") == "a <x>, a <x> and a catfish"


# ---------------------------------------------------------------- refusals

BOX = [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ([], "concepts: must have at least 1 item"),
        ({}, "concepts: must be a valid list"),
        (["<a>"], r"concepts\[0\]: must be .* it is '<a>'"),
        ([{"box": BOX}], r"concepts\[0\].token is missing"),
        ([{"token": "new1", "box": BOX}], r"concepts\[0\].token: .* it is 'new1'"),
        ([{"token": "<a>"}], "<a>: give it either a box or a mask"),
        ([{"token": "<a>", "box": BOX, "mask": "mask.png"}], "<a>: give it either a box or a mask"),
        (
            [{"token": "<a>", "box": [0, 0, 1.2, 1]}],
            r"concepts\[0\].box\[2\]: must be less than or equal to 1, it is 1.2",
        ),
        ([{"token": "<a>", "box": [-0.1, 0, 1, 1]}], r"concepts\[0\].box\[0\]: .* it is -0.1"),
        ([{"token": "<a>", "box": [0.6, 0, 0.5, 1]}], r"<a>: box \[0.6, 0.0, 0.5, 1.0\] must .* rising"),
        ([{"token": "<a>", "box": [0, 0.6, 1, 0.5]}], r"<a>: box \[0.0, 0.6, 1.0, 0.5\] must .* rising"),
        ([{"token": "<a>", "box": [0.5, 0, 0.5, 1]}], r"<a>: box \[0.5, 0.0, 0.5, 1.0\] must .* rising"),
        ([{"token": "<a>", "box": [0, 0, 1]}], r"concepts\[0\].box: .* it is \[0, 0, 1\]"),
        ([{"token": "<a>", "box": [0, 0, "x", 1]}], r"concepts\[0\].box\[2\]: .* it is 'x'"),
        ([{"token": "<s>", "style": True, "box": [0, 0, 2, 1]}], r"concepts\[0\].box\[2\]: .* it is 2"),
        ([{"token": "<a>", "mask": "none.png"}], "none.png"),
        ([{"token": "<a>", "mask": "layout.json"}], "layout.json is not a readable picture"),
        ([{"token": "<a>", "mask": "black.png"}], r"<a>: its region is empty, no part of .*black.png is white"),
        ([{"token": "<a>", "mask": 3}], r"concepts\[0\].mask: must be a valid string, it is 3"),
        ([{"token": "<a>", "box": BOX, "prompt": "a dog"}], "doesn't hold it"),
        ([{"token": "<a>", "box": BOX, "prompt": 3}], r"concepts\[0\].prompt: must be a valid string, it is 3"),
        ([{"token": "<a>", "box": BOX, "images": "nowhere"}], "nowhere is not a folder"),
        ([{"token": "<a>", "box": BOX, "weight": 2}], r"concepts\[0\].weight is not known"),
        ([{"token": "<a>", "style": "no"}], r"concepts\[0\].style: must be a valid boolean, it is 'no'"),
        ([{"token": "<a>", "box": BOX}, {"token": "<b>", "box": BOX}], "<b>: its region is empty"),
    ],
)
def test_bad_concepts_are_named(tmp_path: Path, concepts: Any, message: str) -> None:
    Image.new("L", (8, 8), 0).save(tmp_path / "black.png")
    with pytest.raises(BadInput, match=message) as caught:
        read(tmp_path, concepts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "own"),
    [
        ("a red <key> next to an old round <cup>", ["a photo of a red <key>", "a photo of an old round <cup>"]),
        ("a photo of <key> and the <cup>", ["a photo of a <key>", "a photo of the <cup>"]),
        ("a table under <key>, <cup>", ["a photo of a <key>", "a photo of a <cup>"]),
    ],
)
def test_auto_layout_keeps_the_adjectives_of_each_concept(prompt: str, own: list[str]) -> None:
    assert auto_layout(prompt, {}).prompts[1:] == own


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompt": 3}, "prompt: must be a valid string, it is 3"),
        ({"prompt": " "}, "prompt: must have at least 1 character, it is ' '"),
        ({"colour": "red"}, "colour is not known"),
        ({"joint": 5}, "joint: must be a valid string, it is 5"),
        ({"reference": None}, "reference: must be a valid string, it is None"),
        ({"reference": "wide.png"}, "reference wide.png has 16x8 pixels"),
        ({"reference": "none.png"}, "none.png does not exist"),
    ],
)
def test_bad_layouts_are_named(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    Image.new("RGB", (16, 8)).save(tmp_path / "wide.png")
    with pytest.raises(BadInput, match=message):
        read(tmp_path, [{"token": "<a>", "box": BOX}], **more)


def test_a_region_too_small_for_the_latents_is_named() -> None:
    plan = make_layout("x", [Region("<a>", "a <a>", box_mask((0, 0, 0.02, 0.02)))])
    with pytest.raises(BadInput, match="<a>: its region is smaller than the 16x16 latents"):
        plan.check_resolution(16, 16)
