"""hw2_data/prepare.py: the course's data checked, MNIST-M and SVHN built, digits drawn, all in the homework's layout."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR100, SVHN

from hw2_data.blend import Maker, blend, find_photographs, load_photograph, random_crop, read_mnist, svhn_image
from hw2_data.prepare import DOMAINS, SPLITS, Course, Public, Rendered, Zeroshot, main, maker_of
from hw2_data.rendered import digit_fonts, rendered_maker
from P1_dataloader import read_csv
from runtime.cli import BadInput
from runtime.files import ROOT
from zeroshot.dataset import list_images

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the original MNIST files in {SHARED}")


def tree(folder: Path) -> dict[str, str]:
    """Every file below `folder` and a hash of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_mnist(folder: Path, count: int = 12) -> None:
    """Write made-up MNIST: four packed IDX files."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, images in (("t10k", count), ("train", count)):
        pixels = rng.integers(0, 256, (images, 28, 28)) * (rng.random((images, 28, 28)) < 0.2)
        head = (0x803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in pixels.shape)
        write_gzip(folder / f"{part}-images-idx3-ubyte.gz", head + pixels.astype(np.uint8).tobytes())
        labels = np.arange(images, dtype=np.uint8) % 10
        write_gzip(
            folder / f"{part}-labels-idx1-ubyte.gz",
            (0x801).to_bytes(4, "big") + images.to_bytes(4, "big") + labels.tobytes(),
        )


def write_gzip(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content))


def write_photographs(folder: Path, size: tuple[int, int] = (60, 40), count: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def originals(tmp_path: Path) -> dict[str, Any]:
    write_mnist(tmp_path / "mnist")
    return {"mnist": tmp_path / "mnist", "backgrounds": write_photographs(tmp_path / "photographs")}


# ---------------------------------------------------------------- MNIST-M


def test_blend_is_the_absolute_difference_of_the_patch_and_the_mask_of_ink() -> None:
    rng = np.random.default_rng(0)
    patch, digit = rng.integers(0, 256, (28, 28, 3), np.uint8), rng.integers(0, 2, (28, 28), np.uint8) * 7
    expected = np.abs(patch.astype(int) - 255 * np.stack([digit > 0] * 3, axis=-1))
    np.testing.assert_array_equal(blend(patch, digit), expected)


def test_a_crop_reaches_all_four_corners() -> None:
    picture: Any = np.arange(29 * 29 * 3).reshape(29, 29, 3)
    rng = np.random.default_rng(0)
    corners = {int(random_crop(picture, rng)[0, 0, 0]) for _ in range(100)}
    assert corners == {int(picture[y, x, 0]) for y in (0, 1) for x in (0, 1)}


def test_every_mnistm_image_is_a_photograph_outside_and_its_negative_inside_the_digit(
    originals: dict[str, Any], tmp_path: Path
) -> None:
    main(Public(output=tmp_path / "out", domains=("mnistm",), **originals))
    digits, _ = read_mnist(originals["mnist"], "train")
    crops = [
        load_photograph(path)[y : y + 28, x : x + 28]
        for path in find_photographs(originals["backgrounds"])
        for y in range(40 - 27)
        for x in range(60 - 27)
    ]
    for index in range(3):
        made = np.asarray(Image.open(tmp_path / "out/mnistm/data" / f"{index:05d}.png")).astype(int)
        background = np.abs(made - 255 * (digits[index] > 0)[..., None])  # the blend undoes itself
        assert any((background == crop).all() for crop in crops)


@needs_shared
def test_the_original_files_are_read() -> None:
    images, labels = read_mnist(SHARED / "mnist", "val")
    assert images.shape == (10_000, 28, 28)
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]


@needs_shared
def test_real_photographs_and_digits_give_real_mnistm(tmp_path: Path) -> None:
    command = Public(output=tmp_path, domains=("mnistm",), train_count=20, val_count=5)
    command.mnist, command.backgrounds = SHARED / "mnist", SHARED / "backgrounds"
    main(command)
    assert read_csv(tmp_path / "mnistm/train.csv").label.tolist()[:5] == [5, 0, 4, 1, 9]
    assert len(read_csv(tmp_path / "mnistm/val.csv")) == 5


def test_torchvisions_layout_is_read_too(originals: dict[str, Any], tmp_path: Path) -> None:
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in originals["mnist"].iterdir():
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    flat, nested = read_mnist(originals["mnist"], "train"), read_mnist(tmp_path / "root", "train")
    np.testing.assert_array_equal(flat[0], nested[0])


def test_a_large_photograph_is_reduced_but_never_below_a_crop(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    Image.new("RGB", (2000, 40)).save(path)
    assert load_photograph(path).shape == (28, 1400, 3)


# ---------------------------------------------------------------- SVHN


def test_svhn_comes_from_the_mat_files_with_label_ten_as_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), np.uint8)
    parts = {}
    for part in ("train", "test"):
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": np.array([[10], [3], [1], [9]])})
        parts[part] = ["", f"{part}_32x32.mat", None]
    monkeypatch.setattr(SVHN, "split_list", parts)
    main(Public(output=tmp_path / "out", domains=("svhn",), svhn=tmp_path))
    assert read_csv(tmp_path / "out/svhn/train.csv").label.tolist() == [0, 3, 1, 9]
    first = np.asarray(Image.open(tmp_path / "out/svhn/data/00000.png"))
    np.testing.assert_array_equal(first, svhn_image(images[..., 0].transpose(2, 0, 1)))


def test_an_svhn_file_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"^--svhn: .*train_32x32\.mat is absent or not the original; leave the flag out"
    ):
        main(Public(output=tmp_path / "out", domains=("svhn",), svhn=tmp_path))


# ---------------------------------------------------------------- CIFAR-100 in the layout of the zero-shot images


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a made-up cifar-100-python.tar.gz: 60 classes, 51 test images each in turn; image i holds the bytes of i. Its sums are set."""
    count = 60 * 51
    pixels = np.arange(count, dtype="<u4")[:, None].repeat(768, 1).view(np.uint8)
    contents = {
        "train": {"data": pixels[:1], "fine_labels": [0]},
        "test": {"data": pixels, "fine_labels": [index % 60 for index in range(count)]},
        "meta": {"fine_label_names": [f"kind_{number:02d}" for number in range(60)]},
    }
    folder, source = tmp_path / "downloads", tmp_path / "cifar-100-python"
    folder.mkdir()
    source.mkdir()
    for name, content in contents.items():
        (source / name).write_bytes(pickle.dumps(content))
    with tarfile.open(folder / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(source, "cifar-100-python")
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in source.iterdir()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums["meta"]})
    packed = (folder / "cifar-100-python.tar.gz").read_bytes()
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(packed).hexdigest())
    return folder


