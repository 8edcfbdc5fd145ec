"""Accuracies, confused pairs, tables and cases of a known result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from figure_layout import assert_readable
from PIL import Image

from zeroshot.dataset import LabelledImages
from zeroshot.results import (
    Result,
    accuracies,
    cases,
    cases_figure,
    confused_pairs,
    confusion_figure,
    per_class,
    predictions,
    write_csv,
)


def result_of(rows: list[list[float]], truth: list[int]) -> Result:
    classes = dict(enumerate(["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]))
    paths = [Path(f"{label}_{number}.png") for number, label in enumerate(truth)]
    return Result(LabelledImages(paths, torch.tensor(truth), classes), torch.tensor(rows))


def test_accuracies_recall_and_pairs_of_a_known_case() -> None:
    def certain(best: int, *rest: int) -> list[float]:
        order = [best, *rest, *(c for c in range(7) if c not in (best, *rest))]
        return [(7 - order.index(c)) / 28 for c in range(7)]

    rows = [certain(0), certain(0), certain(0), certain(1, 2, 3, 4, 5, 6, 0), certain(0), certain(2)]
    result = result_of(rows, [0, 0, 0, 0, 1, 1])
    shares = accuracies(result)
    assert shares["top1"] == pytest.approx(3 / 6)
    assert shares["top5"] == pytest.approx(5 / 6)  # the fourth image's class comes last
    assert shares["mean_recall"] == pytest.approx((3 / 4 + 0) / 2)
    assert [tuple(pair.values()) for pair in confused_pairs(result)] == [
        ("ant", "bee", 1, 4), ("bee", "ant", 1, 2), ("bee", "cat", 1, 2)
    ]  # fmt: skip
    table = per_class(result).set_index("name")
    assert table.right.tolist() == [3, 0, 0, 0, 0, 0, 0]
    assert table.precision["ant"] == pytest.approx(3 / 4)
    assert table.taken_for["ant"] == "bee"
    assert table.recall.isna().tolist() == [False, False, True, True, True, True, True]


def test_fewer_than_five_classes_have_a_top_five() -> None:
    images = LabelledImages([Path("0_1.png")], torch.tensor([1]), {0: "cat", 1: "dog"})
    assert accuracies(Result(images, torch.tensor([[0.9, 0.1]])))["top5"] == 1


def test_one_image_of_one_class_has_its_row() -> None:
    images = LabelledImages([Path("0_1.png")], torch.tensor([0]), {0: "cat"})
    row = predictions(Result(images, torch.ones(1, 1))).iloc[0]
    assert row.tolist() == ["0_1.png", "cat", "cat", "1.000000", "cat", "1.000000"]


def test_cases_are_drawn_by_the_seed() -> None:
    rows = [[0.5 + n / 100, 0.5 - n / 100] + [0.0] * 5 for n in range(40)]
    result = result_of(rows, [n % 2 for n in range(40)])
    assert cases(result, 1) == cases(result, 1)
    assert cases(result, 1) != cases(result, 2)
    right, wrong = cases(result, 1)
    assert {n % 2 for n in right} == {0}
    assert {n % 2 for n in wrong} == {1}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the figures that would be written."""
    drawn: list[Any] = []
    monkeypatch.setattr("zeroshot.results.save_figure", lambda path, figure, dpi: drawn.append(figure))
    return drawn


def test_the_confusion_figure_has_truth_in_rows_as_shares_of_the_row(figures: list[Any]) -> None:
    def sure(best: int) -> list[float]:
        return [1.0 if index == best else 0.0 for index in range(7)]

    result = result_of([sure(0), sure(1), sure(1), sure(1), sure(2)], [0, 0, 0, 0, 2])
    confusion_figure(Path("x"), result, "title")
    assert_readable(figures[0], used=0.75)
    axis = figures[0].axes[0]
    shares = torch.zeros(7, 7)
    shares[0, 0], shares[0, 1], shares[2, 2] = 0.25, 0.75, 1
    assert torch.equal(torch.tensor(axis.images[0].get_array().data).float(), shares)
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title()) == ("predicted", "truth", "title")
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert [label.get_text() for label in labels] == result.images.names


