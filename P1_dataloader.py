"""Digits of both domains: folders of PNG + CSV -> verified uint8 tensors -> balanced batches, indexed where the tensors live.

Every PNG is decoded once into a memory-mapped cache.
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

from P1_model import DIGITS, DOMAINS, IMAGE_SHAPE
from runtime.cli import BadInput, log, progress
from runtime.files import load_safetensors, read_text, save_safetensors
from runtime.images import read_image

if TYPE_CHECKING:
    import pandas as pd

Split = Literal["train", "val"]
HELD_OUT = 0.05  # of train.csv, where there is no val.csv
SIZE = IMAGE_SHAPE[1]


@dataclass(frozen=True)
class Digits:
    """Labelled images [N,3,28,28] uint8, digits [N] int64 (0..9), domains [N] int64 (0 = mnistm, 1 = svhn)."""

    images: Tensor
    digits: Tensor
    domains: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Digits:
        """Return all three on `device`."""
        return Digits(self.images.to(device), self.digits.to(device), self.domains.to(device))

    def fingerprint(self) -> int:
        """Return a checksum of all images and labels."""
        return checksum((self.images, self.digits, self.domains))


# ---------------------------------------------------------------- csv and single images


def read_csv(path: Path) -> pd.DataFrame:
    """Return the rows of a homework csv: image_name (str), label (int 0..9). Raise BadInput that names the row."""
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
    valid = table.label.isin([str(digit) for digit in range(DIGITS)])
    if not valid.all():
        row = table.index[int((~valid).to_numpy().argmax())]
        raise BadInput(f"{path}, row {row + 2}: label {table.label[row]!r} is not a digit 0..9")
    if (repeated := table.image_name.duplicated()).any():
        row = table.index[int(repeated.to_numpy().argmax())]
        raise BadInput(f"{path}, row {row + 2}: {table.image_name[row]} appears twice")
    return table.astype({"label": int})


def read_digit(path: Path, resized: list[str] | None = None) -> np.ndarray:
    """Read [3,28,28] uint8 RGB; resize another size and append it to `resized`. Raise BadInput on a broken file."""
    image = read_image(path)
    if (image.width, image.height) != (SIZE, SIZE):
        if resized is not None:
            resized.append(f"{path} is {image.width}x{image.height}")
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


# ---------------------------------------------------------------- the cache


def split_tables(folder: Path) -> dict[Split, pd.DataFrame]:
    """Return train and val rows of one domain; without val.csv a seeded 5 % of train is held out."""
    train = read_csv(folder / "train.csv")
    if (folder / "val.csv").is_file():
        return {"train": train, "val": read_csv(folder / "val.csv")}
    if len(train) < 2:
        raise BadInput(f"{folder / 'train.csv'} has one picture, and none is left to hold out: give more, or a val.csv")
    order = np.random.default_rng(0).permutation(len(train))
    held_out = np.sort(order[: max(1, round(HELD_OUT * len(train)))])
    return {
        "train": train.drop(index=train.index[held_out]),
        "val": train.iloc[held_out],
    }


def fingerprint(folder: Path, tables: dict[Split, pd.DataFrame]) -> str:
    """Return a hash of every row and of every file's name, size and time; raise BadInput for a missing image."""
    digest = hashlib.sha256(b"2")  # the cache's format
    for split, table in tables.items():
        digest.update(split.encode())
        for row, name, label in zip(table.index, table.image_name, table.label, strict=True):
            file, problem = folder / "data" / name, "does not exist"
            with suppress(OSError, ValueError):  # ValueError: a null character
                status, problem = file.stat(), "is no file" if file.is_dir() else ""
            if problem:
                csv = folder / (f"{split}.csv" if (folder / "val.csv").is_file() else "train.csv")
                raise BadInput(f"{csv}, row {row + 2}: image data/{name} {problem}")
            digest.update(f"{name},{label},{status.st_size},{status.st_mtime_ns};".encode())
    return digest.hexdigest()


