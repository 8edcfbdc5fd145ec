"""P2 on the page: faces from given noises, the effect of eta, and two ways from one noise to another."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pages.elements import Element, Figure, Score, Section, Strip, Table
from pages.inputs import FACES, Inputs
from pages.results import quoted
from runtime.files import read_json
from runtime.steps import Command, Step, relative

HINT = "The course's faces: DATA=hw2_data with face/UNet.pt, face/noise and face/GT in it."
FIGURES = {
    "eta.png": "A row per eta, a column per noise.",
    "interpolation.png": "Above by slerp, below by linear interpolation, in steps of a tenth.",
    "eta_mse.png": "Mean squared error on 0..255 against the image of eta 0, a line per noise.",
    "noise_norm.png": "In training the length was always 1.",
}
PLOTS = {"eta_mse.png", "noise_norm.png"}
HALFWAY = {"linear": 0, "slerp": 1}  # index of the value in row p2-noise-halfway of docs/results.md


def sections(inputs: Inputs) -> list[Section]:
    """Return two sections: the faces of the given noises, and the figures of eta and interpolation."""
    unet, noise, faces, figures = inputs.unet, inputs.noise, inputs.steps / "p2_faces", inputs.steps / "p2_figures"
    flags: Command = ("--model", unet or FACES, "--device", inputs.device)
    flags += ("--noise", noise) if unet and noise else ("--seeds", "0-9")
    flags += () if unet else ("--to-uint8", "clamp")
    sample: Command = ("P2_ddim.py", *flags, "--output", faces / "images", "--record", faces / "record.json")
    if unet and noise and inputs.reference:
        sample += ("--reference", inputs.reference)
    draw: Command = ("P2_report.py", *flags, "--output", figures)
    files = tuple(path for path in (unet or FACES, noise, inputs.reference) if path)
    weights = relative(unet) if unet else f"weights {relative(FACES)}"
    noises = f"noises of {relative(noise)}" if unet and noise else "noises of seeds 0 to 9"
    section = partial(Section, problem="P2", inputs=f"{weights}, {noises}", shipped=not unet, hint="" if unet else HINT)
    return [
        section(
            name="p2-faces",
            title="Noise in, face out",
            question="the faces of the given noises, at eta 0",
            text="A diffusion model for faces is sampled by DDIM: 50 of its 1,000 steps, and with eta 0 no further randomness, so the "
            "noise alone decides who appears. The homework hands out ten noises, the network and the faces that must come out.",
            steps=(Step("p2_faces", "P2: a face from each noise", (sample,), files),),
            elements=lambda: face_elements(faces),
        ),
        section(
            name="p2-figures",
            title="Eta, slerp and linear interpolation",
            question="noises 00 to 03 at five values of eta; slerp and linear interpolation between 00 and 01",
            text="With eta above 0 every step adds fresh noise, and the same start leads elsewhere. Between two noises the way matters: "
            "slerp turns one into the other and keeps its length; linear interpolation cuts the corner, and half way the noise is shorter "
            "than any noise in training.",
            steps=(Step("p2_figures", "P2: figures of eta and interpolation", (draw,), files),),
            elements=lambda: figure_elements(figures),
        ),
    ]


def face_elements(folder: Path) -> list[Element]:
    """Return the faces, and their errors if there was a reference, else the seconds per face."""
    record = read_json(folder / "record.json")
    errors, steps = record["metrics"]["reference"], record["settings"]["steps"]
    paths = tuple(sorted((folder / "images").glob("*.png")))
    faces = Figure(f"{len(paths)} noises, {len(paths)} faces, eta 0, {steps} steps.", paths, columns=5)
    strip = Strip("faces from given noises", paths[:5])
    if not errors:
        seconds = record["timings_s"]["drawing"] / len(paths)
        return [Score(f"faces drawn by DDIM in {steps} steps", f"{len(paths)}, {seconds:.2f} s each"), strip, faces]
    rows = tuple(
        (stem, f"{error['mse']:.4f}", f"{error['largest']:.0f}", "PASS" if error["pass"] else "FAIL")
        for stem, error in errors.items()
    )
    head = ("noise", "mean squared error", "largest difference", "below 20")
    passed, mean = (sum(error[name] for error in errors.values()) for name in ("pass", "mse"))
    return [
        Score("faces within the grader's error", f"{passed} of {len(errors)}", "all"),
        Score("mean squared error against the course's faces", f"{mean / len(errors):.4f}", "below 20"),
        strip,
        faces,
        Table("Against the course's faces, on 0..255", head, rows),
    ]


def figure_elements(folder: Path) -> list[Element]:
    """Return two scores, the length of the noise half way by each interpolation, and the four figures."""
    norms = read_json(folder / "record.json")["metrics"]["interpolation"]
    row = "p2-noise-halfway"
    scores = [
        Score(
            f"length of the noise half way, {way}", f"{n[len(n) // 2]:.2f}", row=row, quoted=quoted(row, HALFWAY[way])
        )
        for way, n in norms.items()
    ]
    figures = (Figure(text, (folder / name,), half=name in PLOTS, plot=name in PLOTS) for name, text in FIGURES.items())
    return [*scores, *figures]
