"""Zero-shot classification on the page: of the course's images if they are present, else of the miniature world's."""

from __future__ import annotations

import ast
import csv
from functools import partial
from pathlib import Path
from typing import Any

from pages.elements import Element, Figure, Score, Section, Table, percent, settings_table
from pages.inputs import CLIP, Inputs
from pages.results import bar, quoted_percent
from runtime.files import read_json
from runtime.steps import Command, Step, relative

SETTINGS = ("model", "precision", "prompts", "templates", "names", "pictures", "classes", "quickgelu_forced")
TEXT = (
    "CLIP maps images and texts to the same space. Nothing is trained here: a sentence is made of every class name, and an image gets the "
    "class whose sentence lies nearest."
)
WORLD = (
    " The images show a small world rendered by code, and the model was trained on it. Every image shows an object in a colour that this "
    "object never had in training."
)
HINT = "The course's images: DATA=hw2_data with clip_zeroshot/val in it. The weights of ViT-B-32 are downloaded once."
QUESTION = "accuracy, and five right and five wrong cases"
COURSE, MINIATURE = "zeroshot-course", "miniature-clip-held-out"  # rows of docs/results.md
FEW = 20  # classes at most, for a confusion matrix that half a page can show
SHOWN, LEAST = 3, 0.005  # classes named at most in a case, and their least probability


def sections(inputs: Inputs) -> list[Section]:
    """Return one section: the course's images, with the miniature's as fallback, or the miniature's alone."""
    section = partial(Section, problem="P3", title="Zero-shot classification with CLIP", question=QUESTION)
    miniature, rendered = inputs.steps / "miniature_zeroshot", inputs.steps / "miniature_pictures"
    count = "340" if inputs.quick else "1200"
    render = ("miniature/world.py", "zeroshot", "--count", count, "--seed", "1", "--output", rendered)
    command = classify(inputs, miniature, "--model", f"local-dir:{relative(CLIP)}", "--images", rendered / "val")
    title = "P3: zero-shot classification"
    shipped = section(
        name="miniature-zeroshot",
        title="Zero-shot classification with the small CLIP",
        text=TEXT + WORLD,
        inputs=f"weights {relative(CLIP)}, rendered images",
        shipped=True,
        steps=(
            Step("miniature_pictures", "P3: rendering images to classify", (render,)),
            Step("miniature_zeroshot", title, (command,), (CLIP,), ("miniature_pictures",)),
        ),
        elements=lambda: result_elements(miniature, rendered / "val", MINIATURE),
        hint="" if inputs.photographs else HINT,
    )
    if not inputs.photographs:
        return [shipped]
    photographs, folder = inputs.photographs, inputs.steps / "p3_zeroshot"
    command = classify(inputs, folder, "--preset", "report", "--images", photographs)
    return [
        section(
            name="p3-zeroshot",
            text=TEXT,
            inputs=f"{relative(photographs)}, ViT-B-32 by OpenAI",
            shipped=False,
            steps=(Step("p3_zeroshot", title, (command,), (photographs,)),),
            elements=lambda: result_elements(folder, photographs, COURSE),
            fallback=shipped,
        )
    ]


def classify(inputs: Inputs, folder: Path, *flags: str | Path) -> Command:
    """Return the command that classifies images and writes its results to `folder`."""
    where = ("--output", folder, "--cache", folder / "classifiers", "--device", inputs.device)
    return ("P3_clip_zeroshot.py", *flags, *where)


def result_elements(folder: Path, images: Path, row: str) -> list[Element]:
    """Return a page's elements: accuracies, right and wrong cases, the confusion matrix, frequent mistakes and settings.

    `folder` holds the script's results, and `images` the images that it classified.
    `row` of docs/results.md has the published accuracy and the value to reach.
    """
    metrics = read_json(folder / "record.json")["metrics"]
    shares = (("top 5", percent(metrics["top5"])), ("mean over the classes", percent(metrics["mean_recall"])))
    pairs = tuple(
        (pair["truth"], pair["predicted"], f"{pair['times']} of {pair['pictures']}")
        for pair in metrics["confused_pairs"]
    )
    few = metrics["classes"] <= FEW
    known = {"row": row, "quoted": quoted_percent(row)}
    return [
        Score(f"zero-shot accuracy, {metrics['pictures']:,} images", percent(metrics["top1"]), bar(row), **known),
        *case_figures(folder, images, metrics["cases"]),
        Figure(
            "Rows: what the images show. Columns: what they were classified as.",
            (folder / "confusion.png",),
            half=few,
            plot=True,
        ),
        Table("Right answers", ("", "share"), (("top 1", percent(metrics["top1"])), *shares)),
        Table("Most frequent mistakes", ("shows", "classified as", "how often"), pairs),
        settings_table("Settings", {name: metrics.get(name) for name in SETTINGS}),
    ]


def case_figures(folder: Path, images: Path, lines: list[str]) -> list[Figure]:
    """Return a figure of right cases and one of wrong cases.

    `lines` are the cases as the script prints them. Labels are the true class and the likeliest classes.
    """
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        predictions = {row["file"]: row for row in csv.DictReader(file)}
    figures = []
    for start, caption in {
        "Successful": "Right: {} images, and the likeliest classes.",
        "Failed": "Wrong: {} images.",
    }.items():
        files = [ast.literal_eval(line.split(": ", 1)[1])[0] for line in lines if line.startswith(start)]
        if files:
            labels = tuple(case_label(predictions[file]) for file in files)
            paths = tuple(images / file for file in files)
            figures.append(Figure(caption.format(len(files)), paths, labels, columns=5))
    return figures


def case_label(row: dict[str, Any]) -> str:
    """Return the true class of a row of predictions.csv and its likeliest classes with their probabilities."""
    best = zip(row["top5"].split("|"), row["top5_probability"].split("|"), strict=True)
    shares = [f"{name} {100 * float(share):.0f}\N{NO-BREAK SPACE}%" for name, share in best if float(share) >= LEAST][
        :SHOWN
    ]
    return f"shows {row['truth']}; read as {', '.join(shares)}"