def decode(folder: Path, table: pd.DataFrame, title: str, resized: list[str]) -> Tensor:
    """Read the images of all rows in parallel: [N,3,28,28] uint8; append to `resized` what had another size."""
    images = np.empty((len(table), *IMAGE_SHAPE), dtype=np.uint8)
    paths = [folder / "data" / name for name in table.image_name]
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(partial(read_digit, resized=resized), paths)
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
    """Return the header of a cache file that is up to date and undamaged."""
    return {"key": key, "crc32": str(checksum(tensors[name] for name in sorted(tensors)))}


def load_domain(root: Path, domain: int) -> dict[str, Tensor]:
    """Load train_images, train_digits, val_images, val_digits (uint8) of one domain, from the cache if it is valid."""
    folder, name = root / DOMAINS[domain], DOMAINS[domain]
    tables = split_tables(folder)
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
        tensors[f"{split}_images"] = decode(folder, table, f"decoding {name} {split}", resized)
        tensors[f"{split}_digits"] = torch.tensor(table.label.to_numpy(), dtype=torch.uint8)
    if resized:
        more = f" (and {len(resized) - 1:,} more pictures of other sizes)" if len(resized) > 1 else ""
        log(f"warning: {min(resized)}: resized to {SIZE}x{SIZE}{more}")
    try:
        save_safetensors(cache, tensors, cache_header(key, tensors))
    except OSError as error:  # a read-only data folder is fine, only slower the next time
        log(f"warning: no cache of the decoded pictures, {error}")
    return tensors


def load_digits(root: Path, split: Split, domains: Sequence[int] = range(len(DOMAINS))) -> Digits:
    """Load one split of these domains on the CPU; raise BadInput that names what is wrong with the data."""
    if not root.is_dir():
        raise BadInput(
            f"no data folder {root}; make one with: python hw2_data/prepare.py rendered"
            " (or public, or course; see hw2_data/README.md)"
        )
    parts = [load_domain(root, domain) for domain in domains]
    counts = torch.tensor([len(part[f"{split}_digits"]) for part in parts])
    return Digits(
        torch.cat([part[f"{split}_images"] for part in parts]),
        torch.cat([part[f"{split}_digits"] for part in parts]).long(),
        torch.tensor(domains).repeat_interleave(counts),
    )


# ---------------------------------------------------------------- balanced sampling


class BalancedIndex:
    """A map from uniform numbers to rows, without a device sync.

    SVHN gets its share of a batch (None: as in the data), and its digits come equally often.
    """

    def __init__(self, data: Digits, svhn_share: float | None, balance_digits: bool):
        group = data.domains * DIGITS + data.digits
        counts = torch.bincount(group, minlength=len(DOMAINS) * DIGITS).double()
        weights = counts.view(len(DOMAINS), DIGITS).clone()
        if balance_digits:
            present = weights[1] > 0
            weights[1] = weights[1].sum() / present.sum() * present
        if svhn_share is not None:
            weights *= torch.tensor([[1 - svhn_share], [svhn_share]], device=weights.device) / weights.sum(
                1, keepdim=True
            )
        device = data.images.device
        self.edges = (weights.flatten().cumsum(0) / weights.sum()).float().to(device)
        self.rows = group.argsort(stable=True)
        self.counts = counts.float().to(device)
        self.starts = (counts.cumsum(0) - counts).long().to(device)

    def __call__(self, which: Tensor, member: Tensor) -> Tensor:
        """Map two uniform [B] in [0, 1) to row numbers [B]: `which` picks the group, `member` the image in it."""
        group = torch.searchsorted(self.edges, which, right=True).clamp(max=len(self.edges) - 1)
        inside = (member * self.counts[group]).long()
        inside = torch.minimum(inside, self.counts[group].long() - 1)
        return self.rows[self.starts[group] + inside]
