"""Label files of any flat form, pictures of any mode, and what is wrong with either, named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.cli import BadInput
from zeroshot.dataset import list_pictures, read_labels


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"1": "cat", "0": "dog"}, {0: "dog", 1: "cat"}),
        (["dog", "cat"], {0: "dog", 1: "cat"}),
        ({"dog": 4, "cat": 2}, {2: "cat", 4: "dog"}),
    ],
)
def test_labels_of_any_flat_form(content: Any, expected: dict[int, str], tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text(json.dumps(content))
    assert read_labels(tmp_path / "l.json") == expected
    assert list(read_labels(tmp_path / "l.json")) == sorted(expected)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"0": "oak_tree", "1": "Oak tree"}', "same name"),
        ('{"0": "cat", "00": "dog"}', "same name or number"),
        ('{"a": "cat"}', "class id must be a whole number"),
        ('{"0": ["cat"]}', "name must be text"),
        ('{"0": ""}', "name must be text"),
        ("{}", "no labels"),
        ("7", "no labels"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_labels_are_named(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text(content)
    with pytest.raises(BadInput, match=named):
        read_labels(tmp_path / "l.json")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_other_modes_are_converted_and_told(
    mode: str, tiny_clip: str, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "val").mkdir()
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.open(labelled / "0_7.png").convert(mode).save(tmp_path / "val" / f"0_1.{suffix}")
    pictures = list_pictures(tmp_path / "val", labelled.parent / "id2label.json")
    pictures.decode(1)
    assert pictures.open(0).mode == "RGB"
    assert f"mode {mode}" in capsys.readouterr().err


def test_deep_pictures_are_named(labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "val" / "0_1.png")
    with pytest.raises(BadInput, match="0_1.png has mode I;16"):
        list_pictures(tmp_path / "val", labelled.parent / "id2label.json").decode(1)
