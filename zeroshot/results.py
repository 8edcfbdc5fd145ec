"""The results of a zero-shot run: accuracies, tables, the report's cases, and two figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from runtime.files import atomic
from runtime.images import plain_text, save_figure, shorten
from zeroshot.dataset import LabelledImages

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

CASES = 5
MOST_COUNTED = 20  # classes of a confusion matrix with numbers


@dataclass
class Result:
    """The images and their class probabilities [N,C] float32; each row sums to 1."""

    images: LabelledImages
    probabilities: Tensor

    @cached_property
    def best(self) -> Tensor:
        """[N,min(5,C)] int64: each image's most probable classes, best first."""
        return self.probabilities.topk(min(5, self.probabilities.shape[1])).indices

    @property
    def predicted(self) -> Tensor:
        """[N] int64: each image's most probable class."""
        return self.best[:, 0]

    @cached_property
    def confusion(self) -> Tensor:
        """[C,C] counts: rows are the truth, columns the prediction."""
        classes = len(self.images.classes)
        cells = torch.bincount(self.images.truth * classes + self.predicted, minlength=classes**2)
        return cells.view(classes, classes)

    def name(self, row: int | Tensor) -> str:
        """Return the name of the class with this index."""
        return self.images.names[int(row)]


# ---------------------------------------------------------------- numbers and tables


def accuracies(result: Result) -> dict[str, float]:
    """Return top1, top5 and mean_recall, 0..1. mean_recall is the mean over the classes that have images."""
    hits = result.best == result.images.truth[:, None]
    counts = result.confusion.sum(1)
    recall = (result.confusion.diag().double() / counts)[counts > 0]
    return {
        "top1": hits[:, 0].double().mean().item(),
        "top5": hits.any(1).double().mean().item(),
        "mean_recall": recall.mean().item(),
    }


def per_class(result: Result) -> pd.DataFrame:
    """Return a table with a row per class: id, name, images, correct ones, recall, precision, most frequent wrong prediction."""
    import pandas as pd  # slow to import

    names, confusion = np.array(result.images.names), result.confusion.numpy()
    right, wrong = confusion.diagonal(), confusion - np.diag(confusion.diagonal())
    table = pd.DataFrame(
        {"class": list(result.images.classes), "name": names, "pictures": confusion.sum(1), "right": right}
    )
    table["recall"] = (table.right / confusion.sum(1)).round(4)  # empty without images
    table["precision"] = (table.right / confusion.sum(0)).round(4)
    table["taken_for"] = np.where(wrong.any(1), names[wrong.argmax(1)], "")
    return table


def confused_pairs(result: Result, count: int = 10) -> list[dict[str, Any]]:
    """Return the `count` most frequent confusions: truth, predicted, how often, and how many images the true class has."""
    wrong = result.confusion - result.confusion.diag().diag()
    times, cells = wrong.flatten().sort(descending=True, stable=True)
    pairs = []
    for often, cell in zip(times[:count].tolist(), cells[:count].tolist(), strict=True):
        truth, predicted = divmod(cell, len(wrong))
        if often:
            names = {"truth": result.name(truth), "predicted": result.name(predicted)}
            pairs.append({**names, "times": often, "pictures": int(result.confusion[truth].sum())})
    return pairs


