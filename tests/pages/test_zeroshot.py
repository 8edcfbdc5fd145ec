"""Zero-shot classification on the page: each share under its name, each mistake in its row, each section its own record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from page_reader import commands_of, flag, inputs_of, rendered, section_named, write_image, write_record

from pages import zeroshot
from pages.inputs import CLIP

METRICS: dict[str, Any] = {
    "pictures": 2500,
    "classes": 50,
    "top1": 0.5862,
    "top5": 0.8123,
    "mean_recall": 0.4711,
    "confused_pairs": [
        {"truth": "boy", "predicted": "girl", "times": 13, "pictures": 52},
        {"truth": "pine_tree", "predicted": "oak_tree", "times": 11, "pictures": 49},
    ],
    "model": "ViT-B-32:openai",
    "precision": "bf16",
    "prompts": "report",
    "templates": ["A photo of {}"],
    "names": "raw",
    "quickgelu_forced": True,
}


@pytest.mark.parametrize(
    ("name", "step", "wanted"),
    [("p3-zeroshot", "p3_zeroshot", "58.6 %"), ("miniature-zeroshot", "miniature_zeroshot", "95 %")],
)
def test_accuracies_mistakes_and_settings(name: str, step: str, wanted: str, tmp_path: Path) -> None:
    other = {"p3_zeroshot", "miniature_zeroshot"} - {step}
    write_record(tmp_path / other.pop(), METRICS | {"top1": 0.1111})  # the other section's record
    write_record(tmp_path / step, METRICS)
    write_image(tmp_path / step / "cases.png", 10)
    write_image(tmp_path / step / "confusion.png", 11)
    photographs = tmp_path / "val" if name == "p3-zeroshot" else None
    page = rendered(section_named(zeroshot.sections(inputs_of(tmp_path, photographs=photographs)), name), tmp_path)
    assert page.scores == {"zero-shot accuracy, 2,500 images": ("58.6 %", wanted)}
    assert page.tables["Right answers"][1:] == [
        ("top 1", "58.6 %"),
        ("top 5", "81.2 %"),
        ("mean over the classes", "47.1 %"),
    ]
    assert page.tables["Most frequent mistakes"] == [
        ("shows", "classified as", "how often"),
        ("boy", "girl", "13 of 52"),
        ("pine_tree", "oak_tree", "11 of 49"),
    ]
    assert page.pairs("Settings") == {
        "model": "ViT-B-32:openai", "precision": "bf16", "prompts": "report", "templates": "A photo of {}", "names": "raw",
        "pictures": "2500", "classes": "50", "quickgelu_forced": "True",
    }  # fmt: skip
    assert {caption.split()[0]: widths for caption, widths in page.figures.items()} == {"Right": (10,), "Rows:": (11,)}


@pytest.mark.parametrize(("quick", "count"), [(False, "1200"), (True, "340")])
def test_the_small_clip_classifies_the_rendered_images(quick: bool, count: str, tmp_path: Path) -> None:
    (section,) = zeroshot.sections(inputs_of(tmp_path, quick=quick))
    ((render,), (classify,)) = (commands_of(section, f"miniature_{step}") for step in ("pictures", "zeroshot"))
    assert render[:4] == ["miniature/world.py", "zeroshot", "--count", count]
    assert flag(classify, "--images") == str(Path(flag(render, "--output")) / "val")
    assert flag(classify, "--model").startswith("local-dir:")
    assert str(CLIP).endswith(flag(classify, "--model").removeprefix("local-dir:"))
    assert flag(classify, "--output") == str(tmp_path / "miniature_zeroshot")


def test_the_courses_images_are_classified_as_in_the_report_with_the_miniature_to_fall_back_on(tmp_path: Path) -> None:
    (section,) = zeroshot.sections(inputs_of(tmp_path, photographs=tmp_path / "val"))
    (command,) = commands_of(section, "p3_zeroshot")
    assert (flag(command, "--preset"), flag(command, "--images")) == ("report", str(tmp_path / "val"))
    assert flag(command, "--output") == str(tmp_path / "p3_zeroshot")
    assert section.fallback
    assert section.fallback.name == "miniature-zeroshot"
