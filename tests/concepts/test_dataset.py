"""A concept's folder: its images, and the sentences next to them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from concepts.dataset import image_files, read_images, read_sentences
from runtime.cli import BadInput


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "00.png")
    return tmp_path / "00.png"


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (b"a {} on a table\n\n  {} in the rain  \n", ["a <new1> on a table", "<new1> in the rain"]),
        (b"\xef\xbb\xbfa {}\r\n", ["a <new1>"]),
        ("{} und ein Haus \u00fc".encode(), ["<new1> und ein Haus \u00fc"]),
        (b"", []),
        (b" \n\n", []),
    ],
    ids=["two", "byte order mark", "umlaut", "empty", "blank"],
)
def test_sentences_next_to_an_image_have_the_token_in_their_braces(
    image: Path, text: bytes, sentences: list[str]
) -> None:
    image.with_suffix(".txt").write_bytes(text)
    assert read_sentences(image, "<new1>") == sentences


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b"a {} here\na dog on a table\n",
            "line 2: 'a dog on a table' wants {} where <new1> stands; put it in, or move",
        ),
        (
            b"a photo of <new1>\n",
            "line 1: 'a photo of <new1>' wants {} where <new1> stands; put it in, or move the file",
        ),
        (b"1girl, {name}, solo", "line 1: .* wants {}"),
        (b"\xff\xfea\x00", "is not a text in UTF-8"),
    ],
    ids=["the second line", "the token itself", "another field", "UTF-16"],
)
def test_a_sentence_without_the_token_is_named_with_its_file(image: Path, text: bytes, message: str) -> None:
    image.with_suffix(".txt").write_bytes(text)
    with pytest.raises(BadInput, match=rf"00\.txt.*{message}") as error:
        read_sentences(image, "<new1>")
    assert "\n" not in str(error.value)


def test_what_is_no_image_is_skipped_with_a_line_and_hidden_files_without(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("00.txt", "notes.txt", "01.heic", ".DS_Store", "._00.png", "Thumbs.db"):
        (image.parent / name).write_text("a {}")
    (image.parent / "folder.png").mkdir()
    assert image_files(image.parent) == [image]
    lines = capsys.readouterr().err.splitlines()
    assert [Path(line.split(" is no picture")[0]).name for line in lines[:-1]] == ["01.heic", "notes.txt"]
    assert len(read_images(image.parent)) == 1


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--images .* holds no picture"):
        image_files(tmp_path)
    with pytest.raises(BadInput, match="--images .*absent is not a folder"):
        image_files(tmp_path / "absent")
