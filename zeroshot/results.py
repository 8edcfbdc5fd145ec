"""What a zero-shot run shows: accuracies, tables, the report's cases, and two figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from runtime.cli import BadInput
from runtime.files import atomic, read_json
from zeroshot.dataset import LabelledImages

CASES = 5
Choosing = Literal["seed", "confidence"]

PUBLISHED = {
    "RN50:openai": 40.3,
    "ViT-B-32:openai": 64.2,
    "ViT-B-16:openai": 67.0,
    "ViT-B-32:laion400m_e32": 70.3,  # with the QuickGELU it was trained with; 67.7 without
    "ViT-L-14:openai": 75.8,
    "ViT-B-32:laion2b_s34b_b79k": 75.6,
    "ViT-B-32:datacomp_xl_s13b_b90k": 80.3,
    "ViT-B-16:datacomp_xl_s13b_b90k": 82.1,
    "ViT-B-32-256:datacomp_s34b_b86k": 82.9,
    "ViT-L-14:laion2b_s32b_b82k": 83.3,
    "ViT-B-16:dfn2b": 83.5,
    "ViT-SO400M-14-SigLIP:webli": 84.2,
    "ViT-H-14:laion2b_s32b_b79k": 84.7,
    "ViT-L-14:datacomp_xl_s13b_b90k": 87.4,
    "EVA02-B-16:merged2b_s8b_b131k": 87.7,
    "ViT-L-14:dfn2b": 88.4,
    "ViT-H-14:dfn5b": 90.5,
    "EVA02-L-14:merged2b_s4b_b131k": 90.7,
    "EVA02-E-14-plus:laion2b_s9b_b144k": 93.2,
}
"""Zero-shot top-1 in % on CIFAR-100 (100 classes, 18 prompts, matching activation), from the results table of open_clip's repository."""


def published(label: str) -> float | None:
    """The published CIFAR-100 figure in % of a model:tag; the two activation variants of a name count as one."""
    return PUBLISHED.get(label.replace("-quickgelu:", ":"))


@dataclass
class Result:
    """probabilities [N,C] float32 of the pictures, rows in their order, summing to 1 over the classes."""

    pictures: LabelledImages
    probabilities: Tensor

    @cached_property
    def best(self) -> Tensor:
        """[N,min(5,C)]: the most probable classes, best first."""
        return self.probabilities.topk(min(5, self.probabilities.shape[1])).indices

    @property
    def predicted(self) -> Tensor:
        """[N]: the most probable class."""
        return self.best[:, 0]

    @cached_property
    def confusion(self) -> Tensor:
        """[C,C] counts: rows are the truth, columns what was predicted."""
        classes = len(self.pictures.classes)
        cells = torch.bincount(self.pictures.truth * classes + self.predicted, minlength=classes**2)
        return cells.view(classes, classes)

    def name(self, index: int | Tensor) -> str:
        """A class's name by its row."""
        return self.pictures.names[int(index)]


# ---------------------------------------------------------------- numbers and tables


def accuracies(result: Result) -> dict[str, float]:
    """top1, top5 and mean_recall (over the classes that have pictures), 0..1."""
    hits = result.best == result.pictures.truth[:, None]
    pictures = result.confusion.sum(1)
    recall = (result.confusion.diag().double() / pictures)[pictures > 0]
    return {
        "top1": hits[:, 0].double().mean().item(),
        "top5": hits.any(1).double().mean().item(),
        "mean_recall": recall.mean().item(),
    }


def per_class(result: Result) -> pd.DataFrame:
    """A row per class: id, name, pictures, right, recall, precision, and what it is most often taken for."""
    rows = []
    for row, (number, name) in enumerate(result.pictures.classes.items()):
        seen, said = int(result.confusion[row].sum()), int(result.confusion[:, row].sum())
        right, others = int(result.confusion[row, row]), result.confusion[row].clone()
        others[row] = 0
        rows.append(
            {
                "class": number,
                "name": name,
                "pictures": seen,
                "right": right,
                "recall": round(right / seen, 4) if seen else None,
                "precision": round(right / said, 4) if said else None,
                "taken_for": result.name(others.argmax()) if others.any() else "",
            }
        )
    return pd.DataFrame(rows)


