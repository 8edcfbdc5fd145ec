"""Accuracies, confused pairs, tables and cases of a known result."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from zeroshot.dataset import LabelledImages
from zeroshot.results import Result, accuracies, cases, confused_pairs, per_class, write_csv


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


def test_cases_are_drawn_by_the_seed() -> None:
    rows = [[0.5 + n / 100, 0.5 - n / 100] + [0.0] * 5 for n in range(40)]
    result = result_of(rows, [n % 2 for n in range(40)])
    assert cases(result, 1) == cases(result, 1)
    assert cases(result, 1) != cases(result, 2)
    right, wrong = cases(result, 1)
    assert {n % 2 for n in right} == {0}
    assert {n % 2 for n in wrong} == {1}


def test_a_table_is_plain_csv(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", pd.DataFrame({"name": ['a, "b"', "é"], "recall": [float("nan"), 0.5]}))
    assert (tmp_path / "t.csv").read_bytes() == 'name,recall\n"a, ""b""",\né,0.5\n'.encode()
