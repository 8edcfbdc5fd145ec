"""Zero-shot classification on the page: of the course's images if they are present, else of the miniature world's."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pages.elements import Element, Figure, Score, Section, Table, percent, settings_table
from pages.inputs import CLIP, Inputs
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
PUBLISHED = 0.5864  # accuracy in the original report, on the course's images


def sections(inputs: Inputs) -> list[Section]:
    """Return the section of the course's images, or of the miniature's."""
    section = partial(Section, problem="P3", title="Zero-shot classification with CLIP")
    miniature, rendered = inputs.steps / "miniature_zeroshot", inputs.steps / "miniature_pictures"
    count = "340" if inputs.quick else "1200"
    render = ("miniature/world.py", "zeroshot", "--count", count, "--seed", "1", "--output", rendered)
    command = classify(inputs, miniature, "--model", f"local-dir:{relative(CLIP)}", "--images", rendered / "val")
    title = "P3: zero-shot classification"
    shipped = section(
        name="miniature-zeroshot",
        title="Zero-shot classification with the small CLIP",
        text=TEXT + WORLD,
        inputs=f"shipped weights {relative(CLIP)}, rendered images",
        shipped=True,
        steps=(
            Step("miniature_pictures", "P3: rendering images to classify", (render,)),
            Step("miniature_zeroshot", title, (command,), (CLIP,), ("miniature_pictures",)),
        ),
        elements=lambda: result_elements(miniature, "95 %"),
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
            elements=lambda: result_elements(folder, percent(PUBLISHED)),
            fallback=shipped,
        )
    ]


def classify(inputs: Inputs, folder: Path, *flags: str | Path) -> Command:
    """Return the command that classifies images into a step's folder."""
    where = ("--output", folder, "--cache", folder / "classifiers", "--device", inputs.device)
    return ("P3_clip_zeroshot.py", *flags, *where)


def result_elements(folder: Path, target: str) -> list[Element]:
    """Return the accuracies, five right and five wrong cases, and the most frequent mistakes."""
    metrics = read_json(folder / "record.json")["metrics"]
    shares = (("top 5", percent(metrics["top5"])), ("mean over the classes", percent(metrics["mean_recall"])))
    pairs = tuple(
        (pair["truth"], pair["predicted"], f"{pair['times']} of {pair['pictures']}")
        for pair in metrics["confused_pairs"]
    )
    return [
        Score(f"zero-shot accuracy, {metrics['pictures']:,} images", percent(metrics["top1"]), target),
        Figure("Right cases above, wrong ones below, each with the three likeliest classes.", (folder / "cases.png",)),
        Figure("Rows: what the images show. Columns: what they were classified as.", (folder / "confusion.png",)),
        Table("Right answers", ("", "share"), (("top 1", percent(metrics["top1"])), *shares)),
        Table("Most frequent mistakes", ("shows", "classified as", "how often"), pairs),
        settings_table("Settings", {name: metrics.get(name) for name in SETTINGS}),
    ]