def confused_pairs(result: Result, count: int = 10) -> list[tuple[str, str, int, int]]:
    """The most frequent mistakes: (truth, predicted, how often, pictures of the truth)."""
    wrong = result.confusion - result.confusion.diag().diag()
    times, cells = wrong.flatten().sort(descending=True, stable=True)
    pairs = []
    for often, cell in zip(times[:count].tolist(), cells[:count].tolist(), strict=True):
        truth, predicted = divmod(cell, len(wrong))
        if often:
            pairs.append((result.name(truth), result.name(predicted), often, int(result.confusion[truth].sum())))
    return pairs


def predictions(result: Result) -> pd.DataFrame:
    """A row per picture: file, truth, predicted, probability, and the five most probable classes with their probabilities."""
    likely = result.probabilities.gather(1, result.best)
    return pd.DataFrame(
        {
            "file": [path.name for path in result.pictures.paths],
            "truth": [result.name(row) for row in result.pictures.truth],
            "predicted": [result.name(row) for row in result.predicted],
            "probability": [f"{p:.6f}" for p in likely[:, 0].tolist()],
            "top5": ["|".join(result.name(row) for row in rows) for rows in result.best],
            "top5_probability": ["|".join(f"{p:.6f}" for p in row) for row in likely.tolist()],
        }
    )


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """The table, atomically."""
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)


# ---------------------------------------------------------------- cases


def cases(result: Result, choosing: Choosing, seed: int) -> tuple[list[int], list[int]]:
    """Rows of five right and five wrong pictures (fewer where there are fewer): drawn with the seed, or the most confident."""
    right = result.predicted == result.pictures.truth
    if choosing == "confidence":
        order = result.probabilities.amax(1).argsort(descending=True, stable=True)
    else:
        order = torch.randperm(len(right), generator=torch.Generator().manual_seed(seed))
    return order[right[order]][:CASES].tolist(), order[~right[order]][:CASES].tolist()


def report_lines(result: Result, right: Sequence[int], wrong: Sequence[int]) -> list[str]:
    """The accuracy and the cases, as the report prints them."""
    lines = [f"Accuracy: {100 * accuracies(result)['top1']:.2f}%"]
    for row in right:
        lines.append(f"Successful Cases: {(result.pictures.paths[row].name, result.name(result.predicted[row]))}")
    for row in wrong:
        truth, predicted = result.name(result.pictures.truth[row]), result.name(result.predicted[row])
        lines.append(f"Failed Cases: {(result.pictures.paths[row].name, f'GT:{truth}', f'Predicted:{predicted}')}")
    return lines


# ---------------------------------------------------------------- figures


def cases_figure(path: Path, result: Result, right: Sequence[int], wrong: Sequence[int], title: str) -> None:
    """Right cases in the upper row, wrong ones in the lower: the picture and its three best classes with probabilities."""
    figure = Figure(figsize=(11.5, 6.8))
    axes = figure.subplots(4, CASES, squeeze=False, gridspec_kw={"height_ratios": (2.2, 1, 2.2, 1)})
    for line, rows in enumerate((right, wrong)):
        for column in range(CASES):
            picture, bars = axes[2 * line, column], axes[2 * line + 1, column]
            picture.set_axis_off()
            bars.set_axis_off()
            if column < len(rows):
                _draw_case(picture, bars, result, rows[column])
    figure.suptitle(f"{title}; upper row right, lower row wrong", fontsize=10)
    figure.subplots_adjust(0.02, 0.02, 0.99, 0.86, 0.1, 0.28)
    _save(figure, path)


