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
    "cases": [
        "Successful Cases: ('7_2.png', 'bee')",
        "Successful Cases: ('7_1.png', 'bee')",
        "Failed Cases: ('9_1.png', 'GT:girl', 'Predicted:boy')",
    ],
    "model": "ViT-B-32:openai",
    "precision": "bf16",
    "prompts": "report",
    "templates": ["A photo of {}"],
    "names": "raw",
    "quickgelu_forced": True,
}


@pytest.mark.parametrize(
    ("name", "step", "bar", "row"),
    [
        ("p3-zeroshot", "p3_zeroshot", "58.6 %", "not measured zeroshot-course"),
        ("miniature-zeroshot", "miniature_zeroshot", "95 %", "98.8 % miniature-clip-held-out"),
    ],
)
def test_accuracies_cases_mistakes_and_settings(name: str, step: str, bar: str, row: str, tmp_path: Path) -> None:
    other = {"p3_zeroshot", "miniature_zeroshot"} - {step}
    write_record(tmp_path / other.pop(), METRICS | {"top1": 0.1111})  # the other section's record
    write_record(tmp_path / step, METRICS)
    images = tmp_path / ("val" if name == "p3-zeroshot" else "miniature_pictures/val")
    for file, width in (("7_1.png", 21), ("7_2.png", 22), ("9_1.png", 23)):
        write_image(images / file, width)
    (tmp_path / step / "predictions.csv").write_text(
        "file,truth,predicted,probability,top5,top5_probability\n"
        "9_1.png,girl,boy,0.61,boy|girl|man|bee,0.61|0.38|0.006|0.004\n"
        "7_1.png,bee,bee,0.999,bee|boy|man|girl,0.999|0.001|0.0|0.0\n"
        "7_2.png,bee,bee,0.50,bee|boy|man|girl,0.50|0.20|0.18|0.12\n"
    )
    write_image(tmp_path / step / "confusion.png", 11)
    photographs = tmp_path / "val" if name == "p3-zeroshot" else None
    page = rendered(section_named(zeroshot.sections(inputs_of(tmp_path, photographs=photographs)), name), tmp_path)
    assert page.scores == {"zero-shot accuracy, 2,500 images": ("58.6 %", bar)}
    assert page.quoted == {"zero-shot accuracy, 2,500 images": row}
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
        "pictures": "2500", "classes": "50", "quickgelu_forced": "yes",
    }  # fmt: skip
    right, wrong, confusion = page.figures
    assert (page.figures[right], page.figures[wrong], page.figures[confusion]) == ((22, 21), (23,), (11,))
    assert (right[:5], wrong[:5], confusion[:5]) == ("Right", "Wrong", "Rows:")
    assert [label.replace("\N{NO-BREAK SPACE}", " ") for label in (*page.labels[right], *page.labels[wrong])] == [
        "shows bee; read as bee 50 %, boy 20 %, man 18 %",
        "shows bee; read as bee 100 %",
        "shows girl; read as boy 61 %, girl 38 %, man 1 %",
    ]


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
