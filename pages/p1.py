"""P1 on the page: the graded digits, their scores, and the figures of the original report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pages.content import Figure, Part, Score, Shown, Table, facts_table, percent, plain
from pages.sources import DIGITS, Sources
from runtime.files import load_safetensors, read_json
from runtime.steps import Step

PROBLEM = "P1"
NAMES = {"mnistm": "MNIST-M", "svhn": "SVHN"}
RECIPE = ("schedule", "prediction", "steps", "batch", "lr", "min_snr", "ema", "drop_digit", "drop_domain", "svhn_share")


def parts(sources: Sources) -> list[Part]:
    """The scores, then the figures."""
    return [scores_part(sources), figures_part(sources)]


def source_of(sources: Sources) -> tuple[str, bool]:
    """The name of the checkpoint, and whether it is one's own."""
    own = sources.digits != DIGITS
    return f"{'your' if own else 'shipped'} weights {sources.label(sources.digits)}", own


# ---------------------------------------------------------------- scores


def scores_part(sources: Sources) -> Part:
    """1,000 digits as hw2_1.sh draws them and, but for the demo, as the network draws them without a second try."""
    ways = {"retries": 3} if sources.quick else {"retries": 3, "plain": 0}
    steps = [step for way, retries in ways.items() for step in drawn_and_graded(sources, way, retries)]
    source, real = source_of(sources)
    judge = sources.mnistm_classifier
    return Part(
        name="p1-scores",
        problem=PROBLEM,
        title="1,000 digits on demand",
        text="One network is told which digit to draw, and in which of two styles: MNIST-M, digits blended with photographs, or SVHN, "
        "house numbers. 50 pictures of every digit in both styles are shown to a judge, a classifier trained on real digits; what counts "
        "is how often it reads the digit that was asked for. As in hw2_1.sh, pictures that the shipped judges misread are drawn again "
        "with another seed, at most three times."
        + ("" if sources.quick else " The second line of the table is without that help."),
        source=source + (f", MNIST-M judged by {sources.label(judge)}" if judge else ", shipped judges"),
        real=real or judge is not None,
        steps=tuple(steps),
        show=lambda folder: show_scores(folder, list(ways), sources),
        hint=""
        if judge
        else "The course's own judge: JUDGE=Classifier.pth (or Classifier.pth in the data folder). "
        "Your own training: DIGITS=runs/p1/best.safetensors.",
    )


def drawn_and_graded(sources: Sources, way: str, retries: int) -> list[Step]:
    """Two steps: the pictures, and their grades."""
    drawn, graded = f"p1_digits_{way}", f"p1_grades_{way}"
    place, grades = sources.place(drawn), sources.place(graded)
    draw = ["P1_inference.py", "--output", f"{place / 'pictures'}", "--checkpoint", f"{sources.digits}"]
    draw += ["--retries", str(retries), "--device", sources.device, "--record", f"{place / 'record.json'}"]
    grade = ["P1_classifier.py", "grade", f"{place / 'pictures'}", "--device", sources.device]
    grade += ["--record", f"{grades / 'record.json'}"]
    judge = sources.mnistm_classifier
    if judge:
        grade += ["--mnistm-classifier", f"{judge}"]
    what = "the 1,000 graded digits" if retries else "the same without second tries"
    return [
        Step(drawn, f"P1: drawing {what}", (tuple(draw),), (sources.digits,)),
        Step(graded, f"P1: grading {what}", (tuple(grade),), (judge,) if judge else (), (drawn,)),
    ]


