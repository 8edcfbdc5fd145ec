"""Prompt sets, class names as given or as English, and prompt files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest

from runtime.cli import BadInput
from zeroshot.prompts import CIFAR, fill, templates_of, texts_of


def test_the_prompt_sets() -> None:
    assert templates_of("report") == ("A photo of {}",)
    assert templates_of("single") == ("a photo of a {}.",)
    assert len(set(CIFAR)) == 18
    assert {"a photo of a {}.", "a low contrast photo of the {}.", "a photo of the big {}."} <= set(CIFAR)
    assert [t.replace("{}", "cat") for t in templates_of("imagenet")] == [
        template("cat") for template in open_clip.OPENAI_IMAGENET_TEMPLATES
    ]


@pytest.mark.parametrize(
    ("template", "name", "raw", "clean"),
    [
        ("A photo of {}", "oak_tree", "A photo of oak_tree", "A photo of an oak tree"),
        ("A photo of {}", "bee", "A photo of bee", "A photo of a bee"),
        ("a photo of a {}.", "apple", "a photo of a apple.", "a photo of an apple."),
        ("a photo of a {}.", "willow_tree", "a photo of a willow_tree.", "a photo of a willow tree."),
        (
            "a photo of the big {}.",
            "sweet_pepper",
            "a photo of the big sweet_pepper.",
            "a photo of the big sweet pepper.",
        ),
        ("A {} here", "unicorn", "A unicorn here", "A unicorn here"),
        ("{}", "orchid", "orchid", "an orchid"),
    ],
)
def test_names_as_given_or_as_english(template: str, name: str, raw: str, clean: str) -> None:
    assert fill(template, "raw", name) == raw
    assert fill(template, "clean", name) == clean


def test_a_prompt_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("# mine\n\na drawing of {object}\n  {c}, seen from above \n")
    assert templates_of(str(path)) == ("a drawing of {}", "{}, seen from above")


CLASSES = ["oak_tree", "bee"]


def test_sentences_come_in_the_order_of_the_classes_under_their_names(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"Bee": [" It buzzes. "], "oak tree": ["It has acorns.", "A tree."]}))
    texts: Any = texts_of(str(tmp_path / "s.json"), CLASSES)
    assert list(texts.items()) == [("oak_tree", ["It has acorns.", "A tree."]), ("bee", ["It buzzes."])]
    assert texts_of("report", CLASSES) == templates_of("report")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"oak_tree": ["x"], "bee": ["x"], "beee": ["x"]},
            "s.json: 'beee' is none of the 2 classes, the closest is bee$",
        ),
        ({"oak_tree": ["x"], "bee": []}, r"s.json, bee: must have at least 1 item after validation, not 0, it is \[\]"),
        ({"oak_tree": ["x"], "bee": ["x", " "]}, r"s.json, bee\[1\]: must have at least 1 character, it is ' '"),
        ({"oak_tree": ["x"], "bee": "x"}, "s.json, bee: must be a valid list, it is 'x'"),
        ({"oak_tree": ["x"]}, "s.json has no sentence for bee, give every class one or more"),
        ({}, "s.json has no sentence for oak_tree"),
        (
            {"oak_tree": ["x"], "Oak tree": ["y"], "bee": ["x"]},
            "s.json has sentences of oak_tree twice, as 'Oak tree' too",
        ),
        (["x"], "s.json holds list, not an object"),
    ],
)
def test_bad_sentences_are_named(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=message):
        texts_of(str(tmp_path / "s.json"), CLASSES)


def test_an_absent_file_of_sentences_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="s.json does not exist"):
        texts_of(str(tmp_path / "s.json"), CLASSES)
