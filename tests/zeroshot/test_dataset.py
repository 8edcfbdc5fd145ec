"""Label files of any flat form, images of any mode, and one line that names what is wrong with either."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.cli import BadInput
from zeroshot.dataset import list_images, read_labels


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
    ("content", "message"),
    [
        ('{"0": "oak_tree", "1": "Oak tree"}', "2 classes have the same name"),
        ('{"cat": 3, "dog": 3}', "2 names have only 1 numbers"),
        ('{"0": "cat", "00": "dog"}', "2 names have only 1 numbers"),
        ('{"a": "cat"}', "l.json, a: must be a valid integer.*it is 'a'"),
        ('{"-1": "cat"}', "l.json, -1: must be greater than or equal to 0"),
        ('{"0": ["cat"]}', r"l.json, 0: must be a valid string, it is \['cat'\]"),
        ('{"0": ""}', "l.json, 0: must have at least 1 character, it is ''"),
        ("{}", "no labels"),
        ("7", "no labels"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_labels_are_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text(content)
    with pytest.raises(BadInput, match=message):
        read_labels(tmp_path / "l.json")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_other_modes_are_converted_and_logged_once(
    mode: str, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "val").mkdir()
    suffix = "jpg" if mode == "CMYK" else "png"
    for number in (1, 2):
        Image.open(labelled / "0_7.png").convert(mode).save(tmp_path / "val" / f"0_{number}.{suffix}")
    images = list_images(tmp_path / "val", labelled.parent / "id2label.json")
    assert [images.open(index).mode for index in (0, 1)] == ["RGB", "RGB"]
    assert capsys.readouterr().err.count(f"mode {mode}, such as {images.paths[0]}") == 1


def test_images_without_a_clear_white_are_named(labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "val" / "0_1.tif")
    with pytest.raises(BadInput, match="0_1.tif is not a readable picture: it has mode F, save it with 8 bits"):
        list_images(tmp_path / "val", labelled.parent / "id2label.json").open(0)


def test_images_are_sorted_by_class_and_number(tmp_path: Path) -> None:
    names = ["0_9.png", "0_10.png", "2_1.png", "10_3.png"]
    (tmp_path / "val").mkdir()
    for name in names:
        (tmp_path / "val" / name).touch()
    (tmp_path / "id2label.json").write_text(json.dumps({"0": "ant", "2": "bee", "10": "cat"}))
    images = list_images(tmp_path / "val")
    assert [path.name for path in images.paths] == names
    assert images.truth.tolist() == [0, 0, 1, 2]