def test_the_substitute_for_the_zero_shot_images_holds_the_first_fifty_of_each_class(
    cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(Zeroshot(cifar=cifar, output=tmp_path / "new" / "zero"))
    names = json.loads((tmp_path / "new/zero/id2label.json").read_text())
    assert list(names) == [str(number) for number in range(50)]
    assert len(set(names.values())) == 50
    assert sorted(path.name for path in (tmp_path / "new/zero").iterdir()) == ["id2label.json", "val"]
    images = list_images(tmp_path / "new/zero/val")
    assert len(images) == 2500
    for path in images.paths[::83]:
        number, index = map(int, path.stem.split("_"))
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((32, 32), "RGB")
            planes = np.asarray(image).transpose(2, 0, 1)
        source = int(names[str(number)][-2:]) + 60 * index  # the index-th image of its class in CIFAR's order
        assert planes.tobytes() == np.full(768, source, "<u4").tobytes()
    assert "a substitute for the course's" in capsys.readouterr().err


def test_the_seed_draws_the_classes_of_the_substitute(cifar: Path, tmp_path: Path) -> None:
    names = []
    for output, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(Zeroshot(cifar=cifar, output=tmp_path / output, seed=seed))
        names.append((tmp_path / output / "id2label.json").read_text())
    assert names[0] == names[1] != names[2]


def test_a_zero_shot_folder_is_only_replaced_on_demand_and_never_if_it_holds_more(cifar: Path, tmp_path: Path) -> None:
    main(Zeroshot(cifar=cifar, output=tmp_path / "zero"))
    with pytest.raises(BadInput, match="zero exists: add --overwrite"):
        main(Zeroshot(cifar=cifar, output=tmp_path / "zero"))
    main(Zeroshot(cifar=cifar, output=tmp_path / "zero", overwrite=True))
    (tmp_path / "zero" / "mine.txt").touch()
    with pytest.raises(BadInput, match="zero is more than val/ and id2label.json: not overwritten"):
        main(Zeroshot(cifar=cifar, output=tmp_path / "zero", overwrite=True))


def test_an_absent_or_damaged_cifar_is_named_and_a_named_folder_is_never_downloaded_to(
    cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("the network is used")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", refuse)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    (cifar / "cifar-100-python.tar.gz").write_bytes(b"another file")
    for folder in (cifar, tmp_path / "nowhere"):
        with pytest.raises(
            BadInput, match=f"^--cifar {folder} holds no CIFAR-100 that is whole: .* cifar-100-python/ with train, test"
        ):
            main(Zeroshot(cifar=folder, output=tmp_path / "zero"))
    with pytest.raises(BadInput, match="the network is used; or give --cifar DIR"):
        main(Zeroshot(downloads=tmp_path / "new", output=tmp_path / "zero"))
    assert not (tmp_path / "zero").exists()


# ---------------------------------------------------------------- layout and seeds


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("drawn")
    main(Rendered(output=output, count=20))
    return output


@pytest.mark.parametrize("domain", ["mnistm", "svhn"])
def test_the_layout_is_the_homeworks(drawn: Path, domain: str) -> None:
    names = [f"{number:05d}.png" for number in range(22)]
    assert sorted(tree(drawn / domain)) == [f"data/{name}" for name in names] + ["train.csv", "val.csv"]
    rows = [f"{name},{number % 10}" for number, name in enumerate(names[:20])]
    assert (drawn / domain / "train.csv").read_text() == "\n".join(["image_name,label", *rows]) + "\n"
    assert (drawn / domain / "val.csv").read_text() == "image_name,label\n00020.png,0\n00021.png,1\n"


@pytest.mark.parametrize("domain", ["mnistm", "svhn"])
def test_no_validation_picture_is_a_training_picture(drawn: Path, domain: str) -> None:
    """They have other names, so their pixels are compared."""
    pixels = [Image.open(path).tobytes() for path in sorted((drawn / domain / "data").iterdir())]
    assert len(set(pixels)) == len(pixels) == 22


def test_mnistms_validation_pictures_have_backgrounds_of_their_own(originals: dict[str, Any], tmp_path: Path) -> None:
    """The made-up MNIST has the same digits in both splits: what differs is the photographs' part."""
    for part in ("images-idx3", "labels-idx1"):
        shutil.copy(originals["mnist"] / f"train-{part}-ubyte.gz", originals["mnist"] / f"t10k-{part}-ubyte.gz")
    main(Public(output=tmp_path / "out", domains=("mnistm",), **originals))
    pixels = [Image.open(path).tobytes() for path in sorted((tmp_path / "out/mnistm/data").iterdir())]
    assert len(set(pixels)) == len(pixels) == 24


def test_the_domains_have_random_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = []

    def record_maker(domain: str, count: int, seed: int, stream: int) -> Maker:
        streams.append((domain, count, seed, stream))
        return Maker(count, lambda index: (np.zeros((28, 28, 3), np.uint8), 0))

    monkeypatch.setattr("hw2_data.prepare.rendered_maker", record_maker)
    for domain in DOMAINS:
        for split in SPLITS:
            maker_of(Rendered(count=30, seed=6), domain, split)
    assert [call[:3] for call in streams] == [("mnistm", 30, 6), ("mnistm", 3, 6), ("svhn", 30, 6), ("svhn", 3, 6)]
    assert len({call[3] for call in streams}) == 4


@pytest.mark.parametrize("domain", ["mnistm", "svhn"])
def test_seed_stream_and_index_are_mixed_not_added(domain: str) -> None:
    """All of these show the same digit, and have the same sum."""
    makers = (rendered_maker(domain, 40, *key) for key in ((0, 0), (10, 0), (0, 10), (10, 10)))
    images = [maker.make(index)[0].tobytes() for maker, index in zip(makers, (20, 10, 10, 0), strict=True)]
    assert len(set(images)) == 4


@pytest.mark.parametrize("domain", ["mnistm", "svhn"])
def test_every_picture_is_28_by_28_in_colour(drawn: Path, domain: str) -> None:
    pictures = [Image.open(path) for path in (drawn / domain / "data").iterdir()]
    assert {(picture.size, picture.mode) for picture in pictures} == {((28, 28), "RGB")}


def test_the_same_seed_gives_the_same_bytes_with_any_other_settings(drawn: Path, tmp_path: Path) -> None:
    main(Rendered(output=tmp_path, count=10, domains=("svhn",)))
    for number in range(10):
        name = f"svhn/data/{number:05d}.png"
        assert (tmp_path / name).read_bytes() == (drawn / name).read_bytes()


def test_another_seed_gives_other_pictures(drawn: Path, tmp_path: Path) -> None:
    main(Rendered(output=tmp_path, count=20, seed=1, domains=("svhn",)))
    old, new = tree(drawn / "svhn"), tree(tmp_path / "svhn")
    assert not [name for name in old if name.startswith("data/") and old[name] == new[name]]


def test_mnistm_depends_on_the_seed_alone(originals: dict[str, Any], tmp_path: Path) -> None:
    for output, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(Public(output=tmp_path / output, domains=("mnistm",), seed=seed, **originals))
    assert tree(tmp_path / "a") == tree(tmp_path / "b") != tree(tmp_path / "c")


def test_the_counts_take_the_first_of_each_split(originals: dict[str, Any], tmp_path: Path) -> None:
    some_counts: dict[str, Any] = {"train_count": 5, "val_count": 3}
    for name, counts in {"all": {}, "some": some_counts}.items():
        main(Public(output=tmp_path / name, domains=("mnistm",), **originals, **counts))
    whole, some = (tmp_path / name / "mnistm" for name in ("all", "some"))
    for split, count in (("train", 5), ("val", 3)):
        rows, first = read_csv(some / f"{split}.csv"), read_csv(whole / f"{split}.csv")[:count]
        assert rows.label.tolist() == first.label.tolist()
        for name, other in zip(rows.image_name, first.image_name, strict=True):
            assert (some / "data" / name).read_bytes() == (whole / "data" / other).read_bytes()


def test_originals_without_a_folder_are_downloaded_to_the_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    maker = Maker(4, lambda index: (np.zeros((28, 28, 3), np.uint8), index))

    def svhn(folder: Path, split: str, download: bool) -> Maker:
        calls.append(("svhn", folder, split, download))
        return maker

    def mnistm(mnist: Path | None, downloads: Path, backgrounds: Path, split: str, key: tuple[int, ...]) -> Maker:
        calls.append(("mnistm", mnist, downloads, backgrounds, split, key[0]))
        return maker

    monkeypatch.setattr("hw2_data.prepare.svhn_maker", svhn)
    monkeypatch.setattr("hw2_data.prepare.mnistm_maker", mnistm)
    downloads, photographs, own = tmp_path / "downloads", tmp_path / "photographs", tmp_path / "own"
    main(Public(output=tmp_path / "a", downloads=downloads, backgrounds=photographs, seed=8))
    main(Public(output=tmp_path / "b", downloads=downloads, backgrounds=photographs, mnist=own, svhn=own))
    assert calls == [
        *(("mnistm", None, downloads, photographs, split, 8) for split in ("train", "val")),
        *(("svhn", downloads, split, True) for split in ("train", "val")),
        *(("mnistm", own, downloads, photographs, split, 0) for split in ("train", "val")),
        *(("svhn", own, split, False) for split in ("train", "val")),
    ]


def test_fonts_with_symbols_in_the_place_of_digits_are_left_out() -> None:
    names = {path.name for path in digit_fonts()}
    assert "DejaVuSans.ttf" in names
    assert not names & {"cmsy10.ttf", "cmex10.ttf", "LastResortHE-Regular.ttf"}


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (Rendered(count=0), "--count 0"),
        (Rendered(count=-3), "--count -3"),
        (Rendered(seed=-1), "--seed -1"),
        (Rendered(domains=()), "--domains"),
        (Public(train_count=0), "--train-count 0"),
        (Public(val_count=-1), "--val-count -1"),
        (Public(domains=("mnistm",)), "www2.eecs.berkeley.edu"),
        (Public(backgrounds=Path("nowhere")), "--backgrounds nowhere"),
        (Course(data=Path("nowhere")), "--data nowhere"),
    ],
)
def test_a_bad_flag_is_named_with_its_value(command: Rendered | Public | Course, message: str, tmp_path: Path) -> None:
    if not isinstance(command, Course):
        command.output = tmp_path
    with pytest.raises(BadInput, match=message):
        main(command)


