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


def write_classes(folder: Path, **images: tuple[str, ...]) -> Path:
    for name, files in images.items():
        (folder / name).mkdir(parents=True)
        for file in files:
            (folder / name / file).touch()
    return folder


def test_a_folder_per_class_holds_its_images_and_hidden_files_are_none(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "val", cat=("b.png", "a.JPG", ".c.png", "notes.txt"), ant=("a.png",))
    images = list_images(folder)
    assert [images.file(row) for row in range(3)] == ["ant/a.png", "cat/a.JPG", "cat/b.png"]
    assert (images.names, images.truth.tolist(), images.folder) == (["ant", "cat"], [0, 1, 1], folder)


def test_the_fingerprint_of_class_folders_knows_the_class_of_an_image(tmp_path: Path) -> None:
    marks = set()
    for name in ("a", "b"):
        folder = write_classes(tmp_path / name, ant=("1.png",), cat=("2.png",))
        (folder / ("ant" if name == "a" else "cat") / "3.png").touch()
        marks.add(list_images(folder).fingerprint)
    assert len(marks) == 2


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            {"cat": ("1.png",), "dog": ()},
            "val/dog holds no pictures: put some of that class there, or remove the folder",
        ),
        ({"cat": ("1.png",), "dog": ("notes.txt",)}, "val/dog holds no pictures"),
        ({"oak_tree": ("1.png",), "Oak tree": ("1.png",)}, "2 classes have the same name .'oak tree'.*apart"),
        ({"cat": ("1.png",), ".": ("0_1.png",)}, "val holds pictures, such as 0_1.png, and folders of .* as cat: give"),
    ],
)
def test_bad_class_folders_are_named(images: dict[str, tuple[str, ...]], message: str, tmp_path: Path) -> None:
    for file in images.pop(".", ()):
        (tmp_path / "val").mkdir()
        (tmp_path / "val" / file).touch()
    with pytest.raises(BadInput, match=message):
        list_images(write_classes(tmp_path / "val", **images))


def test_labels_of_class_folders_are_refused(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "val", cat=("1.png",))
    with pytest.raises(
        BadInput, match="--labels mine.json: the class names are those of the folders in .*leave --labels"
    ):
        list_images(folder, Path("mine.json"))


def test_a_folder_without_images_next_to_the_homeworks_is_no_class(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "val", thumbnails=("index.txt",))
    (folder / "0_1.png").touch()
    (tmp_path / "id2label.json").write_text('["cat"]')
    assert [path.name for path in list_images(folder).paths] == ["0_1.png"]


def test_images_are_sorted_by_class_and_number(tmp_path: Path) -> None:
    names = ["0_9.png", "0_10.png", "2_1.png", "10_3.png"]
    (tmp_path / "val").mkdir()
    for name in names:
        (tmp_path / "val" / name).touch()
    (tmp_path / "id2label.json").write_text(json.dumps({"0": "ant", "2": "bee", "10": "cat"}))
    images = list_images(tmp_path / "val")
    assert [path.name for path in images.paths] == names
    assert images.truth.tolist() == [0, 0, 1, 2]
