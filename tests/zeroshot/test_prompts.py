"""Prompt sets, class names as given or as English, and prompt files."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest

from zeroshot.prompts import CIFAR, fill, templates_of


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
