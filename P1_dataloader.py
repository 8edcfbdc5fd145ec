"""Load the digits of both domains (MNIST-M, SVHN) as uint8 tensors from PNG and CSV files, and draw balanced batches.

Other images may lie in the same layout or in a folder per class; `describe_data` returns what they are.
Images are decoded once, into a cache below the data folder.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from P1_model import COLOURS, DOMAINS, HOMEWORK, DataSpec
from runtime.cli import BadInput, log, progress
from runtime.files import load_safetensors, read_text, save_safetensors, visible
from runtime.images import image_file, images_by_class, read_image, shorten, to_rgb
from runtime.validation import validate

if TYPE_CHECKING:
    import pandas as pd

Split = Literal["train", "val"]
HELD_OUT = 0.05  # of the training images, where there is no val.csv
SIZE = HOMEWORK.size
ONLY_DOMAIN = "images"  # the name of a domain whose images lie in the data folder itself
SPLITS = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class Digits:
    """Labelled images [N,3,28,28] uint8, digits [N] int64 (0..9), domains [N] int64 (0 = mnistm, 1 = svhn).

    Other images have the shape of `spec`, and as labels indices into its classes and domains.
    """

    images: Tensor
    digits: Tensor
    domains: Tensor
    spec: DataSpec = HOMEWORK

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Digits:
        return Digits(self.images.to(device), self.digits.to(device), self.domains.to(device), self.spec)

    def fingerprint(self) -> int:
        """Return a checksum of all images and labels."""
        return checksum((self.images, self.digits, self.domains))


# ---------------------------------------------------------------- what a data folder holds


def describe_data(root: Path) -> DataSpec:
    """Return the DataSpec of the images below `root`: HOMEWORK for the homework's layout.

    For other images, the first one gives channels and size.
    Raise BadInput for an unknown layout, a first image that is not square, or domains with different classes.
    """
    folders = domain_folders(root)
    if is_homework(root):
        return HOMEWORK
    classes = {name: class_names(folder) for name, folder in folders.items()}
    first, *others = folders
    for other in others:
        if odd := sorted({*classes[first]} ^ {*classes[other]}):
            raise BadInput(
                f"{folders[first]} and {folders[other]} hold different classes, such as {odd[0]}: give both the same"
            )
    image = first_image(folders[first])
    channels, width, height = read_any(image)[1]
    if width != height:
        raise BadInput(f"{image} is {width}x{height}: pictures must be square, crop them first")
    values = {"classes": classes[first], "domains": [*folders], "channels": channels, "size": width}
    return validate(DataSpec, values, f"pictures in {root}")


def is_homework(root: Path) -> bool:
    """Return whether `root` has the homework's layout (mnistm/ or svhn/ with train.csv or data/) or holds no folder at all."""
    started = any((root / name / part).exists() for name in DOMAINS for part in ("train.csv", "data"))
    return started or not any(path.is_dir() for path in visible(root))


def domain_folders(root: Path) -> dict[str, Path]:
    """Return {domain: folder}. If `root` itself holds one domain, that is {"images": root}.

    A domain's folder holds train.csv and data/, or a folder per class.
    Raise BadInput if `root` is absent, if only some of its folders are domains, or if they are splits (train, val ..).
    """
    if not root.is_dir():
        raise BadInput(
            f"no data folder {root}; make one with: python hw2_data/prepare.py rendered"
            " (or public, or course; see hw2_data/README.md)"
        )
    if is_homework(root):
        return {name: root / name for name in DOMAINS}
    folders = [path for path in visible(root) if path.is_dir()]
    flat = [folder for folder in folders if not ((folder / "train.csv").is_file() or class_names(folder))]
    if (root / "train.csv").is_file() or flat == folders:
        return {ONLY_DOMAIN: root}
    if flat:
        raise BadInput(f"{flat[0]} holds neither train.csv nor a folder per class, as other folders of {root} do")
    if splits := SPLITS & {folder.name.lower() for folder in folders}:
        raise BadInput(
            f"{root} holds {' and '.join(sorted(splits))}: name one, of which a share is held out for validation"
        )
    return {folder.name: folder for folder in folders}


