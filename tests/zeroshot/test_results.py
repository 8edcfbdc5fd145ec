"""Accuracies, confused pairs and cases of a known result; presets and published figures."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch

from zeroshot.dataset import LabelledImages
from zeroshot.results import PUBLISHED, Result, accuracies, cases, confused_pairs, per_class, published
from zeroshot.settings import PRESETS, ZeroShotConfig, parse_config


def test_what_compare_understands(tmp_path: Path) -> None:
    base = ZeroShotConfig("ViT-B-32", "openai", "report", "raw")
    mine = tmp_path / "p.txt"
    mine.write_text("{}")
    assert parse_config("cifar,clean", base) == ZeroShotConfig("ViT-B-32", "openai", "cifar", "clean")
    assert parse_config("ViT-B-16:openai", base) == ZeroShotConfig("ViT-B-16", "openai", "report", "raw")
    assert parse_config("report", PRESETS["best"]).prompts == "report"
    assert parse_config("preset=report", PRESETS["best"]) == PRESETS["report"]
    assert parse_config("best,single", base) == ZeroShotConfig("EVA02-L-14", PRESETS["best"].weights, "single", "clean")
    assert parse_config(f"local-dir:x,{mine}", base) == ZeroShotConfig("local-dir:x", None, str(mine), "raw")


def test_presets_and_published_figures_are_tags_that_open_clip_knows() -> None:
    known = {f"{model}:{tag}" for model, tag in open_clip.list_pretrained()}
    assert set(PUBLISHED) <= known
    figures = {name: published(f"{choice.model}:{choice.weights}") for name, choice in PRESETS.items()}
    assert figures == {"report": 64.2, "fast": 80.3, "best": 90.7}
    assert published("ViT-B-32-quickgelu:openai") == 64.2
    assert published("tiny-clip:mine.pt") is None


def result_of(rows: list[list[float]], truth: list[int]) -> Result:
    classes = dict(enumerate(["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]))
    paths = [Path(f"{t}_{n}.png") for n, t in enumerate(truth)]
    return Result(LabelledImages(paths, torch.tensor(truth), classes), torch.tensor(rows))


def test_accuracies_recall_and_pairs_of_a_known_case() -> None:
    def certain(best: int, *rest: int) -> list[float]:
        order = [best, *rest, *(c for c in range(7) if c not in (best, *rest))]
        return [(7 - order.index(c)) / 28 for c in range(7)]

    rows = [certain(0), certain(0), certain(0), certain(1, 2, 3, 4, 5, 6, 0), certain(0), certain(2)]
    result = result_of(rows, [0, 0, 0, 0, 1, 1])
    found = accuracies(result)
    assert found["top1"] == pytest.approx(3 / 6)
    assert found["top5"] == pytest.approx(5 / 6)  # the fourth picture's class comes last
    assert found["mean_recall"] == pytest.approx((3 / 4 + 0) / 2)
    assert confused_pairs(result) == [("ant", "bee", 1, 4), ("bee", "ant", 1, 2), ("bee", "cat", 1, 2)]
    table = per_class(result).set_index("name")
    assert table.right.tolist() == [3, 0, 0, 0, 0, 0, 0]
    assert table.precision["ant"] == pytest.approx(3 / 4)
    assert table.taken_for["ant"] == "bee"


def test_fewer_than_five_classes_have_a_top_five() -> None:
    pictures = LabelledImages([Path("0_1.png")], torch.tensor([1]), {0: "cat", 1: "dog"})
    assert accuracies(Result(pictures, torch.tensor([[0.9, 0.1]])))["top5"] == 1


def test_cases_by_seed_and_by_confidence() -> None:
    rows = [[0.5 + n / 100, 0.5 - n / 100] + [0.0] * 5 for n in range(40)]
    result = result_of(rows, [n % 2 for n in range(40)])
    right, wrong = cases(result, "confidence", 0)
    assert right == [38, 36, 34, 32, 30]
    assert wrong == [39, 37, 35, 33, 31]
    assert cases(result, "seed", 1) == cases(result, "seed", 1)
    assert cases(result, "seed", 1) != cases(result, "seed", 2)
    right, wrong = cases(result, "seed", 1)
    assert {n % 2 for n in right} == {0}
    assert {n % 2 for n in wrong} == {1}
