"""Layouts by the command: plan, figure and scores are written, and bad input is named before anything is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFont
from small_pipeline import WIDTH, save_clip, save_pictures, save_pipeline

from concepts.clip_scores import Scorer
from concepts.composition.layout import Region, make_layout
from concepts.composition.masks import box_mask
from concepts.composition.scores import COLOURS, cut_out, draw_layout, draw_outlines, mean_scores, scores_inside
from concepts.embeddings import file_of, save_vectors
from P3_inference import Settings, main
from runtime.cli import BadInput

CPU = torch.device("cpu")
LEFT, RIGHT = box_mask((0, 0.25, 0.5, 1)), box_mask((0.5, 0, 1, 1))
PLAN = make_layout("a star", [Region("<new1>", "a <new1>", LEFT, "star"), Region("<new2>", "a <new2>", RIGHT, "moon")])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_pipeline(tmp_path_factory.mktemp("model")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a layout of two concepts, one with images, and their embeddings."""
    for index, token in enumerate(("<new1>", "<new2>")):
        rows = torch.randn(index + 1, WIDTH, generator=torch.Generator().manual_seed(index))
        save_vectors(file_of(tmp_path / "learned", token), token, rows, "test")
    save_pictures(tmp_path / "pictures", 2)
    write(tmp_path)
    return tmp_path


def write(folder: Path, **more: Any) -> None:
    concepts = [
        {"token": "<new1>", "word": "star", "box": [0, 0, 0.5, 1], "images": "pictures"},
        {"token": "<new2>", "box": [0.5, 0, 1, 1]},
    ]
    (folder / "layout.json").write_text(
        json.dumps({"prompt": "a star next to a moon", "concepts": concepts} | more), encoding="utf-8"
    )


def settings(folder: Path, model: str, **changes: Any) -> Settings:
    flags: dict[str, Any] = {
        "model": model,
        "output": folder / "out",
        "layout": str(folder / "layout.json"),
        "embeddings": (folder / "learned",),
        "count": 2,
        "steps": 2,
        "guidance": 2.0,
        "precision": "fp32",
        "device": "cpu",
        "record": folder / "record.json",
    }
    return Settings(**flags | changes)


# ---------------------------------------------------------------- the command