def test_backgrounds_without_pictures_are_refused(originals: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    originals["backgrounds"] = tmp_path / "empty"
    with pytest.raises(BadInput, match="no pictures"):
        main(Public(output=tmp_path / "out", domains=("mnistm",), **originals))


def test_backgrounds_smaller_than_a_digit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="all 2 pictures are smaller than 28x28"):
        find_photographs(write_photographs(tmp_path / "tiny", size=(27, 100)))


def test_a_photograph_cut_off_is_named(tmp_path: Path) -> None:
    path = write_photographs(tmp_path / "p", count=1) / "0.png"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BadInput, match=r"0\.png is damaged"):
        load_photograph(path)


@pytest.mark.parametrize("damage", ["truncated gzip", "truncated array", "not gzip", "absent"])
def test_a_corrupt_mnist_file_is_named(originals: dict[str, Any], damage: str) -> None:
    path = originals["mnist"] / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    if damage == "absent":
        path.unlink()
    else:
        cut = gzip.compress(gzip.decompress(whole)[:-5])
        path.write_bytes({"truncated gzip": whole[:-50], "truncated array": cut, "not gzip": b"text"}[damage])
    with pytest.raises(BadInput, match="train-images-idx3-ubyte"):
        read_mnist(originals["mnist"], "train")


