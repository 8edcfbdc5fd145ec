"""Check the course's data, or build a substitute in its layout: digits/{mnistm,svhn}/{data/*.png,train.csv,val.csv}, clip_zeroshot/.

Examples:
  python hw2_data/prepare.py course --data hw2_data
  python hw2_data/prepare.py public --backgrounds BSDS500/data/images
  python hw2_data/prepare.py public --mnist DIR --backgrounds DIR --svhn DIR --train-count 5000
  python hw2_data/prepare.py rendered --count 2000 --output /tmp/digits
  python hw2_data/prepare.py zeroshot
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

import repository_root  # noqa: F401  # isort: split
import torch
from PIL import Image
from torch import Tensor

from concepts.course_format import read_input
from hw2_data.blend import BSDS500, Maker, Split, mnistm_maker, svhn_maker
from hw2_data.rendered import rendered_maker
from P1_dataloader import read_csv, read_digit
from runtime.cli import BadInput, Seed, check_not_negative, check_positive, log, progress, run_script
from runtime.files import load_tensors, output_folder, require_file, write_json
from runtime.hub import first_line
from runtime.images import open_image
from zeroshot.dataset import list_images

HERE = Path(__file__).resolve().parent
Domain = Literal["mnistm", "svhn"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)
SPLITS: tuple[Split, ...] = get_args(Split)
DOMAIN_PARTS = ("data/", "train.csv", "val.csv")
ZEROSHOT_PARTS = ("val/", "id2label.json")
ZEROSHOT_CLASSES = ZEROSHOT_IMAGES = 50  # images of each class

# Images per digit 0..9 in the course's train.csv
COURSE_COUNTS = {
    "mnistm": (5516, 6269, 5655, 5745, 5428, 5018, 5510, 5866, 5443, 5550),
    "svhn": (5330, 15201, 11715, 9021, 8022, 7455, 6238, 6057, 5381, 5011),
}


@dataclass
class Course:
    """Check an unpacked course folder; exit code 2 when its digits are unusable."""

    data: Path = HERE
    """Folder with digits/ and, if present, face/, clip_zeroshot/ and textual_inversion/."""


@dataclass
class Output:
    """The flags that both building commands share."""

    output: Path = HERE / "digits"
    """Folder for mnistm/ and svhn/."""
    domains: tuple[Domain, ...] = DOMAINS
    """Which domains to build."""
    seed: Seed = 0
    """The same seed gives the same bytes."""
    overwrite: bool = False
    """Replace existing domain folders, once the new ones are complete."""


@dataclass
class Public(Output):
    """Build MNIST-M (Ganin et al. 2016) and SVHN. MNIST and SVHN are downloaded unless their folders are given."""

    mnist: Path | None = None
    """Folder with the four MNIST files, or in torchvision's layout. None = download."""
    backgrounds: Path | None = None
    """Folder of photographs such as BSDS500's, with its subfolders. Required unless --domains svhn."""
    svhn: Path | None = None
    """Folder with train_32x32.mat and test_32x32.mat. None = download."""
    downloads: Path = HERE / "downloads"
    """Folder for downloads."""
    train_count: int | None = None
    """Images per domain in train.csv at most: the first ones of the training set. None = all."""
    val_count: int | None = None
    """Images per domain in val.csv at most: the first ones of the test set. None = all."""


@dataclass
class Rendered(Output):
    """Render digits in the style of both domains, every digit equally often, without any download."""

    count: int = 2000
    """Images per domain in train.csv; val.csv has a tenth of that."""


@dataclass
class Zeroshot:
    """Build a substitute for the course's zero-shot images: 50 images of each of 50 classes of CIFAR-100's test set.

    The course's images also show classes of CIFAR-100. Here the seed chooses the classes, so accuracies differ from the report's.
    """

    cifar: Path | None = None
    """Folder with cifar-100-python/ or cifar-100-python.tar.gz. None = download (169 MB)."""
    downloads: Path = HERE / "downloads"
    """Folder for downloads."""
    output: Path = HERE / "clip_zeroshot"
    """Folder for val/ and id2label.json."""
    seed: Seed = 0
    """Seed of the random choice of classes."""
    overwrite: bool = False
    """Replace an existing folder, once the new one is complete."""


def main(command: Course | Public | Rendered | Zeroshot) -> None:
    """Run the chosen command."""
    if isinstance(command, Course):
        check_course(command.data)
        return
    if isinstance(command, Zeroshot):
        write_zeroshot(command)
        return
    check_flags(command)
    makers = {domain: {split: maker_of(command, domain, split) for split in SPLITS} for domain in command.domains}
    for domain, splits in makers.items():
        write_domain(command.output / domain, splits, command.overwrite)


# ---------------------------------------------------------------- what to build


def check_flags(command: Public | Rendered) -> None:
    """Raise BadInput for an invalid number and for domain folders that can't be written or may not be replaced.

    Create the folder --output.
    """
    counts = ("count",) if isinstance(command, Rendered) else ("train_count", "val_count")
    check_positive(command, *(name for name in counts if getattr(command, name) is not None))
    check_not_negative(command, "seed")
    if not command.domains:
        raise BadInput("--domains: name mnistm, svhn or both")
    for domain in command.domains:
        check_target(output_folder(command.output) / domain, DOMAIN_PARTS, command.overwrite)