def test_plan_figure_and_scores_are_written(folder: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    clip = str(save_clip(folder / "clip"))
    flags = {
        "draw_layout": folder / "plan.png",
        "figure": folder / "figure.png",
        "scores": True,
        "clip": clip,
        "steps": 1,
    }
    main(settings(folder, model, **flags))
    assert Image.open(folder / "plan.png").size == (256, 256)
    assert Image.open(folder / "figure.png").size[0] > 1000
    concepts = json.loads((folder / "record.json").read_text())["metrics"]["concepts"]
    assert list(concepts) == ["conductor_0.png", "conductor_1.png"]
    assert set(concepts["conductor_0.png"]["<new1>"]) == {"text", "image"}
    assert set(concepts["conductor_0.png"]["<new2>"]) == {"text"}
    assert "<new1>: text score" in capsys.readouterr().out


def test_a_dry_run_shows_the_plan_only(folder: Path, model: str) -> None:
    main(settings(folder, model, dry_run=True, draw_layout=folder / "plan.png", figure=folder / "new" / "figure.png"))
    assert (folder / "plan.png").is_file()
    assert not (folder / "out").exists()
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("level", "guidance", "passes"),
    [("joint", 1.0, 4), ("joint", 2.0, 8), ("regional", 1.0, 8), ("conductor", 2.0, 32)],
)
def test_a_dry_run_counts_the_branches(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str], level: Any, guidance: float, passes: int
) -> None:
    main(settings(folder, model, dry_run=True, level=level, guidance=guidance))
    assert (
        f"{passes} passes of the U-Net" in capsys.readouterr().out
    )  # 2 pictures of 2 steps, 2 concepts, drawn alone too


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": None, "prompt": ("a star",), "figure": Path("a.png")}, "need a --layout"),
        ({"layout": None, "prompt": ("a star",), "scores": True}, "need a --layout"),
        ({"figure": Path("/")}, "--figure / is a folder"),
        ({"draw_layout": Path(__file__) / "a" / "plan.png"}, "is a file, name a folder"),
        ({"size": 20, "dry_run": True}, "--size 20"),
        ({"steps": 2000, "dry_run": True}, "--steps 2000"),
        ({"compile": "on"}, "--compile on"),
        ({"layout": "none.json"}, "none.json"),
        ({"layout": "auto"}, "--layout auto needs a --prompt"),
        ({"layout": "auto", "prompt": ("a star",)}, "names no object's token"),
        ({"layout": "auto", "prompt": ("a <new1> and a <lost>",)}, "no vectors of <lost>"),
    ],
)
def test_what_can_not_work_is_named_and_nothing_written(
    folder: Path, model: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        main(settings(folder, model, **changes))
    assert not (folder / "out").exists()


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_region_too_small_is_named_before_drawing(folder: Path, model: str, dry_run: bool) -> None:
    write(folder, concepts=[{"token": "<new1>", "box": [0, 0, 0.01, 0.01]}])
    with pytest.raises(BadInput, match="<new1>: its region is smaller"):
        main(settings(folder, model, dry_run=dry_run))
    assert not (folder / "out").exists()


# ---------------------------------------------------------------- pictures and scores


def test_the_plan_shows_each_region_in_its_colour() -> None:
    shown = draw_layout(PLAN, 64)
    assert shown[:, 60, 4].tolist() == list(COLOURS[0])
    assert shown[:, 60, 60].tolist() == list(COLOURS[1])
    assert shown[:, 4, 4].tolist() == [210] * 3


def test_the_plan_names_each_region_in_its_upper_left_corner() -> None:
    """White with a black rim; a region too small to be seen has no name."""
    speck = torch.zeros(512, 512)
    speck[0, 0] = 1
    plan = make_layout("a star", [*PLAN.regions, Region("<new3>", "a <new3>", speck)])
    shown, expected = draw_layout(plan, 256), torch.full((3, 256, 256), 210, dtype=torch.uint8)
    expected[:, 64:, :128], expected[:, :, 128:] = (
        torch.tensor(c, dtype=torch.uint8)[:, None, None] for c in COLOURS[:2]
    )
    font = ImageFont.load_default(size=16)
    for region, (x, y) in zip(PLAN.regions, ((3, 65), (131, 1)), strict=True):
        left, top, right, bottom = map(int, font.getbbox(region.token, stroke_width=1))
        inside = (
            slice(y + top - 1, y + bottom + 1),
            slice(x + left - 1, x + right + 1),
        )  # boxes of fonts are wider than their ink
        label = (shown != expected).any(0)[inside]
        assert all(label.any(axis)[end].any() for axis in (0, 1) for end in (slice(5), slice(-5, None)))
        assert {0, 255} <= set(shown[0][inside].flatten().tolist())
        expected[:, inside[0], inside[1]] = shown[:, inside[0], inside[1]]
    assert torch.equal(shown, expected)


def test_outlines_leave_the_rest_of_a_picture() -> None:
    images = torch.full((1, 3, 64, 64), 9, dtype=torch.uint8)
    shown = draw_outlines(images, PLAN)
    assert shown.shape == (1, 3, 256, 256)
    assert shown[0, :, 64, 60].tolist() == list(COLOURS[0])
    assert shown[0, :, 160, 60].tolist() == [9] * 3
    assert shown[0, :, 30, 60].tolist() == [9] * 3


def test_cut_outs_are_grey_outside_the_mask() -> None:
    mask = torch.zeros(8, 8)
    mask[2:5, 1:3] = 1
    mask[2, 2] = 0
    images = torch.arange(2 * 3 * 64).reshape(2, 3, 8, 8).to(torch.uint8)
    cut = cut_out(images, mask)
    assert cut.shape == (2, 3, 5, 4)  # twice the box, less where its sides are odd
    assert cut[0, 0, 1, 2] == 127
    assert torch.equal(cut[:, :, 2:4, 1:3], images[:, :, 3:5, 1:3])
    rest = torch.ones(5, 4, dtype=torch.bool)
    rest[1:4, 1:3] = False
    assert (cut[:, :, rest] == 127).all()


def test_scores_see_only_what_is_inside_the_mask(tmp_path: Path) -> None:
    scorer = Scorer.load(str(save_clip(tmp_path / "clip")), CPU)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    other = torch.where(LEFT[::8, ::8] > 0, images, 255 - images)
    scores, changed = scores_inside(scorer, PLAN, images), scores_inside(scorer, PLAN, other)
    assert [row["<new1>"] for row in scores] == [row["<new1>"] for row in changed]
    assert [row["<new2>"] for row in scores] != [row["<new2>"] for row in changed]
    alone = scorer.text_scores(scorer.encode(cut_out(images, LEFT[::8, ::8])), "a star")
    assert scores[0]["<new1>"]["text"] == pytest.approx(float(alone[0]), abs=1e-3)
    assert mean_scores(scores)["<new1>"]["text"] == pytest.approx(float(alone.mean()), abs=1e-2)