def test_an_existing_domain_is_refused_and_kept(drawn: Path) -> None:
    before = tree(drawn)
    with pytest.raises(BadInput, match="--overwrite"):
        main(Rendered(output=drawn, count=1))
    assert tree(drawn) == before


def test_overwrite_replaces_the_domain_and_leaves_nothing_else(drawn: Path, tmp_path: Path) -> None:
    shutil.copytree(drawn, tmp_path / "d")
    main(Rendered(output=tmp_path / "d", count=1, overwrite=True))
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["mnistm", "svhn"]
    assert len(tree(tmp_path / "d" / "svhn")) == 4


def test_overwrite_spares_a_folder_that_holds_something_else(drawn: Path, tmp_path: Path) -> None:
    shutil.copytree(drawn, tmp_path / "d")
    (tmp_path / "d" / "svhn" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="move it away"):
        main(Rendered(output=tmp_path / "d", count=1, overwrite=True))


def test_a_failure_half_way_loses_nothing(originals: dict[str, Any], tmp_path: Path) -> None:
    command = Public(output=tmp_path / "out", domains=("mnistm",), **originals)
    main(command)
    before = tree(tmp_path / "out")
    (originals["backgrounds"] / "1.png").write_bytes((originals["backgrounds"] / "1.png").read_bytes()[:2000])
    load_photograph.cache_clear()
    command.overwrite = True
    with pytest.raises(BadInput, match="damaged"):
        main(command)
    assert tree(tmp_path / "out") == before