def class_names(folder: Path) -> list[str]:
    """Return the sorted classes of the domain in `folder`: the labels in its train.csv, or else the names of its subfolders."""
    if (folder / "train.csv").is_file():
        return sorted(set(read_rows(folder / "train.csv").label))
    return [path.name for path in visible(folder) if path.is_dir()]


def first_image(folder: Path) -> Path:
    """Return the path of the first image of the domain in `folder`."""
    csv = folder / "train.csv"
    table = read_rows(csv) if csv.is_file() else class_folders(folder)
    return images_folder(folder) / str(table.image_name.iloc[0])


def images_folder(folder: Path) -> Path:
    """Return the folder to which image names of a domain are relative: data/ if there is a train.csv, else `folder` itself."""
    return folder / "data" if (folder / "train.csv").is_file() else folder


# ---------------------------------------------------------------- csv, class folders and single images


def read_rows(path: Path) -> pd.DataFrame:
    """Return the rows of a csv: image_name and label, both str, indexed by line number minus 2; raise BadInput for a malformed file."""
    import pandas as pd  # slow to import

    if not path.is_file():
        raise BadInput(f"{path} does not exist; make the data with: python hw2_data/prepare.py --help")
    try:
        # three fields in a row are an error; some editors put a byte order mark first
        lines = pd.read_csv(path, dtype=str, keep_default_na=False, header=None, encoding="utf-8-sig")
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is empty or not a csv: {' '.join(str(error).split())}") from None
    numbers = [number for number, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    if len(numbers) == len(lines):  # pandas skips blank lines, and counts none of them
        lines.index = pd.Index(numbers)
    header = ",".join(lines.iloc[0])
    if header != "image_name,label":
        raise BadInput(f"{path}: the header must be image_name,label, it is {header[:80]}")
    table = lines[1:].set_axis(["image_name", "label"], axis=1)
    table.index -= 2  # row 2 of the file has index 0
    if table.empty:
        raise BadInput(f"{path} has a header but no rows")
    return table


def read_csv(path: Path, classes: Sequence[str] = HOMEWORK.classes) -> pd.DataFrame:
    """Return the rows of a csv: image_name (str) and label (int index into `classes`), indexed as by `read_rows`.

    Raise BadInput for an unknown label or a repeated image.
    """
    table = read_rows(path)
    valid = table.label.isin(classes)
    if not valid.all():
        row = table.index[int((~valid).to_numpy().argmax())]
        names = "a digit 0..9" if classes == HOMEWORK.classes else f"among the classes {shorten(', '.join(classes))}"
        raise BadInput(f"{path}, row {row + 2}: label {table.label[row]!r} is not {names}")
    if (repeated := table.image_name.duplicated()).any():
        row = table.index[int(repeated.to_numpy().argmax())]
        raise BadInput(f"{path}, row {row + 2}: {table.image_name[row]} appears twice")
    return table.assign(label=table.label.map({name: label for label, name in enumerate(classes)}))


def class_folders(folder: Path) -> pd.DataFrame:
    """Return a table like the one of our `read_csv`, with image_name CLASS/FILE, of the images in folder/CLASS/.

    A label is the index of CLASS in sorted order. Raise BadInput for a class without images.
    """
    import pandas as pd

    classes = images_by_class(folder)
    rows = [(f"{name}/{path.name}", label) for label, name in enumerate(classes) for path in classes[name]]
    return pd.DataFrame(rows, columns=["image_name", "label"])


def read_any(path: Path) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Return an image as [C,H,W] uint8, C = 1 for grey and else 3, and (C, width, height). Raise BadInput for a broken file."""
    with image_file(path) as file:
        channels = 1 if file.mode[0] in "1LI" else 3  # I: 16 bits of grey
        image = to_rgb(file)
    return np.asarray(image).transpose(2, 0, 1)[:channels], (channels, *image.size)


def read_exactly(path: Path, spec: DataSpec) -> np.ndarray:
    """Return an image as [C,H,W] uint8; raise BadInput unless it has the size and channels of `spec`."""
    pixels, (channels, width, height) = read_any(path)
    if (channels, width, height) != (spec.channels, spec.size, spec.size):
        raise BadInput(
            f"{path} is {width}x{height} {COLOURS[channels]}, not {spec.size}x{spec.size} {COLOURS[spec.channels]} as the others:"
            " give all pictures one size, and either grey or RGB"
        )
    return pixels


def read_digit(path: Path, resized: list[str] | None = None) -> np.ndarray:
    """Return an image as RGB [3,28,28] uint8; raise BadInput for a broken file.

    An image of another size is resized, and a line about it is appended to `resized`, if given.
    """
    image = read_image(path)
    if (image.width, image.height) != (SIZE, SIZE):
        if resized is not None:
            resized.append(f"{path} is {image.width}x{image.height}")
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


# ---------------------------------------------------------------- the cache


def split_tables(folder: Path, spec: DataSpec = HOMEWORK) -> dict[Split, pd.DataFrame]:
    """Return the train and val tables of the domain in `folder`, each as `read_csv` does.

    Without val.csv, a fixed random 5 % of train are moved to val.
    """
    by_class = spec != HOMEWORK and not (folder / "train.csv").is_file()
    train = class_folders(folder) if by_class else read_csv(folder / "train.csv", spec.classes)
    if (folder / "val.csv").is_file():
        return {"train": train, "val": read_csv(folder / "val.csv", spec.classes)}
    if len(train) < 2:
        place = folder if by_class else folder / "train.csv"
        raise BadInput(f"{place} has one picture, and none is left to hold out: give more, or a val.csv")
    order = np.random.default_rng(0).permutation(len(train))
    held_out = np.sort(order[: max(1, round(HELD_OUT * len(train)))])
    tables: dict[Split, pd.DataFrame] = {"train": train.drop(index=train.index[held_out]), "val": train.iloc[held_out]}
    if spec != HOMEWORK and (left := set(range(len(spec.classes))) - {*tables["train"].label}):
        raise BadInput(
            f"{folder}: all pictures of {spec.classes[min(left)]} are held out for validation, give more of them"
        )
    return tables


def fingerprint(folder: Path, tables: dict[Split, pd.DataFrame]) -> str:
    """Return a hash of every row and of every file's name, size and time; raise BadInput for a missing image."""
    digest, images = hashlib.sha256(b"2"), images_folder(folder)  # 2: version of the cache's format
    for split, table in tables.items():
        digest.update(split.encode())
        for row, name, label in zip(table.index, table.image_name, table.label, strict=True):
            file, problem = images / name, "does not exist"
            with suppress(OSError, ValueError):  # ValueError: a null character
                status, problem = file.stat(), "is no file" if file.is_dir() else ""
            if problem:
                csv = folder / (f"{split}.csv" if (folder / "val.csv").is_file() else "train.csv")
                raise BadInput(f"{csv}, row {row + 2}: image data/{name} {problem}")
            digest.update(f"{name},{label},{status.st_size},{status.st_mtime_ns};".encode())
    return digest.hexdigest()


def decode(paths: Sequence[Path], spec: DataSpec, title: str, resized: list[str]) -> Tensor:
    """Return the images as [N,C,H,W] uint8, read in parallel with the progress bar `title`.

    With the homework's spec `read_digit` reads them and appends to `resized`. With any other `read_exactly` does, which resizes nothing.
    """
    images = np.empty((len(paths), *spec.shape), dtype=np.uint8)
    read = partial(read_digit, resized=resized) if spec == HOMEWORK else partial(read_exactly, spec=spec)
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(read, paths)
        for row, image in enumerate(progress(decoded, title, total=len(paths), leave=False)):
            images[row] = image
    return torch.from_numpy(images)


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return the CRC-32 of all bytes."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.cpu().contiguous().numpy().data, value)
    return value


def cache_header(key: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return the header of a valid cache file: `key` and the checksum of the tensors."""
    return {"key": key, "crc32": str(checksum(tensors[name] for name in sorted(tensors)))}


def load_domain(root: Path, domain: int, spec: DataSpec = HOMEWORK) -> dict[str, Tensor]:
    """Return a dict of train_images, train_digits, val_images, val_digits, all uint8, for the domain with this index in `spec`.

    They are read from the cache, or decoded and written to it.
    """
    name = spec.domains[domain]
    folder = domain_folders(root)[name]
    tables = split_tables(folder, spec)
    key, cache = fingerprint(folder, tables), root / ".cache" / f"{name}.safetensors"
    if cache.is_file():
        try:
            tensors, metadata = load_safetensors(cache)
            if metadata == cache_header(key, tensors):
                return tensors
        except BadInput:
            pass  # a damaged cache is rebuilt
    tensors, resized = {}, list[str]()
    for split, table in tables.items():
        paths = [images_folder(folder) / image for image in table.image_name]
        tensors[f"{split}_images"] = decode(paths, spec, f"decoding {name} {split}", resized)
        tensors[f"{split}_digits"] = torch.tensor(table.label.to_numpy(), dtype=torch.uint8)
    if resized:
        more = f" (and {len(resized) - 1:,} more pictures of other sizes)" if len(resized) > 1 else ""
        log(f"warning: {min(resized)}: resized to {SIZE}x{SIZE}{more}")
    try:
        save_safetensors(cache, tensors, cache_header(key, tensors))
    except OSError as error:  # a read-only data folder is fine, only slower the next time
        log(f"warning: no cache of the decoded pictures, {error}")
    return tensors


def load_digits(root: Path, split: Split, domains: Sequence[int] | None = None) -> Digits:
    """Load one split of the domains with these indices (None = all) on the CPU; raise BadInput that names a fault in the data."""
    spec = describe_data(root)
    domains = range(len(spec.domains)) if domains is None else domains
    parts = [load_domain(root, domain, spec) for domain in domains]
    counts = torch.tensor([len(part[f"{split}_digits"]) for part in parts])
    return Digits(
        torch.cat([part[f"{split}_images"] for part in parts]),
        torch.cat([part[f"{split}_digits"] for part in parts]).long(),
        torch.tensor(domains).repeat_interleave(counts),
        spec,
    )


# ---------------------------------------------------------------- balanced sampling


class BalancedIndex:
    """A random choice of images, as row numbers of `data`, balanced over domains and classes, without a device sync.

    `svhn_share`: expected share of SVHN in a batch. None = as in the data. For data other than MNIST-M and SVHN, any number makes all
    domains equally frequent.
    `balance_digits`: SVHN's digits are equally frequent; for other data, the classes of each domain.
    """

    def __init__(self, data: Digits, svhn_share: float | None, balance_digits: bool):
        domains, classes = len(data.spec.domains), len(data.spec.classes)
        group = data.domains * classes + data.digits
        counts = torch.bincount(group, minlength=domains * classes).double()
        weights = counts.view(domains, classes).clone()
        if balance_digits:
            unbalanced = weights[1:] if data.spec == HOMEWORK else weights
            present = unbalanced > 0
            unbalanced.copy_(unbalanced.sum(1, keepdim=True) / present.sum(1, keepdim=True) * present)
        if svhn_share is not None:
            shares = [1 - svhn_share, svhn_share] if data.spec == HOMEWORK else [1 / domains] * domains
            weights *= torch.tensor(shares, device=weights.device)[:, None] / weights.sum(1, keepdim=True)
        device = data.images.device
        self.edges = (weights.flatten().cumsum(0) / weights.sum()).float().to(device)
        self.rows = group.argsort(stable=True)
        self.counts = counts.float().to(device)
        self.starts = (counts.cumsum(0) - counts).long().to(device)

    def __call__(self, which: Tensor, member: Tensor) -> Tensor:
        """Return row numbers [B] int64 for two tensors [B] of uniform random numbers in [0, 1).

        `which` picks a domain and class, `member` one of their images.
        """
        group = torch.searchsorted(self.edges, which, right=True).clamp(max=len(self.edges) - 1)
        inside = (member * self.counts[group]).long()
        inside = torch.minimum(inside, self.counts[group].long() - 1)
        return self.rows[self.starts[group] + inside]