def test_a_confusion_figure_of_few_classes_names_its_counts_where_there_are_any(figures: list[Any]) -> None:
    def sure(best: int) -> list[float]:
        return [1.0 if index == best else 0.0 for index in range(7)]

    confusion_figure(Path("x"), result_of([sure(0), sure(1), sure(1), sure(1), sure(2)], [0, 0, 0, 0, 2]), "title")
    (axis,) = figures[0].axes  # numbers need no colour bar
    counts = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axis.texts}
    assert counts == {(0, 0): "1", (0, 1): "3", (2, 2): "1"}  # truth, prediction
    many = LabelledImages([Path("0_0.png")], torch.tensor([0]), {n: f"{n}" for n in range(21)})
    confusion_figure(Path("x"), Result(many, torch.eye(21)[:1]), "title")
    assert not figures[1].axes[0].texts


@pytest.mark.parametrize(("classes", "size", "side"), [(50, 8, 13.02), (60, 8, 14.82), (61, 5, 10.5), (300, 5, 24)])
def test_the_confusion_figure_grows_with_its_classes_up_to_two_feet(
    classes: int, size: int, side: float, figures: list[Any]
) -> None:
    names = {number: f"class number {number % 10}{number // 10 % 10}" for number in range(classes)} | {1: "ant"}
    images = LabelledImages([Path("0_0.png")], torch.tensor([0]), names)
    confusion_figure(Path("x"), Result(images, torch.eye(classes)[:1]), "title")
    (figure,) = figures
    assert figure.get_size_inches() == pytest.approx((side, side), abs=0.01)
    assert {label.get_fontsize() for label in figure.axes[0].get_xticklabels()} == {size}
    if classes <= 60:
        assert_readable(figure, used=0.85)


def test_the_cases_figure_shows_right_ones_above_with_their_three_likeliest_classes(
    figures: list[Any], tmp_path: Path
) -> None:
    result = result_of([[0.1, 0.6, 0.3] + [0.0] * 4, [0.5, 0.2, 0.25, 0.05] + [0.0] * 3], [1, 2])
    for index, path in enumerate(result.images.paths):
        result.images.paths[index] = tmp_path / path
        Image.new("RGB", (2, 2), (index, 0, 0)).save(tmp_path / path)
    cases_figure(Path("x"), result, [0], [1], "title")
    assert_readable(figures[0], used=0.8)
    axes = figures[0].axes
    seen = []
    for photo, bars in ((axes[0], axes[5]), (axes[10], axes[15])):
        texts = [text.get_text() for text in bars.texts]
        widths, colours = ([getattr(bar, f"get_{name}")() for bar in bars.patches] for name in ("width", "facecolor"))
        seen.append((photo.get_title(), int(photo.images[0].get_array()[0, 0, 0]), texts))
        assert widths == pytest.approx([float(text.split()[-1][:-1]) / 100 for text in texts])
        greenest = [colour[1] > colour[0] and colour[1] > colour[2] for colour in colours]
        reddest = [colour[0] > colour[1] + 0.3 for colour in colours]
        assert (greenest, reddest) == {
            "1": ([True, False, False], [False] * 3),
            "2": ([False, True, False], [True, False, False]),
        }[photo.get_title()[0]]
    assert seen == [
        ("1_0.png\nbee", 0, ["bee  60.0%", "cat  30.0%", "ant  10.0%"]),
        ("2_1.png\ncat", 1, ["ant  50.0%", "cat  25.0%", "bee  20.0%"]),
    ]


def test_a_table_is_plain_csv(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", pd.DataFrame({"name": ['a, "b"', "é"], "recall": [float("nan"), 0.5]}))
    assert (tmp_path / "t.csv").read_bytes() == 'name,recall\n"a, ""b""",\né,0.5\n'.encode()