def show_scores(folder: Path, ways: list[str], sources: Sources) -> Shown:
    """Accuracies in a table, what was drawn how, and one picture of each digit."""
    grades = {way: read_json(folder / f"p1_grades_{way}" / "record.json")["metrics"] for way in ways}
    drawn = read_json(folder / f"p1_digits_{ways[0]}" / "record.json")["metrics"]
    first = grades[ways[0]]
    shown = Shown()
    for domain, name in NAMES.items():
        wanted = "0.90 simple, 0.95 strong" if sources.mnistm_classifier else ""
        shown.scores.append(
            Score(f"{name} digits read right (1,000 drawn as graded)", percent(first[domain]["accuracy"]))
        )
        shown.scores[-1] = Score(shown.scores[-1].what, shown.scores[-1].value, wanted)
    shown.scores.append(Score("mean of both", percent(first["mean"]), "90 % simple, 95 % strong"))
    shown.tables += [accuracy_table(grades), quality_table(grades)]
    shown.tables.append(facts_table("Sampling", drawn["sampler"] | {"pictures": drawn["pictures"]}))
    shown.tables.append(facts_table("Training of the network, from its file", trained_with(sources.digits)))
    return shown


def label_of(way: str) -> str:
    """What a way of drawing is called in tables."""
    return "with second tries (graded)" if way == "retries" else "as drawn"


def accuracy_table(grades: dict[str, Any]) -> Table:
    """A row per way of drawing."""
    rows = tuple(
        (label_of(way), *(f"{found[domain]['accuracy']:.4f}" for domain in NAMES), f"{found['mean']:.4f}")
        for way, found in grades.items()
    )
    return Table("Share of digits that the judges read right", ("", *NAMES.values(), "mean"), rows)


def quality_table(grades: dict[str, Any]) -> Table:
    """What accuracy hides, per domain and way."""
    names = list(next(iter(grades.values()))["mnistm"]["quality"])
    rows = tuple(
        (NAMES[domain], label_of(way), *(plain(round(found[domain]["quality"][name], 3)) for name in names))
        for way, found in grades.items()
        for domain in NAMES
    )
    caption = "Closeness to real digits in the judge's features: Frechet distance (lower is closer), share of realistic pictures "
    caption += "(precision), share of the real variety (recall), share of copies of training pictures"
    return Table(caption, ("", "", *(name.replace("_", " ") for name in names)), rows)


def trained_with(path: Path) -> dict[str, Any]:
    """The recipe in the header of a checkpoint."""
    header = json.loads(load_safetensors(path)[1]["network"])
    origin = header["origin"]
    known = origin.get("settings", {}) | origin.get("recipe", {})
    about = {"preset": origin.get("preset"), "T": header["timesteps"], "seed": known.get("seed")}
    return about | {name: known.get(name) for name in RECIPE}


# ---------------------------------------------------------------- figures


def figures_part(sources: Sources) -> Part:
    """A grid per domain, the reverse process and, but for the demo, the sweep over guidance."""
    place = sources.place("p1_figures")
    figures = ["grid", "reverse"] if sources.quick else ["grid", "reverse", "sweep"]
    command = ["P1_report.py", "--checkpoint", f"{sources.digits}", "--output", f"{place}", "--device", sources.device]
    source, real = source_of(sources)
    return Part(
        name="p1-figures",
        problem=PROBLEM,
        title="Digits, noise and guidance",
        text="Every picture starts as pure noise and is cleaned step by step. One noise serves a whole column of the grids: colour and "
        "background follow the noise, the shape follows the digit.",
        source=source,
        real=real,
        steps=(Step("p1_figures", "P1: figures", ((*command, "--figures", *figures),), (sources.digits,)),),
        show=lambda folder: show_figures(folder / "p1_figures"),
    )


def show_figures(folder: Path) -> Shown:
    """Whatever of the figures was asked for."""
    grid = "{}: a row per digit, one noise for each whole column."
    captions = {
        "grid_mnistm.png": grid.format("MNIST-M"),
        "grid_svhn.png": grid.format("SVHN"),
        "reverse_process.png": "The reverse process: the first “0” of both styles on its way from noise (left) to picture (right), all "
        "steps of DDPM. The moments are those of the original report, t = 500 .. 1 of 500, scaled to this T.",
        "guidance_sweep.png": "Guidance: more of it is read more reliably and varies less.",
    }
    figures = [Figure(folder / name, text) for name, text in captions.items() if (folder / name).is_file()]
    return Shown(figures=list(figures))