def _draw_case(picture: Axes, bars: Axes, result: Result, row: int) -> None:
    truth = int(result.pictures.truth[row])
    picture.imshow(result.pictures.open(row), interpolation="nearest")
    picture.set_title(f"{result.pictures.paths[row].name}\n{result.name(truth)}", fontsize=9)
    best = result.best[row, :3].tolist()
    for place, index in enumerate(best):
        share = float(result.probabilities[row, index])
        colour = "tab:green" if index == truth else "tab:red" if place == 0 else "tab:gray"
        bars.barh(place, share, color=colour, alpha=0.45, height=0.8)
        bars.text(0.01, place, f"{result.name(index)}  {100 * share:.1f}%", va="center", fontsize=8)
    bars.set(xlim=(0, 1), ylim=(2.5, -0.5))


def confusion_figure(path: Path, result: Result, title: str) -> None:
    """The confusion matrix in shares of each row; rows are the truth."""
    names, counts = result.pictures.names, result.confusion.double()
    size = 8 if len(names) <= 60 else 5
    margin = 0.5 + 0.0085 * size * max(
        map(len, names)
    )  # inches, for the longest name; measuring texts takes longer than drawing
    side = min(24.0, 2.5 + margin + 0.0225 * size * len(names))
    figure = Figure(figsize=(side, side))
    axis = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    image = axis.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axis.set_yticks(range(len(names)), names, fontsize=size)
    axis.set(xlabel="predicted", ylabel="truth")
    axis.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02, label="share of the class's pictures")
    figure.subplots_adjust(margin / side, margin / side, 1 - 0.8 / side, 1 - 0.6 / side)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


# ---------------------------------------------------------------- several runs


def summary(metrics: dict[str, Any]) -> list[str]:
    """What was measured, with which prompts, beside the published figure."""
    templates = metrics["templates"]
    known = metrics["published_cifar100"]
    beside = f"{known} on all of CIFAR-100, with its 18 prompts" if known else "none known for this model"
    used = f"{metrics['prompts']} ({len(templates)}, such as {templates[0]!r}), names {metrics['names']}"
    share = {name: f"{100 * metrics[name]:.2f}%" for name in ("top5", "mean_recall")}
    return [
        f"Model: {metrics['model']}, {metrics['precision']}",
        f"Prompts: {used}",
        f"Pictures: {metrics['pictures']} of {metrics['classes']} classes",
        f"Top-5: {share['top5']}, mean per-class recall: {share['mean_recall']}",
        f"Published top-1: {beside}",
    ]


COLUMNS = (
    "model",
    "prompts",
    "names",
    "precision",
    "pictures",
    "classes",
    "top1",
    "top5",
    "mean_recall",
    "published_cifar100",
)


def collect(folder: Path) -> pd.DataFrame:
    """A row per record.json of this script below the folder, best first; writes FOLDER/runs.csv. Raises BadInput for none."""
    rows = []
    for path in sorted(Path(folder).rglob("record.json")):
        record = read_json(path)
        metrics = record.get("metrics", {})
        if all(name in metrics for name in COLUMNS):
            about = {name: record.get(name) for name in ("machine", "started", "revision")}
            seconds = round(sum(record["timings_s"].values()), 2)
            rows.append(
                {
                    "run": str(path.parent.relative_to(folder)),
                    **{c: metrics[c] for c in COLUMNS},
                    "seconds": seconds,
                    **about,
                }
            )
    if not rows:
        raise BadInput(f"--collect {folder}: no record.json of this script below it")
    table = pd.DataFrame(rows).sort_values("top1", ascending=False, kind="stable")
    write_csv(folder / "runs.csv", table)
    return table


def print_table(table: pd.DataFrame) -> None:
    """The columns that a reader compares, accuracies in %."""
    shown = table[["model", "prompts", "names", "top1", "top5", "mean_recall", "published_cifar100"]].copy()
    for column in ("top1", "top5", "mean_recall"):
        shown[column] = (100 * shown[column].astype(float)).round(2)
    print(shown.fillna("-").to_string(index=False))
