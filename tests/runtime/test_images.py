"""Images: files of every kind as RGB, files with the same pixels, grids, and figures with any text."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from figure_layout import assert_readable
from PIL import Image

from faces.sampling import to_image
from runtime.cli import BadInput
from runtime.images import (
    decoration,
    image_grid,
    labelled_grid,
    line_figure,
    open_image,
    pixel_grid,
    read_as_graded,
    read_image,
    save_animation,
    save_image,
    shorten,
    to_uint8,
)


def some_pictures(count: int, size: int = 28) -> torch.Tensor:
    values = np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return torch.from_numpy(values)


def test_saved_picture_has_its_pixels(tmp_path: Path) -> None:
    picture = some_pictures(1)[0]
    save_image(tmp_path / "a.png", picture)
    with Image.open(tmp_path / "a.png") as file:
        assert file.mode == "RGB"
        assert np.array_equal(np.asarray(file), picture.permute(1, 2, 0).numpy())


def test_the_same_picture_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_image(tmp_path / name, some_pictures(1)[0])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_grid_has_room_for_pictures_and_gaps() -> None:
    grid = image_grid(some_pictures(6, size=4), columns=3, scale=2, gap=1)
    assert (grid.dtype, tuple(grid.shape)) == (torch.uint8, (3, 2 * (8 + 1) + 1, 3 * (8 + 1) + 1))


def test_grid_is_filled_row_by_row_and_enlarged_without_smoothing() -> None:
    images = some_pictures(6, size=4)
    grid = image_grid(images, columns=3, scale=2, gap=1)
    fourth = grid[:, 10:18, 1:9]
    assert torch.equal(fourth, images[3].repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_grid_is_white_between_the_pictures() -> None:
    grid = image_grid(some_pictures(6, size=4), columns=3, gap=1)
    assert bool((grid[:, :, [0, 5, 10, 15]] == 255).all())


@pytest.mark.parametrize(("name", "error"), [("a.webp", 0), ("a.GIF", 1)])
def test_an_animation_shows_its_frames_in_order_and_the_last_one_longer(tmp_path: Path, name: str, error: int) -> None:
    greys = torch.tensor([10, 200, 90], dtype=torch.uint8)
    frames = greys[:, None, None, None].expand(3, 3, 8, 6).clone()
    frames[:, 0, 0, 0] = 255
    save_animation(tmp_path / name, frames, frame_ms=50, last_ms=700)
    with Image.open(tmp_path / name) as file:
        assert (file.size, file.info["loop"]) == ((6, 8), 0)
        for index, milliseconds in enumerate((50, 50, 700)):
            file.seek(index)
            file.load()
            assert file.info["duration"] == milliseconds
            pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
            assert (pixels.int() - frames[index].int()).abs().max() <= error
        with pytest.raises(EOFError):
            file.seek(3)


# ---------------------------------------------------------------- reading

WHITE, RED, GREY = (255, 255, 255), (255, 0, 0), (128, 128, 128)


def turned(path: Path) -> None:
    """Save 40x20, which EXIF turns by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), RED).save(path, exif=exif)


def clear(mode: str) -> Callable[[Path], None]:
    return lambda path: Image.new("RGBA", (20, 40), (255, 0, 0, 0)).convert(mode).save(path)


def clear_palette(path: Path) -> None:
    image = Image.new("P", (20, 40))
    image.putpalette([255, 0, 0])
    image.save(path, transparency=b"\x00")


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.full((40, 20), 128 * 257, np.uint16)).save(path)


def of_mode(mode: str) -> Callable[[Path], None]:
    return lambda path: Image.new("RGB", (20, 40), RED).convert(mode).save(path, quality=100)


