"""Zero-shot classification on the page: of the course's pictures where they are there, of the miniature world's where not."""

from __future__ import annotations

import ast
from pathlib import Path

from pages.content import Figure, Part, Score, Shown, Table, facts_table, percent
from pages.sources import CLIP, Sources
from runtime.files import read_json
from runtime.steps import Step

SETTINGS = ("model", "precision", "prompts", "templates", "names", "pictures", "classes", "quickgelu_forced")
TEXT = (
    "CLIP maps pictures and texts to the same space. Nothing is trained here: a sentence is made of every class name, and a picture "
    "gets the class whose sentence lies nearest."
)
HINT = (
    "The course's pictures: DATA=hw2_data with clip_zeroshot/val in it; the weights of ViT-B-32 are fetched once, where there is a "
    "network."
)
PUBLISHED = 0.5864  # what the original report says of the course's pictures


def part(sources: Sources) -> Part:
    """With the course's pictures, or the miniature's."""
    return course_part(sources) if sources.photographs else miniature_part(sources)


def classify(sources: Sources, place: Path, *flags: str) -> tuple[str, ...]:
    """The command."""
    where = ("--output", f"{place}", "--cache", f"{place / 'classifiers'}", "--device", sources.device)
    return ("P3_clip_zeroshot.py", *flags, *where)


def course_part(sources: Sources) -> Part:
    """The report's model and prompt."""
    images = sources.photographs
    assert images
    place = sources.place("p3_zeroshot")
    command = classify(sources, place, "--preset", "report", "--images", f"{images}")
    return Part(
        name="p3-zeroshot",
        problem="P3",
        title="Zero-shot classification with CLIP",
        text=TEXT,
        source=f"{sources.label(images)}, ViT-B-32 by OpenAI",
        real=True,
        steps=(Step("p3_zeroshot", "P3: zero-shot classification", (command,), (images,)),),
        show=lambda folder: show(folder / "p3_zeroshot", percent(PUBLISHED)),
        instead=miniature_part(sources),
    )


def miniature_part(sources: Sources) -> Part:
    """Pictures of pairs of colour and object that the small CLIP was never shown."""
    drawn, place = sources.place("miniature_pictures"), sources.place("miniature_zeroshot")
    count = "340" if sources.quick else "1200"
    render = ("miniature/world.py", "zeroshot", "--count", count, "--seed", "1", "--output", f"{drawn}")
    command = classify(sources, place, "--model", f"local-dir:{sources.label(CLIP)}", "--images", f"{drawn / 'val'}")
    return Part(
        name="miniature-zeroshot",
        problem="P3",
        title="Zero-shot classification with the small CLIP",
        text=TEXT
        + " The pictures are of a small world rendered by code, the model was trained on it. Every picture shows an object in a "
        "colour that this object never had in training.",
        source=f"shipped weights {sources.label(CLIP)}, rendered pictures",
        real=False,
        steps=(
            Step("miniature_pictures", "P3: rendering pictures to classify", (render,)),
            Step("miniature_zeroshot", "P3: zero-shot classification", (command,), (CLIP,), ("miniature_pictures",)),
        ),
        show=lambda folder: show(folder / "miniature_zeroshot", "95 %"),
        hint="" if sources.photographs else HINT,
    )


def case_row(line: str) -> tuple[str, ...]:
    """From "Failed Cases: ('13_455.png', 'GT:willow_tree', 'Predicted:oak_tree')", or a successful one with a single name."""
    kind, names = line.split(": ", 1)
    file, *said = ast.literal_eval(names)
    truth, predicted = said[0].removeprefix("GT:"), said[-1].removeprefix("Predicted:")
    return ("right" if kind.startswith("Success") else "wrong", file, truth, predicted)


def show(folder: Path, wanted: str) -> Shown:
    """Accuracy, five right and five wrong cases, what is mixed up."""
    found = read_json(folder / "record.json")["metrics"]
    share = percent(found["top1"])
    shown = Shown(scores=[Score(f"zero-shot accuracy, {found['pictures']:,} pictures", share, wanted)])
    rows = (
        ("top 1", share),
        ("top 5", percent(found["top5"])),
        ("mean over the classes", percent(found["mean_recall"])),
    )
    shown.tables.append(Table("Right answers", ("", "share"), rows))
    cases = tuple(case_row(line) for line in found["cases"])
    shown.tables.append(Table("Five right and five wrong cases", ("", "file", "shows", "taken for"), cases))
    pairs = tuple(
        (pair["truth"], pair["predicted"], f"{pair['times']} of {pair['pictures']}") for pair in found["confused_pairs"]
    )
    shown.tables.append(Table("Most frequent mistakes", ("shows", "taken for", "how often"), pairs))
    shown.figures = [
        Figure(folder / "cases.png", "Right cases above, wrong ones below, each with the three likeliest classes."),
        Figure(folder / "confusion.png", "Rows: what the pictures show. Columns: what they were taken for."),
    ]
    shown.tables.append(facts_table("Settings", {name: found.get(name) for name in SETTINGS}))
    return shown
