"""The plain way to read P1's digits: one PNG file per sample."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from P1_dataloader import read_digit
from P1_model import DIGITS, DOMAINS
from runtime.images import to_float

if TYPE_CHECKING:
    import pandas as pd


class DigitFolder(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Dataset of one domain: (image [3,28,28] in -1..1, digit one-hot [10], domain one-hot [2])."""

    def __init__(self, folder: Path, table: pd.DataFrame, domain: int):
        self.paths = [folder / "data" / name for name in table.image_name]
        self.labels, self.domain = table.label.tolist(), domain

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image = to_float(torch.from_numpy(read_digit(self.paths[index]).copy()))
        digit = F.one_hot(torch.tensor(self.labels[index]), DIGITS).float()
        return image, digit, F.one_hot(torch.tensor(self.domain), len(DOMAINS)).float()
