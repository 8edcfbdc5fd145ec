"""input.json: read as the homework writes it, and clear about what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from concepts.course_format import image_path, read_input
from runtime.cli import BadInput

DOG: dict[str, Any] = {
    "src_image": "dog",
    "token_name": "<new1>",
    "prompt": ["A <new1> on a bench.", "A <new1> next to a <new2>."],
    "prompt_4_clip_eval": ["A dog on a bench.", "A dog next to a cat."],
    "baseline": [[79, 34.5], [74, 35]],
}
WITHOUT_GRADING = {name: DOG[name] for name in ("src_image", "token_name", "prompt")}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_every_field_of_every_concept_is_read_in_order(tmp_path: Path) -> None:
    style = {"src_image": "David Revoy", "token_name": "<new2>", "prompt": ["Paris in the style of <new2>."]}
    concepts = read_input(write(tmp_path / "input.json", {"style": style, "0": DOG}))
    assert [(one.key, one.source, one.token, one.prompts) for one in concepts] == [
        ("style", "David Revoy", "<new2>", ["Paris in the style of <new2>."]),
        ("0", "dog", "<new1>", DOG["prompt"]),
    ]
    assert [(one.clip_prompts, one.baselines) for one in concepts] == [
        ([], []),
        (DOG["prompt_4_clip_eval"], [(79.0, 34.5), (74.0, 35.0)]),
    ]


def test_pictures_are_named_as_the_course_names_them() -> None:
    assert image_path(Path("out"), "0", 1, 24) == Path("out/0/1/source0_prompt1_24.png")


@pytest.mark.parametrize("name", ["prompt_4_clip_eval", "baseline"])
def test_grading_needs_what_drawing_does_not(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "input.json", {"0": {k: v for k, v in DOG.items() if k != name}})
    assert len(read_input(path)[0].prompts) == 2
    with pytest.raises(BadInput, match=f"'0', {name} is missing"):
        read_input(path, graded=True)


@pytest.mark.parametrize("key", ["", ".", "..", "a/b", "/tmp", "a\\b", "a\0b"])
def test_a_key_that_is_no_folder_name_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="can't name a folder"):
        read_input(write(tmp_path / "input.json", {key: DOG}))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "is not valid JSON"),
        ([DOG], "must be a valid dictionary"),
        ({}, "wanted an object with an entry for each concept"),
        ({"0": "dog"}, "0: must be a valid dictionary, it is 'dog'"),
    ],
)
def test_another_shape_of_file_is_refused(content: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"input\.json.*{named}"):
        read_input(write(tmp_path / "input.json", content))


@pytest.mark.parametrize("name", WITHOUT_GRADING)
def test_a_missing_field_is_named(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "input.json", {"0": {k: v for k, v in DOG.items() if k != name}})
    with pytest.raises(BadInput, match=rf"input\.json, '0', {name} is missing"):
        read_input(path)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("src_image", 3, ", src_image: must be a valid string, it is 3"),
        ("token_name", "", ", token_name: .* it is ''"),
        ("token_name", "<new 1>", ", token_name: must be one word without spaces, it is '<new 1>'"),
        ("token_name", "<new3>", r": prompt\[0\] doesn't hold the token <new3>: 'A <new1> on a bench.'"),
        ("prompt", "A <new1>.", ", prompt: must be a valid list, it is 'A <new1>.'"),
        ("prompt", [], r", prompt: must have at least 1 item .* it is \[\]"),
        ("prompt", ["A <new1>.", None], r", prompt\[1\]: must be a valid string, it is None"),
        ("prompt", ["A <new1>.", "A dog."], r": prompt\[1\] doesn't hold the token <new1>: 'A dog.'"),
        ("prompt_4_clip_eval", {}, ", prompt_4_clip_eval: must be a valid list, it is {}"),
        (
            "prompt_4_clip_eval",
            ["A dog."],
            ": prompt_4_clip_eval must have one item for each of the 2 prompts, it has 1",
        ),
        ("prompt_4_clip_eval", [], r", prompt_4_clip_eval: must have at least 1 item .* it is \[\]"),
        (
            "prompt_4_clip_eval",
            ["A dog.", " "],
            r", prompt_4_clip_eval\[1\]: must have at least 1 character, it is ' '",
        ),
        ("baseline", 70, ", baseline: must be a valid list, it is 70"),
        ("baseline", [[79, 34]], ": baseline must have one item for each of the 2 prompts, it has 1"),
        ("baseline", [[79, 34], [79]], r", baseline\[1\]\[1\] is missing"),
        ("baseline", [[79, 34], ["79", 34]], r", baseline\[1\]\[0\]: must be a valid number, it is '79'"),
        ("baseline", [[79, True], [79, 34]], r", baseline\[0\]\[1\]: must be a valid number, it is True"),
        ("baseline", [[79, float("nan")], [79, 34]], r", baseline\[0\]\[1\]: must be a finite number, it is nan"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"input\.json, '0'{named}"):
        read_input(write(tmp_path / "input.json", {"0": DOG | {name: value}}))


def test_a_file_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere\.json does not exist; .* ntudlcv/DLCV-Fall-2024-HW2"):
        read_input(tmp_path / "nowhere.json")