# ---------------------------------------------------------------- the course's folder


def test_a_usable_course_folder_is_counted(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(drawn, tmp_path / "digits")
    main(Course(data=tmp_path))
    printed = capsys.readouterr().out
    assert "train.csv         20 images" in printed
    assert "56000 images" in printed
    assert "79431 images" in printed
    assert "face: absent" in printed
    assert "Classifier.pth: absent" in printed


def test_an_absent_domain_is_named(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(drawn, tmp_path / "digits")
    shutil.rmtree(tmp_path / "digits" / "svhn")
    (tmp_path / "Classifier.pth").touch()
    with pytest.raises(BadInput, match="digits/svhn is absent"):
        main(Course(data=tmp_path))
    printed = capsys.readouterr().out
    assert "digits/svhn: absent" in printed
    assert "Classifier.pth\n" in printed


def test_the_other_parts_are_compared_with_the_course(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(drawn, tmp_path / "digits")
    (tmp_path / "face" / "noise").mkdir(parents=True)
    torch.save(torch.zeros(1, 3, 256, 256), tmp_path / "face/noise/00.pt")
    (tmp_path / "textual_inversion").mkdir()
    entry: dict[str, Any] = {
        "src_image": "dog",
        "token_name": "<new1>",
        "prompt": ["a <new1>"],
        "prompt_4_clip_eval": ["a dog"],
        "baseline": [[70, 30]],
    }
    (tmp_path / "textual_inversion/input.json").write_text(json.dumps({"0": entry}))
    main(Course(data=tmp_path))
    printed = capsys.readouterr().out
    assert "NOT AS IN THE COURSE: noise/: 1 of 10 files, 1 of the right shape" in printed
    assert "UNUSABLE: " + str(tmp_path / "face/UNet.pt") in printed
    assert "  ok: input.json 0: <new1>" in printed

    (tmp_path / "textual_inversion/input.json").write_text(json.dumps({"0": entry, "1": {**entry, "baseline": []}}))
    main(Course(data=tmp_path))
    assert "input.json, '1': baseline must have one item for each of the 1 prompts" in capsys.readouterr().out


def test_val_csv_may_be_absent(drawn: Path, tmp_path: Path) -> None:
    shutil.copytree(drawn, tmp_path / "digits")
    (tmp_path / "digits/svhn/val.csv").unlink()
    main(Course(data=tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "train.csv").unlink(), "does not exist"),
        (lambda d: (d / "train.csv").write_text(",image_name,label\n0,00000.png,1\n"), "header"),
        (lambda d: (d / "train.csv").write_text("image_name,label\n00000.png,ten\n"), "ten"),
        (lambda d: (d / "data/00003.png").unlink(), "1 of 20 images are missing, first 00003.png"),
        (lambda d: (d / "data/00003.png").write_bytes(b"PNG"), "00003.png"),
    ],
    ids=["no train.csv", "index column", "label", "missing image", "broken image"],
)
def test_unusable_digits_are_an_error_that_names_them(
    drawn: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(drawn, tmp_path / "digits")
    damage(tmp_path / "digits" / "mnistm")
    with pytest.raises(BadInput, match=message):
        main(Course(data=tmp_path))


# ---------------------------------------------------------------- as a command


def test_from_any_directory_a_file_in_the_way_ends_with_one_line_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    script = str(ROOT / "hw2_data" / "prepare.py")
    command = [sys.executable, script, "rendered", "--output", "file"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: --output file: a file is in the way, name a folder"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_leaves_no_folder(number: int, tmp_path: Path) -> None:
    script = str(ROOT / "hw2_data" / "prepare.py")
    command = [sys.executable, script, "rendered", "--count", "100000", "--output", str(tmp_path / "digits")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not any(tmp_path.glob("digits/.mnistm-*/new/data/*.png")):
            time.sleep(0.05)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    assert (process.returncode, errors.splitlines()[-1]) == (130, "error: interrupted")
    assert not (tmp_path / "digits").exists()


def test_the_command_line_reaches_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["rendered", "--count", "2", "--domains", "svhn", "--output", "here"]
    main(tyro.cli(Course | Public | Rendered, args=arguments, config=(tyro.conf.OmitArgPrefixes,)))
    assert len(list((tmp_path / "here/svhn/data").iterdir())) == 3


# the test that holds the effect of each flag
HELD_BY = {
    "data": test_a_usable_course_folder_is_counted,
    "output": test_the_layout_is_the_homeworks,
    "domains": test_the_command_line_reaches_the_work,
    "seed": test_the_domains_have_random_streams_of_their_own,
    "overwrite": test_overwrite_replaces_the_domain_and_leaves_nothing_else,
    "mnist": test_originals_without_a_folder_are_downloaded_to_the_downloads,
    "backgrounds": test_every_mnistm_image_is_a_photograph_outside_and_its_negative_inside_the_digit,
    "svhn": test_svhn_comes_from_the_mat_files_with_label_ten_as_zero,
    "downloads": test_originals_without_a_folder_are_downloaded_to_the_downloads,
    "train_count": test_the_counts_take_the_first_of_each_split,
    "val_count": test_the_counts_take_the_first_of_each_split,
    "count": test_the_layout_is_the_homeworks,
}


def test_the_effect_of_every_flag_is_tested() -> None:
    assert set(HELD_BY) == {field.name for command in (Course, Public, Rendered) for field in fields(command)}
