"""P1 on the page: the graded digits, their scores, and the figures of the original report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean

from pages.elements import Element, Figure, Score, Section, Strip, Table, percent, plain, settings_table
from pages.inputs import DIGITS, Inputs
from pages.results import quoted_percent
from runtime.files import load_safetensors, read_json
from runtime.steps import Command, Step, relative

NAMES = {"mnistm": "MNIST-M", "svhn": "SVHN"}
MODES = {"plain": "first try", "retries": "after retries"}
SELECTED = "selected by the shipped classifiers (graded)"
ROWS = {"mnistm": "p1-accuracy-mnistm", "svhn": "p1-accuracy-svhn", "mean": "p1-accuracy-mean"}  # of the first try
RECIPE = ("schedule", "prediction", "steps", "batch", "lr", "min_snr", "ema", "drop_digit", "drop_domain", "svhn_share")
FIGURES = {
    "grid_mnistm.png": "MNIST-M, a row per digit.",
    "grid_svhn.png": "SVHN, a row per digit.",
    "reverse_process.png": "From noise (left) to image (right), all steps of DDPM. The moments are those of the original report, "
    "t = 500 .. 1 of 500, scaled to this T.",
    "denoising.webp": "The animation: every digit on its way from noise, in 30 steps of DDIM, MNIST-M above and SVHN below.",
    "label_effects.png": "Another digit or domain, and none: how far they move the image that the network predicts from noise. "
    "A distance of 0 means that the label is ignored; the error is the distance of the prediction to the image itself.",
    "guidance_sweep.png": "With more guidance digits are read more reliably and vary less.",
}
HALVES, PLOTS = {"grid_mnistm.png", "grid_svhn.png"}, {"label_effects.png", "guidance_sweep.png"}
STRIP = ("mnistm/3_001", "svhn/3_001", "mnistm/7_001", "svhn/7_001", "mnistm/8_001")


def sections(inputs: Inputs) -> list[Section]:
    """Return two sections: the scores of the 1,000 digits, and the figures."""
    shipped, classifier, figures = inputs.digits == DIGITS, inputs.mnistm_classifier, inputs.steps / "p1_figures"
    weights = f"{'' if shipped else 'your '}weights {relative(inputs.digits)}"
    modes = ["retries"] if inputs.quick else ["plain", "retries"]
    kinds = ["grid", "reverse"] if inputs.quick else ["grid", "reverse", "animation", "diagnose", "sweep"]
    draw = ("P1_report.py", "--model", inputs.digits, "--output", figures, "--device", inputs.device, "--figures")
    return [
        Section(
            name="p1-scores",
            problem="P1",
            title="1,000 digits on demand",
            question="accuracy of the generated digits",
            text="One network draws a requested digit in one of two styles: MNIST-M, digits blended with photographs, or SVHN, house "
            "numbers. A classifier trained on real digits reads 50 images of every digit in both styles. The score is how often it reads "
            "the requested digit. As in hw2_1.sh, images that the shipped classifiers misread are drawn again with another seed, at most "
            "three times: the scores after these retries are selected by the classifiers that give them. The first try is not.",
            inputs=f"{weights}, "
            + (f"MNIST-M read by {relative(classifier)}" if classifier else "shipped classifiers"),
            shipped=shipped and not classifier,
            steps=tuple(step for mode in modes for step in sample_and_grade(inputs, mode)),
            elements=lambda: score_elements(inputs, modes),
            hint=""
            if classifier
            else "The course's own classifier: CLASSIFIER=Classifier.pth (or Classifier.pth in the data folder). "
            "Your own training: DIGITS=runs/p1/best.safetensors.",
        ),
        Section(
            name="p1-figures",
            problem="P1",
            title="Digits, noise and guidance",
            question="ten images of every digit of both domains, and the first “0” at six timesteps",
            text="Every image starts as pure noise and is denoised step by step. One noise serves a whole column of the grids: colour and "
            "background follow the noise, the shape follows the digit.",
            inputs=weights,
            shipped=shipped,
            steps=(Step("p1_figures", "P1: figures", ((*draw, *kinds),), (inputs.digits,)),),
            elements=lambda: [
                Figure(text, (figures / name,), half=name in HALVES, plot=name in PLOTS)
                for name, text in FIGURES.items()
                if (figures / name).is_file()
            ],
        ),
    ]


def sample_and_grade(inputs: Inputs, mode: str) -> tuple[Step, Step]:
    """Return the step that draws the 1,000 digits and the step that grades them.

    Mode "plain" takes first tries only. Mode "retries" redraws misread digits, at most three times.
    """
    sampled, graded = f"p1_digits_{mode}", f"p1_grades_{mode}"
    images, device = inputs.steps / sampled / "images", ("--device", inputs.device)
    sample: Command = ("P1_inference.py", "--output", images, "--model", inputs.digits, *device)
    sample += ("--retries", "0" if mode == "plain" else "3", "--record", inputs.steps / sampled / "record.json")
    grade = ("P1_classifier.py", "grade", images, *device, "--record", inputs.steps / graded / "record.json")
    classifier = (inputs.mnistm_classifier,) if inputs.mnistm_classifier else ()
    flags = ("--mnistm-classifier", *classifier) if classifier else ()
    what = "the same digits, first try only" if mode == "plain" else "the 1,000 graded digits"
    return (
        Step(sampled, f"P1: drawing {what}", (sample,), (inputs.digits,)),
        Step(graded, f"P1: grading {what}", ((*grade, *flags),), classifier, (sampled,)),
    )


def score_elements(inputs: Inputs, modes: list[str]) -> list[Element]:
    """Return a strip of digits, the accuracies, the quality measures, and tables of the settings of sampling and training.

    `modes` are keys of MODES and include "retries". Grades come from the records of the step p1_grades_{mode} of each.
    Images and sampling settings come from the step p1_digits_retries. Training settings come from the checkpoint's header.
    """
    grades = {mode: read_json(inputs.steps / f"p1_grades_{mode}" / "record.json")["metrics"] for mode in modes}
    sampling = read_json(inputs.steps / "p1_digits_retries" / "record.json")["metrics"]
    retries, shipped = grades["retries"], inputs.digits == DIGITS
    scores = {mode: {domain: float(grade[domain]["accuracy"]) for domain in NAMES} for mode, grade in grades.items()}
    if "plain" not in scores:  # the record of sampling has the first try's misread digits, by the shipped classifiers
        wrong = sampling["misread"]["first_try"]
        first_try = {domain: 1 - wrong[domain] / retries[domain]["pictures"] for domain in NAMES}
        scores = {"plain": first_try} | scores
    accuracies = tuple(
        (MODES[mode], *(f"{share:.4f}" for share in score.values()), f"{mean(score.values()):.4f}")
        for mode, score in scores.items()
    )
    measures = list(retries["mnistm"]["quality"])
    qualities = tuple(
        (NAMES[domain], MODES[mode], *(plain(round(grade[domain]["quality"][name], 3)) for name in measures))
        for mode, grade in grades.items()
        for domain in NAMES
    )
    closeness = "Closeness to real digits in the classifier's features: Frechet distance (lower is closer), share of realistic images "
    closeness += "(precision), share of the real variety (recall), share of copies of training images"
    rows = ROWS | ({"mnistm": "p1-accuracy-mnistm-course"} if inputs.mnistm_classifier else {})
    known = {name: {"row": row, "quoted": quoted_percent(row)} for name, row in rows.items() if shipped}
    bars = "90 % simple, 95 % strong"
    images = inputs.steps / "p1_digits_retries" / "images"
    return [
        Strip("digits on demand", tuple(images / f"{name}.png" for name in STRIP)),
        *(
            Score(f"{NAMES[domain]} digits read right, {MODES['plain']}", percent(share), bars, **known.get(domain, {}))
            for domain, share in scores["plain"].items()
        ),
        Score(
            f"mean of both, {MODES['plain']}", percent(mean(scores["plain"].values())), bars, **known.get("mean", {})
        ),
        Score(f"mean of both, {MODES['retries']}, {SELECTED}", percent(mean(scores["retries"].values()))),
        Table("Share of digits that the classifiers read right", ("", *NAMES.values(), "mean"), accuracies),
        Table(closeness, ("", "", *(name.replace("_", " ") for name in measures)), qualities),
        settings_table("Sampling", sampling["sampler"] | {"images": sampling["pictures"]}),
        *training_tables(inputs.digits),
    ]


def training_tables(path: Path) -> list[Table]:
    """Return the training settings in a checkpoint's header.

    The shipped one was trained in stages, of which the header has only the last. A table of all stages comes first.
    """
    header = json.loads(load_safetensors(path)[1]["network"])
    origin = header["origin"]
    settings = origin.get("settings", {}) | origin.get("recipe", {})
    about = {"preset": origin.get("preset"), "T": header["timesteps"], "seed": settings.get("seed")}
    about |= {name: settings.get(name) for name in RECIPE}
    if path != DIGITS:
        return [settings_table("Training of the network, from its file", about)]
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    stages = re.findall(r"(?:^\|.*\n)+", card, re.M)[0]  # its first table
    head, _, *rows = (tuple(cell.strip() for cell in line.strip("|").split("|")) for line in stages.splitlines())
    return [
        Table("Training of the network: every stage, from its card", head, tuple(rows), settings=True),
        settings_table("Settings of the last stage, from its file", about),
    ]