def predictions(result: Result) -> pd.DataFrame:
    """Return a table with a row per image: file, truth, prediction, and the five most probable classes with probabilities."""
    import pandas as pd  # slow to import

    names = np.array(result.images.names)
    best = names[result.best.numpy()]  # numpy takes a tensor of one element for a number
    shares = [[f"{share:.6f}" for share in row] for row in result.probabilities.gather(1, result.best).tolist()]
    return pd.DataFrame(
        {
            "file": [result.images.file(row) for row in range(len(result.images))],
            "truth": names[result.images.truth.numpy()],
            "predicted": best[:, 0],
            "probability": [row[0] for row in shares],
            "top5": list(map("|".join, best)),
            "top5_probability": list(map("|".join, shares)),
        }
    )


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write the table as CSV without its index, atomically."""
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


# ---------------------------------------------------------------- the report's lines


def cases(result: Result, seed: int) -> tuple[list[int], list[int]]:
    """Return the row numbers of up to five right and five wrong images, drawn at random by the seed."""
    right = result.predicted == result.images.truth
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(seed))
    return order[right[order]][:CASES].tolist(), order[~right[order]][:CASES].tolist()


def case_lines(result: Result, right: Sequence[int], wrong: Sequence[int]) -> list[str]:
    """Return a line per case, as the course's report prints them."""
    lines = []
    for row in right:
        lines.append(f"Successful Cases: {(result.images.file(row), result.name(result.predicted[row]))}")
    for row in wrong:
        truth, predicted = result.name(result.images.truth[row]), result.name(result.predicted[row])
        lines.append(f"Failed Cases: {(result.images.file(row), f'GT:{truth}', f'Predicted:{predicted}')}")
    return lines


# ---------------------------------------------------------------- figures


@plain_text()
def cases_figure(path: Path, result: Result, right: Sequence[int], wrong: Sequence[int], title: str) -> None:
    """Draw right cases in the upper row, wrong ones in the lower: the image and its three most probable classes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 6.8))
    axes = figure.subplots(4, CASES, squeeze=False, gridspec_kw={"height_ratios": (2.2, 1, 2.2, 1)})
    for axis in axes.flat:
        axis.set_axis_off()
    for line, rows in enumerate((right, wrong)):
        for column, row in enumerate(rows):
            _draw_case(axes[2 * line, column], axes[2 * line + 1, column], result, row)
    figure.suptitle(f"{title}; upper row right, lower row wrong", fontsize=10)
    figure.subplots_adjust(0.02, 0.02, 0.99, 0.86, 0.1, 0.28)
    save_figure(path, figure, 130)


def _draw_case(photo: Axes, bars: Axes, result: Result, row: int) -> None:
    truth = int(result.images.truth[row])
    photo.imshow(result.images.open(row), interpolation="nearest")
    photo.set_title(f"{shorten(result.images.file(row))}\n{shorten(result.name(truth))}", fontsize=9)
    for rank, index in enumerate(result.best[row, :3].tolist()):
        share = float(result.probabilities[row, index])
        colour = "tab:green" if index == truth else "tab:red" if rank == 0 else "tab:gray"
        bars.barh(rank, share, color=colour, alpha=0.45, height=0.8)
        bars.text(0.01, rank, f"{shorten(result.name(index))}  {100 * share:.1f}%", va="center", fontsize=8)
    bars.set(xlim=(0, 1), ylim=(2.5, -0.5))


@plain_text()
def confusion_figure(path: Path, result: Result, title: str) -> None:
    """Write a figure of the confusion matrix. Rows are the truth, colours the share of the row; up to 20 classes also show counts."""
    from matplotlib.figure import Figure

    names, counts = list(map(shorten, result.images.names)), result.confusion.double()
    few = len(names) <= MOST_COUNTED
    size = 12 if few else 8 if len(names) <= 60 else 5
    longest = max(map(len, names))
    margin = 0.5 + 0.0085 * size * longest  # inches; measuring texts takes longer than drawing
    side = min(24.0, (0.5 if few else 2.5) + margin + 0.0225 * size * (len(names) + 4 * few))
    figure = Figure(figsize=(side, side))
    axis = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    image = axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axis.set_yticks(range(len(names)), names, fontsize=size)
    axis.set(xlabel="predicted", ylabel="truth")
    axis.set_title(title, fontsize=10)
    if few:
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=size)
    else:
        figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02, label="share of the class's pictures")
    right = 0.1 if few else 0.8
    figure.subplots_adjust(margin / side, margin / side, 1 - right / side, 1 - 0.6 / side)
    save_figure(path, figure, 130)