def maker_of(command: Public | Rendered, domain: Domain, split: Split) -> Maker:
    """Return the maker of one split of one domain; raise BadInput that names what is missing."""
    stream = DOMAINS.index(domain) * len(SPLITS) + SPLITS.index(split)  # of random numbers
    if isinstance(command, Rendered):
        count = command.count if split == "train" else max(1, command.count // 10)
        return rendered_maker(domain, count, command.seed, stream)
    if domain == "svhn":
        maker = svhn_maker(command.svhn or command.downloads, split, download=command.svhn is None)
    elif command.backgrounds is None:
        raise BadInput(f"mnistm needs --backgrounds DIR: BSDS500 from {BSDS500} or any photographs")
    else:
        key = (command.seed, stream)
        maker = mnistm_maker(command.mnist, command.downloads, command.backgrounds, split, key)
    limit = command.train_count if split == "train" else command.val_count
    maker.count = min(maker.count, limit or maker.count)
    return maker


# ---------------------------------------------------------------- writing


def check_target(target: Path, parts: Sequence[str], overwrite: bool) -> None:
    """Raise BadInput if `target` exists, except with `overwrite` for a folder that holds nothing but `parts`."""
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise BadInput(f"{target} exists: add --overwrite to replace it, or name another --output")
    if not target.is_dir() or {path.name for path in target.iterdir()} - {part.rstrip("/") for part in parts}:
        raise BadInput(f"{target} is more than {', '.join(parts[:-1])} and {parts[-1]}: not overwritten, move it away")


@contextmanager
def new_folder(target: Path, parts: Sequence[str], overwrite: bool) -> Iterator[Path]:
    """Yield a new folder that replaces `target` when the block ends without error; otherwise `target` stays unchanged."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        new.mkdir()
        yield new
        check_target(target, parts, overwrite)  # again: it may have appeared meanwhile
        try:
            if os.path.lexists(target):
                os.replace(target, old)
            os.replace(new, target)
        finally:
            if old.exists() and not os.path.lexists(target):
                os.replace(old, target)


def write_domain(target: Path, makers: dict[Split, Maker], overwrite: bool) -> None:
    """Write the folder `target`: data/*.png, numbered across splits, and train.csv and val.csv."""
    first = 0
    with new_folder(target, DOMAIN_PARTS, overwrite) as new:
        (new / "data").mkdir()
        for split, maker in makers.items():
            rows = ["image_name,label"]
            for index in progress(range(maker.count), f"{target.name} {split}"):
                image, label = maker.make(index)
                rows.append(f"{first + index:05d}.png,{label}")
                Image.fromarray(image).save(new / "data" / f"{first + index:05d}.png")
            (new / f"{split}.csv").write_text("\n".join(rows) + "\n")
            first += maker.count
    log(f"{target}: " + ", ".join(f"{maker.count} {split}" for split, maker in makers.items()))


def write_zeroshot(command: Zeroshot) -> None:
    """Write val/{class}_{image}.png and id2label.json from CIFAR-100's test set.

    The seed chooses 50 classes. The first 50 images of each are taken.
    """
    output_folder(command.output.absolute().parent)
    check_target(command.output, ZEROSHOT_PARTS, command.overwrite)
    cifar = cifar100(command.cifar or command.downloads, download=command.cifar is None)
    names = Random(command.seed).sample(sorted(cifar.classes), ZEROSHOT_CLASSES)
    ids, written = {name: number for number, name in enumerate(names)}, Counter[str]()
    with new_folder(command.output, ZEROSHOT_PARTS, command.overwrite) as new:
        (new / "val").mkdir()
        for image, label in zip(cifar.data, cifar.targets, strict=True):
            name = cifar.classes[label]
            if name in ids and written[name] < ZEROSHOT_IMAGES:
                Image.fromarray(image).save(new / "val" / f"{ids[name]}_{written[name]}.png")
                written[name] += 1
        write_json(new / "id2label.json", {str(number): name for name, number in ids.items()})
    log(
        f"{command.output}: {sum(written.values())} images of {len(names)} classes of CIFAR-100, a substitute for the course's"
    )
    log(f"classify them: python P3_clip_zeroshot.py --preset report --images {command.output / 'val'}")


def cifar100(folder: Path, download: bool) -> Any:
    """Return torchvision's CIFAR-100 test set in `folder`. An archive there is unpacked; `download`: a missing one is downloaded.

    Raise BadInput if it is absent or damaged.
    """
    from torchvision.datasets import CIFAR100  # slow to import
    from torchvision.datasets.utils import check_integrity

    packed = check_integrity(folder / CIFAR100.filename, CIFAR100.tgz_md5)  # then nothing is downloaded
    try:
        return CIFAR100(str(folder), train=False, download=download or packed)
    except (RuntimeError, OSError) as error:
        if download or packed:
            advice = "; or give --cifar DIR" if download else ""
            raise BadInput(f"CIFAR-100 in {folder}: {first_line(error)}{advice}") from None
        files = f"{CIFAR100.base_folder}/ with train, test and meta, or the original {CIFAR100.filename}"
        raise BadInput(f"--cifar {folder} holds no CIFAR-100 that is whole: put there {files}") from None


# ---------------------------------------------------------------- the course's data


def check_course(data: Path) -> None:
    """Print what each part of the course's layout holds in `data`; raise BadInput if the digits are unusable."""
    if not data.is_dir():
        raise BadInput(f"--data {data}: no such folder")
    problems = [problem for domain in DOMAINS for problem in check_domain(data / "digits" / domain)]
    for name, check in (("face", check_face), ("clip_zeroshot", check_zeroshot), ("textual_inversion", check_concepts)):
        print(name if (data / name).is_dir() else f"{name}: absent")
        if not (data / name).is_dir():
            continue
        try:
            for fine, text in check(data / name):
                print(f"  {'ok' if fine else 'NOT AS IN THE COURSE'}: {text}")
        except BadInput as error:
            print(f"  UNUSABLE: {error}")
    print("Classifier.pth" if (data / "Classifier.pth").is_file() else "Classifier.pth: absent")
    if problems:
        raise BadInput(
            f"the digits are unusable: {problems[0]}" + f" (and {len(problems) - 1} more)" * (len(problems) > 1)
        )


def check_domain(folder: Path) -> list[str]:
    """Print the images per digit of one domain, and return a line for each fault that makes it unusable."""
    if not folder.is_dir():
        print(f"digits/{folder.name}: absent")
        return [f"{folder} is absent"]
    print(f"digits/{folder.name}")
    problems = []
    for split in SPLITS:
        if split == "val" and not (folder / "val.csv").exists():
            print("  val.csv is absent: fine, a part of train.csv is held out")
            continue
        try:
            table = read_csv(folder / f"{split}.csv")
        except BadInput as error:
            problems.append(str(error))
            continue
        counts = table.label.value_counts()
        print_counts(f"{split}.csv", [int(counts.get(digit, 0)) for digit in range(10)])
        if split == "train":
            print_counts("the course's", COURSE_COUNTS[folder.name])
        problems += image_problems(folder / "data", table.image_name.tolist())
    for problem in problems:
        print(f"  UNUSABLE: {problem}")
    return problems


def print_counts(title: str, counts: Sequence[int]) -> None:
    """Print the total and the count of each digit."""
    print(f"  {title:<13}{sum(counts):>7} images; per digit" + "".join(f"{count:>7}" for count in counts))


def image_problems(folder: Path, names: list[str]) -> list[str]:
    """Return one line if images are missing, and one for the first unreadable image."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = [name for name in names if name not in present]
    problems = [f"{folder}: {len(missing)} of {len(names)} images are missing, first {missing[0]}"] if missing else []
    try:
        for name in progress([name for name in names if name in present], f"reading {folder.parent.name}"):
            read_digit(folder / name)
    except BadInput as error:
        problems.append(str(error))
    return problems


Findings = Iterator[tuple[bool, str]]  # (whether it is as in the course, description)


def check_face(folder: Path) -> Findings:
    """Yield (True if as in the course, description): ten noises [1, 3, 256, 256] float32, ten 256x256 images, 427 tensors of the U-Net."""
    noises = [load_tensors(path) for path in sorted(folder.glob("noise/[!.]*.pt"))]
    right = [n for n in noises if isinstance(n, Tensor) and n.shape == (1, 3, 256, 256) and n.dtype == torch.float32]
    yield len(right) == len(noises) == 10, f"noise/: {len(noises)} of 10 files, {len(right)} of the right shape"
    sizes = [tuple(open_image(path).shape[1:]) for path in folder.glob("GT/[!.]*.png")]
    yield sizes == [(256, 256)] * 10, f"GT/: {len(sizes)} of 10 pictures of sizes {sorted(set(sizes))}"
    tensors = len(load_tensors(require_file(folder / "UNet.pt")))
    yield tensors == 427, f"UNet.pt: {tensors} of 427 tensors"


def check_zeroshot(folder: Path) -> Findings:
    """Yield (True if as in the course, description): 2,500 images {class}_{image}.png, 50 classes in id2label.json."""
    images = list_images(folder / "val")
    yield len(images) == 2500, f"val/: {len(images)} of 2500 pictures"
    yield len(images.classes) == 50, f"{len(images.classes)} of 50 class names"


def check_concepts(folder: Path) -> Findings:
    """Yield (True if as in the course, description): images of each concept, entries of input.json with all that grading needs."""
    for concept in ("0", "1", "cat"):
        count = len(list(folder.glob(f"{concept}/*.jpg")))
        yield count > 0, f"{concept}/: {count} pictures"
    for entry in read_input(folder / "input.json", graded=True):
        yield (
            True,
            f"input.json {entry.key}: {entry.token}, {len(entry.prompts)} prompts with texts to grade and baselines",
        )


if __name__ == "__main__":
    command: Any = Course | Public | Rendered | Zeroshot  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
