"""P1's data: checked files, a cache that is valid or rebuilt, and balanced draws."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.plain_p1 import DigitFolder
from P1_dataloader import (
    BalancedIndex,
    Digits,
    Split,
    load_digits,
    load_domain,
    read_csv,
    read_digit,
    split_tables,
)
from runtime.cli import BadInput
from runtime.images import to_float, to_uint8

MNISTM, SVHN = 0, 1
FullDisk = Callable[[int], AbstractContextManager[None]]


def random_image(seed: int = 99, size: int = 28, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def cache_of(root: Path, name: str = "mnistm") -> Path:
    return root / ".cache" / f"{name}.safetensors"


# ---------------------------------------------------------------- splits and tensors


def test_both_domains_come_with_digits_and_domains(digits_folder: Path) -> None:
    data = load_digits(digits_folder, "train")
    assert (data.images.dtype, tuple(data.images.shape)) == (torch.uint8, (60, 3, 28, 28))
    assert data.digits.tolist() == [i % 10 for i in range(40)] + [i % 10 for i in range(20)]
    assert data.domains.tolist() == [MNISTM] * 40 + [SVHN] * 20


def test_one_domain_needs_no_data_of_the_other(digits_folder: Path) -> None:
    shutil.rmtree(digits_folder / "mnistm")
    svhn = load_digits(digits_folder, "train", [SVHN])
    assert (len(svhn), set(svhn.domains.tolist())) == (20, {SVHN})


@pytest.mark.parametrize("split", ["train", "val"])
def test_cache_holds_the_same_tensors_as_the_plain_reader(digits_folder: Path, split: Split) -> None:
    data = load_digits(digits_folder, split, [SVHN])
    folder = digits_folder / "svhn"
    reader = DigitFolder(folder, read_csv(folder / f"{split}.csv"), SVHN)
    images, digits, domains = (
        torch.stack(tensors) for tensors in zip(*(reader[k] for k in range(len(reader))), strict=True)
    )
    assert torch.equal(to_float(data.images), images)
    assert torch.equal(data.digits, digits.argmax(1))
    assert torch.equal(data.domains, domains.argmax(1))


def test_plain_reader_gives_one_hot_labels_and_images_from_minus_1_to_1(digits_folder: Path) -> None:
    folder = digits_folder / "mnistm"
    image, digit, domain = DigitFolder(folder, read_csv(folder / "train.csv"), MNISTM)[7]
    assert digit.tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert domain.tolist() == [1, 0]
    assert -1 <= float(image.min()) < -0.9
    assert 0.9 < float(image.max()) <= 1


def test_every_grey_level_survives_the_conversion_to_float_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)


def test_to_uint8_clamps_values_outside_the_range() -> None:
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_val_csv_is_the_validation_split(digits_folder: Path) -> None:
    assert load_digits(digits_folder, "val").digits.tolist() == [3, 1, 4, 1] * 2


def test_without_val_csv_5_percent_of_train_are_held_out(digits_folder: Path) -> None:
    (digits_folder / "mnistm" / "val.csv").unlink()
    tables = split_tables(digits_folder / "mnistm")
    assert {split: len(table) for split, table in tables.items()} == {"train": 38, "val": 2}


def test_held_out_rows_and_the_others_are_disjoint_and_complete(digits_folder: Path) -> None:
    (digits_folder / "mnistm" / "val.csv").unlink()
    tables = split_tables(digits_folder / "mnistm")
    names = [name for table in tables.values() for name in table.image_name]
    assert sorted(names) == [f"{index:05d}.png" for index in range(40)]


def test_held_out_rows_are_always_the_same(digits_folder: Path) -> None:
    (digits_folder / "mnistm" / "val.csv").unlink()
    first, second = (split_tables(digits_folder / "mnistm")["val"] for _ in range(2))
    assert first.equals(second)


# ---------------------------------------------------------------- the cache


def test_cache_is_used_instead_of_the_image_files(digits_folder: Path) -> None:
    before = load_digits(digits_folder, "train")
    path = digits_folder / "mnistm" / "data" / "00000.png"
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)  # unreadable, but of the same size and time
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(load_digits(digits_folder, "train").images, before.images)


def test_valid_cache_is_not_written_again(digits_folder: Path) -> None:
    load_digits(digits_folder, "train")
    before = cache_of(digits_folder).stat()
    load_digits(digits_folder, "val")
    after = cache_of(digits_folder).stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


def test_cache_is_rebuilt_when_an_image_changes(digits_folder: Path) -> None:
    load_digits(digits_folder, "train")
    random_image().save(digits_folder / "mnistm" / "data" / "00003.png")
    images = load_digits(digits_folder, "train").images
    assert np.array_equal(images[3].permute(1, 2, 0).numpy(), np.asarray(random_image()))


def test_cache_is_rebuilt_when_a_label_changes(digits_folder: Path) -> None:
    load_digits(digits_folder, "train")
    csv = digits_folder / "mnistm" / "train.csv"
    csv.write_text(csv.read_text().replace("00003.png,3", "00003.png,8"))
    assert int(load_digits(digits_folder, "train").digits[3]) == 8


def test_cache_is_rebuilt_when_names_are_exchanged(digits_folder: Path) -> None:
    before = load_digits(digits_folder, "train").images
    csv = digits_folder / "mnistm" / "train.csv"
    text = csv.read_text().replace("00003.png", "spare").replace("00013.png", "00003.png")
    csv.write_text(text.replace("spare", "00013.png"))
    after = load_digits(digits_folder, "train").images
    assert torch.equal(after[[3, 13]], before[[13, 3]])


def test_cache_is_rebuilt_when_val_csv_appears(digits_folder: Path) -> None:
    val = digits_folder / "mnistm" / "val.csv"
    text = val.read_text()
    val.unlink()
    load_digits(digits_folder, "val")
    val.write_text(text)
    assert load_digits(digits_folder, "val", [MNISTM]).digits.tolist() == [3, 1, 4, 1]


def flip_a_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [flip_a_byte, lambda content: content[:-100], lambda _: b""], ids=["flipped bit", "truncated", "empty"]
)
def test_damaged_cache_is_rebuilt(digits_folder: Path, damage: Callable[[bytes], bytes]) -> None:
    before = load_digits(digits_folder, "train", [MNISTM]).images.clone()
    cache = cache_of(digits_folder)
    replacement = cache.with_name("damaged")
    replacement.write_bytes(damage(cache.read_bytes()))
    replacement.replace(cache)  # a new file: the old one may still be mapped
    assert torch.equal(load_digits(digits_folder, "train", [MNISTM]).images, before)
    assert torch.equal(load_file(cache)["train_images"], before)


@pytest.fixture
def read_only(digits_folder: Path) -> Iterator[Path]:
    """Copy the data to a folder that this process may read and not write, even when it runs as root."""
    if not hasattr(os, "seteuid"):
        pytest.skip("permissions as on Unix are needed")
    with tempfile.TemporaryDirectory() as outer:
        Path(outer).chmod(0o755)  # tmp_path itself is closed to other users
        root = shutil.copytree(digits_folder, Path(outer) / "digits")
        root.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield root
        finally:
            os.seteuid(user)
            root.chmod(0o755)


def test_read_only_folder_works_and_warns_once_per_domain(read_only: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert len(load_digits(read_only, "train")) == 60
    assert capfd.readouterr().err.count("warning: no cache of the decoded pictures") == 2
    assert not (read_only / ".cache").exists()


def test_full_disk_costs_only_the_cache(
    digits_folder: Path, full_disk: FullDisk, capfd: pytest.CaptureFixture[str]
) -> None:
    with full_disk(1000):
        assert len(load_domain(digits_folder, MNISTM)["train_images"]) == 40
    assert "warning: no cache of the decoded pictures" in capfd.readouterr().err


# ---------------------------------------------------------------- bad data

HEADER = "image_name,label\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "train.csv is empty"),
        (HEADER, "train.csv has a header but no rows"),
        ("00000.png,0\n00001.png,1\n", "train.csv: the header must be image_name,label, it is 00000.png,0"),
        (",image_name,label\n0,00000.png,0\n", "train.csv: the header must be image_name,label, it is "),
        (HEADER + "00000.png,0\n00001.png,10\n", "train.csv, row 3: label '10' is not a digit"),
        (HEADER + "00000.png,x\n", "train.csv, row 2: label 'x' is not a digit"),
        (HEADER + "00000.png,\n", "train.csv, row 2: label '' is not a digit"),
        (HEADER + "00000.png,-1\n", "train.csv, row 2: label '-1' is not a digit"),
        (HEADER + "00000.png,1.0\n", "train.csv, row 2: label '1.0' is not a digit"),
        (HEADER + "a.png,0\nb.png,1\na.png,0\n", "train.csv, row 4: a.png appears twice"),
        ("\n" + HEADER + "a.png,0\n\n\nb.png,x\n", "train.csv, row 6: label 'x' is not a digit"),
        (HEADER + "a.png,0\n\na.png,1\n", "train.csv, row 4: a.png appears twice"),
    ],
)
def test_bad_csv_is_refused_with_file_and_row(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(BadInput, match=message):
        read_csv(tmp_path / "train.csv")


@pytest.mark.parametrize("name", ["", ".", "../data"])
def test_a_folder_in_an_images_place_is_named_with_its_row(digits_folder: Path, name: str) -> None:
    table = digits_folder / "svhn" / "train.csv"
    table.write_text(f"{table.read_text()}\n\n{name},3\n")
    row = len(table.read_text().splitlines())
    with pytest.raises(BadInput, match=f"svhn.*train.csv, row {row}: image data/{name} is no file"):
        load_digits(digits_folder, "train")


@pytest.mark.parametrize("rows", ["a.png,1\nb.png,2,3\n", "0,a.png,1\n1,b.png,2\n"], ids=["one row", "every row"])
def test_rows_of_three_fields_are_refused_in_one_line(tmp_path: Path, rows: str) -> None:
    (tmp_path / "train.csv").write_text(HEADER + rows)
    with pytest.raises(BadInput, match=r"train\.csv.*\d.*3") as caught:
        read_csv(tmp_path / "train.csv")
    assert "\n" not in str(caught.value)


def test_names_that_look_like_missing_values_are_names(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(HEADER + "NA,3\n")
    assert read_csv(tmp_path / "train.csv").image_name.tolist() == ["NA"]


def test_missing_csv_says_how_to_make_the_data(digits_folder: Path) -> None:
    (digits_folder / "svhn" / "train.csv").unlink()
    with pytest.raises(BadInput, match=r"svhn/train\.csv does not exist; make the data with"):
        load_digits(digits_folder, "train")


def test_missing_folder_says_how_to_make_the_data(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no data folder .*nowhere; make one with"):
        load_digits(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("with_val", [True, False], ids=["with val.csv", "without val.csv"])
def test_missing_image_is_named_with_its_row_in_the_csv(digits_folder: Path, with_val: bool) -> None:
    if not with_val:
        (digits_folder / "mnistm" / "val.csv").unlink()
    (digits_folder / "mnistm" / "data" / "00037.png").unlink()
    with pytest.raises(BadInput, match=r"mnistm.*train.* row 39: .*00037\.png does not exist"):
        load_digits(digits_folder, "train")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_image_is_named(digits_folder: Path, split: str) -> None:
    name = {"train": "00017.png", "val": "00042.png"}[split]
    path = digits_folder / "mnistm" / "data" / name
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(BadInput, match=f"{name} is not a readable picture"):
        load_digits(digits_folder, "train")


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(BadInput, match=r"a\.png is not a readable picture"):
        read_digit(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_grey_and_palette_images_are_converted(tmp_path: Path, mode: str) -> None:
    random_image(mode=mode).save(tmp_path / "a.png")
    expected = np.asarray(random_image(mode=mode).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(read_digit(tmp_path / "a.png"), expected)


def test_sixteen_bits_keep_their_grey(tmp_path: Path) -> None:
    Image.fromarray(np.full((28, 28), 134 * 257, np.uint16)).save(tmp_path / "a.png")
    assert (read_digit(tmp_path / "a.png") == 134).all()


def test_a_csv_may_begin_with_a_byte_order_mark(digits_folder: Path) -> None:
    path = digits_folder / "mnistm" / "train.csv"
    plain = read_csv(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_csv(path).equals(plain)


def test_an_image_of_another_size_is_resized(tmp_path: Path) -> None:
    Image.new("RGB", (56, 40), (10, 200, 30)).save(tmp_path / "a.png")
    image = read_digit(tmp_path / "a.png")
    assert image.shape == (3, 28, 28)
    assert image.reshape(3, -1).T.tolist() == [[10, 200, 30]] * 784


def test_a_domain_of_another_size_gives_one_warning(digits_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = sorted((digits_folder / "svhn" / "data").iterdir())
    for path in paths[3:]:
        random_image(size=32).save(path)
    load_digits(digits_folder, "train")
    warning = f"is 32x32: resized to 28x28 (and {len(paths) - 4} more pictures of other sizes)"
    assert capfd.readouterr().err.count(warning) == 1


def test_a_single_image_leaves_none_to_hold_out(digits_folder: Path) -> None:
    table = digits_folder / "svhn" / "train.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:2]))
    (digits_folder / "svhn" / "val.csv").unlink(missing_ok=True)
    with pytest.raises(BadInput, match=r"svhn.train\.csv has one picture"):
        load_digits(digits_folder, "train")


def test_data_of_the_right_size_gives_no_warning(digits_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_digits(digits_folder, "train")
    assert "warning" not in capfd.readouterr().err


# ---------------------------------------------------------------- balanced draws

DRAWS = 40_000
SVHN_COUNTS = (53, 152, 117, 90, 80, 75, 62, 61, 54, 50)  # the course's imbalance in small


def digits(svhn: tuple[int, ...] = SVHN_COUNTS, mnistm: tuple[int, ...] = (20,) * 9 + (120,)) -> Digits:
    """Return shuffled labels with these counts per digit; the images are empty."""
    rows = [(MNISTM, d) for d, n in enumerate(mnistm) for _ in range(n)]
    rows += [(SVHN, d) for d, n in enumerate(svhn) for _ in range(n)]
    shuffled = torch.tensor(rows)[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]
    return Digits(torch.zeros(len(rows), 1, dtype=torch.uint8), shuffled[:, 1], shuffled[:, 0])


def shares(data: Digits, svhn: float | None = 0.5, by_digit: bool = True) -> torch.Tensor:
    """Return the share of the draws [2,10] per domain and digit."""
    uniform = torch.rand(2, DRAWS, generator=torch.Generator().manual_seed(0))
    rows = BalancedIndex(data, svhn, by_digit)(*uniform)
    return torch.bincount(data.domains[rows] * 10 + data.digits[rows], minlength=20).view(2, 10) / DRAWS


def test_domains_come_equally_often() -> None:
    assert shares(digits()).sum(1).tolist() == pytest.approx([0.5, 0.5], abs=0.01)


def test_svhn_gets_its_chosen_share() -> None:
    assert shares(digits(), 0.7).sum(1).tolist() == pytest.approx([0.3, 0.7], abs=0.01)


def test_svhn_digits_come_equally_often() -> None:
    assert shares(digits())[SVHN].tolist() == pytest.approx([0.05] * 10, abs=0.005)


def test_svhn_digits_keep_their_shares_when_balancing_is_off() -> None:
    expected = (torch.tensor(SVHN_COUNTS) / sum(SVHN_COUNTS) / 2).tolist()
    assert shares(digits(), by_digit=False)[SVHN].tolist() == pytest.approx(expected, abs=0.005)


def test_mnistm_digits_keep_their_shares() -> None:
    assert float(shares(digits())[MNISTM, 9]) == pytest.approx(120 / 300 / 2, abs=0.01)


@pytest.mark.parametrize("by_digit", [True, False])
def test_domains_keep_their_shares_when_balancing_is_off(by_digit: bool) -> None:
    total = 300 + sum(SVHN_COUNTS)
    assert float(shares(digits(), None, by_digit)[MNISTM].sum()) == pytest.approx(300 / total, abs=0.01)


def test_every_image_of_a_digit_comes_equally_often() -> None:
    data = digits()
    uniform = torch.rand(2, DRAWS, generator=torch.Generator().manual_seed(0))
    hits = torch.bincount(BalancedIndex(data, 0.5, True)(*uniform), minlength=len(data)).float()
    ones = hits[(data.domains == SVHN) & (data.digits == 1)]
    assert float(ones.min()) > 0
    assert float(ones.var() / ones.mean()) == pytest.approx(1, abs=0.4)  # as counts of a fair draw scatter


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24, 1.0])
@pytest.mark.parametrize("svhn", [SVHN_COUNTS, SVHN_COUNTS[:9] + (0,)], ids=["all digits", "no 9"])
def test_the_edges_of_the_unit_square_are_rows_of_the_data(svhn: tuple[int, ...], u: float) -> None:
    data = digits(svhn)
    row = int(BalancedIndex(data, 0.5, True)(torch.tensor([u]), torch.tensor([u])))
    assert 0 <= row < len(data)


@pytest.mark.parametrize("missing", [0, 5, 9])
def test_a_digit_without_images_is_never_drawn_and_the_others_stay_equal(missing: int) -> None:
    counts = [*SVHN_COUNTS]
    counts[missing] = 0
    expected = [0.0 if digit == missing else 0.5 / 9 for digit in range(10)]
    assert shares(digits(tuple(counts)))[SVHN].tolist() == pytest.approx(expected, abs=0.005)


def test_a_digit_without_images_does_not_change_the_shares_of_the_domains() -> None:
    svhn = (30,) * 9 + (0,)
    assert shares(digits(svhn, mnistm=(27,) * 10), svhn=None).sum(1).tolist() == pytest.approx([0.5, 0.5], abs=0.01)