@pytest.mark.parametrize(
    ("name", "save", "colour"),
    [
        ("turned.png", turned, RED),
        ("turned.jpg", turned, (254, 0, 0)),
        ("rgba.png", clear("RGBA"), WHITE),
        ("la.png", clear("LA"), WHITE),
        ("rgba.webp", clear("RGBA"), WHITE),
        ("palette.png", clear_palette, WHITE),
        ("palette.gif", of_mode("P"), RED),
        ("deep.png", sixteen_bits, GREY),
        ("deep.tif", sixteen_bits, GREY),
        ("deep.pgm", sixteen_bits, GREY),
        ("cmyk.jpg", of_mode("CMYK"), (254, 0, 0)),
        ("cmyk.tif", of_mode("CMYK"), RED),
    ],
)
def test_an_image_of_any_kind_is_upright_opaque_and_of_8_bits(
    tmp_path: Path, name: str, save: Callable[[Path], None], colour: tuple[int, int, int]
) -> None:
    save(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(tmp_path / name)
        read_as_graded(tmp_path / name)
    assert (image.mode, image.size) == ("RGB", (20, 40))
    assert np.abs(np.asarray(image).astype(int) - colour).max() <= 1
    assert tuple(open_image(tmp_path / name).shape) == (3, 40, 20)


def test_16_bits_become_the_nearest_of_256_levels(tmp_path: Path) -> None:
    deep = np.array([[0, 128, 129, 256, 128 * 257 + 128, 128 * 257 + 129, 65535 - 128, 65535 - 129, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    expected = [0, 0, 1, 1, 128, 129, 255, 254, 255]
    assert np.asarray(read_image(tmp_path / "a.png"))[0].tolist() == [[level] * 3 for level in expected]


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG's bytes with these chunks between header and end."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IEND", b"")]
    body = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


PIXELS = (b"IDAT", zlib.compress(bytes(4 * 13)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html><html></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic",
        b"\x89PNG\r\n\x1a\n",
        png(4, 4, PIXELS)[:40],
        png(4, 4, (b"IDAT", b"no zlib")),
        png(60_000, 60_000, PIXELS),
        png(4, 4, (b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000))), PIXELS),
        b"\xff\xd8\xff\xe0\x00\x10JFIF",
        b"GIF89a",
        b"BM" + bytes(60),
        b"II*\x00\xff\xff\xff\xff",
        b"P5 99999999999999999999 4 255\n",
    ],
    ids=[
        "empty",
        "page",
        "lfs",
        "heic",
        "start",
        "cut",
        "no zlib",
        "bomb",
        "text bomb",
        "jpeg",
        "gif",
        "bmp",
        "tiff",
        "pgm",
    ],
)
def test_a_damaged_image_is_one_line_with_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    for read in (open_image, read_as_graded):
        with pytest.raises(BadInput, match=r"a\.png is not a readable picture: .") as error:
            read(tmp_path / "a.png")
        assert "\n" not in str(error.value)


def test_a_format_that_is_not_read_names_the_cure_and_a_missing_file_itself(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"\x00\x00\x00\x18ftypheic")
    with pytest.raises(BadInput, match=r"a\.heic is not a readable picture: .*save it as JPEG or PNG"):
        read_image(tmp_path / "a.heic")
    with pytest.raises(BadInput, match=r"b\.png does not exist"):
        read_image(tmp_path / "b.png")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(BadInput, match=r"b\.png is a folder, not a picture"):
        read_image(tmp_path / "b.png")


def test_damaged_exif_data_cost_no_image(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), RED).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_image(tmp_path / "a.jpg").size == (8, 8)


@pytest.mark.parametrize(("save", "logged"), [(turned, True), (clear("RGBA"), True), (of_mode("RGB"), False)])
def test_the_graders_reading_ignores_rotation_and_transparency_and_says_so(
    save: Callable[[Path], None], logged: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as file:
        assert read_as_graded(tmp_path / "a.png").tobytes() == file.convert("RGB").tobytes()
    assert (f"{tmp_path / 'a.png'}: rotation, transparency or 16 bits are ignored" in capsys.readouterr().err) == logged


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize(
    "text", ["for $x_{$", "$100", r"\frac{$a$", "猫 и é", "_a", "very long " * 300, "", "two\nlines"]
)
def test_any_text_may_stand_in_a_figure(tmp_path: Path, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labelled_grid(tmp_path / "a.png", some_pictures(1), [text], [text], text)
        line_figure(tmp_path / "b.png", [0, 1], {"loss": {text: [1.0, 2.0], "b": [1.0, 2.0]}}, "step", text)
    assert open_image(tmp_path / "a.png").shape[0] == open_image(tmp_path / "b.png").shape[0] == 3


def test_a_decoration_that_fails_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with decoration(tmp_path / "a.png"):
        raise ValueError("two\nlines")
    assert capsys.readouterr().err == f"warning: no figure {tmp_path / 'a.png'}: two lines\n"


def test_a_decoration_stops_for_ctrl_c(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), decoration(tmp_path / "a.png"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_numbers_never_become_an_image(value: float) -> None:
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0, 0, 0] = value
    for convert in (to_uint8, lambda x: to_image(x[1], "minmax"), lambda x: to_image(x[1], "clamp")):
        with pytest.raises(BadInput, match="NaN or infinite"):
            convert(images)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the figures that would be written."""
    drawn: list[Any] = []
    monkeypatch.setattr("runtime.images.save_figure", lambda path, figure: drawn.append(figure))
    return drawn


DIGITS = [str(digit) for digit in range(10)]


@pytest.mark.parametrize(
    ("rows", "columns", "inch"),
    [
        (DIGITS, [f"noise {digit}" for digit in DIGITS], None),
        (["MNIST-M", "SVHN"], [f"t = {t}" for t in range(6)], 1.1),
        (["picture 0"], ["layout", "joint", "regional", "conductor"], 1.8),
    ],
)
def test_a_labelled_grids_images_have_the_asked_side_and_room_for_labels(
    rows: list[str], columns: list[str], inch: float | None, figures: list[Any]
) -> None:
    images = some_pictures(len(rows) * len(columns))
    labelled_grid(Path("a.png"), images, rows, columns, "A title", **({"inch": inch} if inch else {}))
    (figure,), side = figures, inch or 0.6
    assert_readable(figure, used=0.85)
    assert figure.get_size_inches() == pytest.approx((side * len(columns) + 1, side * len(rows) + 0.7))
    assert figure.get_suptitle() == "A title"
    assert [axis.get_title() for axis in figure.axes] == [*columns, *[""] * (len(images) - len(columns))]
    assert [axis.get_ylabel() for axis in figure.axes[:: len(columns)]] == list(rows)
    for axis, image in zip(figure.axes, images, strict=True):
        assert (axis.images[0].get_array() == image.permute(1, 2, 0).numpy()).all()
        assert axis.get_position().width * figure.get_figwidth() == pytest.approx(side, rel=0.12)
        assert not {*axis.get_xticks(), *axis.get_yticks()}
        assert not axis.get_ylabel() or axis.yaxis.label.get_rotation() == 0
        assert not any(line.get_visible() for line in axis.spines.values())
        assert axis.images[0].get_interpolation() == "nearest"


def test_a_long_label_of_a_row_widens_a_labelled_grid(figures: list[Any]) -> None:
    rows = ["real", "five repeated, of each digit"]
    labelled_grid(Path("a.png"), some_pictures(4), rows, ["0", "1"], "A title")
    (figure,) = figures
    assert figure.get_figwidth() > 2 * 0.6 + 1.5
    assert_readable(figure, used=0.85)
    for axis in figure.axes:
        assert axis.get_position().width * figure.get_figwidth() == pytest.approx(0.6, rel=0.12)


@pytest.mark.parametrize(
    ("rows", "columns", "side", "scale"),
    [(2, 11, 64, 1), (5, 4, 64, 2), (1, 4, 28, 4), (2, 11, 28, 2), (2, 11, 256, 1), (7, 1, 16, 8)],
)
def test_a_pixel_grid_shows_every_pixel_under_letters_of_a_26th_of_its_width(
    tmp_path: Path, rows: int, columns: int, side: int, scale: int
) -> None:
    images = torch.randint(0, 256, (rows * columns, 3, side, side), dtype=torch.uint8)
    labels = [f"{k / 10:g}" for k in range(columns)]
    pixel_grid(tmp_path / "a.png", images, ["slerp"] * rows, labels, "A title")
    figure = open_image(tmp_path / "a.png")
    grid = image_grid(images, columns, scale)
    assert torch.equal(figure[:, -grid.shape[1] :, -grid.shape[2] :], grid)
    above, left = figure[:, : -grid.shape[1]], figure[:, -grid.shape[1] :, : -grid.shape[2]]
    inked = (above < 128).all(0).any(1).nonzero().flatten()
    assert int(inked[-1]) < above.shape[1] - 2
    assert int(inked[0]) > 0
    assert (left < 128).any()
    assert (left[:, :, :1] > 128).all()
    letters = (above < 128).all(0).any(1)[: above.shape[1] // 2]
    assert int(letters.sum()) >= 0.6 * grid.shape[2] / 26


def test_a_pixel_grid_takes_any_text_and_no_labels(tmp_path: Path) -> None:
    for text in ("$x_{$", "猫 и é", "very long " * 40, "", "two\nlines"):
        pixel_grid(tmp_path / "a.png", some_pictures(2), [text], [text, "b"], text)
    pixel_grid(tmp_path / "a.png", some_pictures(2), [""], ["", ""], "")
    assert open_image(tmp_path / "a.png").shape[2] == image_grid(some_pictures(2), 2, 4).shape[2]


def test_a_line_figure_has_a_panel_per_measure_and_a_line_per_label(figures: list[Any]) -> None:
    panels = {
        name: {"MNIST-M": [0.1, 0.2, value], "SVHN": [0.3, 0.1, 0.2]} for name, value in (("recall", 1), ("b", 2))
    }
    line_figure(Path("a.png"), [1.0, 3.0, 5.0], panels, "guidance scale", "A title")
    (figure,) = figures
    assert_readable(figure, used=0.9)
    assert figure.get_size_inches() == pytest.approx((8, 3.2))
    assert figure.get_suptitle() == "A title"
    for axis, (name, lines) in zip(figure.axes, panels.items(), strict=True):
        assert (axis.get_title(), axis.get_xlabel()) == (name, "guidance scale")
        drawn = {line.get_label(): [line.get_xdata().tolist(), line.get_ydata().tolist()] for line in axis.lines}
        assert drawn == {label: [[1, 3, 5], values] for label, values in lines.items()}
        assert {line.get_marker() for line in axis.lines} == {"o"}  # a single value shows, too
    legends = [axis.get_legend() for axis in figure.axes]
    assert [text.get_text() for text in legends[0].get_texts()] == ["MNIST-M", "SVHN"]
    assert legends[1] is None


def test_a_single_panel_has_its_measure_at_the_axis_and_one_title(figures: list[Any]) -> None:
    line_figure(Path("a.png"), [0.0, 1.0], {"loss": {"mean": [0.2, 0.1]}}, "step", "A title")
    (axis,) = figures[0].axes
    assert (figures[0].get_suptitle(), axis.get_title(), axis.get_ylabel()) == ("A title", "", "loss")
    assert_readable(figures[0], used=0.8)


def test_a_figure_has_160_dots_per_inch(tmp_path: Path) -> None:
    labelled_grid(tmp_path / "a.png", some_pictures(6), ["a", "b", "c"], ["d", "e"], "title", inch=0.5)
    assert Image.open(tmp_path / "a.png").size == (round(160 * (2 * 0.5 + 1)), round(160 * (3 * 0.5 + 0.7)))


@pytest.mark.parametrize(("length", "shown"), [(60, "x" * 60), (61, "x" * 58 + "..")])
def test_a_text_over_60_characters_is_cut(length: int, shown: str) -> None:
    assert shorten("x" * length) == shown
    assert shorten(" a \n b ") == "a b"


def test_images_of_a_grid_lie_two_pixels_apart() -> None:
    assert image_grid(some_pictures(2, size=4), columns=2).shape == (3, 4 + 2 * 2, 2 * 4 + 3 * 2)
