"""P2 on the page: faces from given noises, what eta does, and two ways from one noise to another."""

from __future__ import annotations

from pathlib import Path

from pages.content import Figure, Gallery, Part, Score, Shown, Table, facts_table
from pages.sources import FACES, Sources
from runtime.files import read_json
from runtime.steps import Step

PROBLEM = "P2"
SHOWN_SETTINGS = ("model", "noise", "seeds", "steps", "rule", "eta", "to_uint8", "seed", "precision")
HINT = "The course's faces: UNET=face/UNet.pt DATA=hw2_data with face/noise and face/GT in it (or all three there)."


def parts(sources: Sources) -> list[Part]:
    """The faces of the noises, then the figures."""
    return [faces_part(sources), figures_part(sources)]


def flags(sources: Sources) -> list[str]:
    """Model and noises: the course's, or the shipped faces with noises of the seeds 0 to 9."""
    unet = sources.course_unet
    given = ["--model", f"{unet or FACES}", "--device", sources.device]
    given += ["--noise", f"{sources.noise}"] if unet and sources.noise else ["--seeds", "0-9"]
    return given if unet else [*given, "--to-uint8", "clamp"]


def source_of(sources: Sources) -> tuple[str, bool]:
    """What the page says about model and noises."""
    unet = sources.course_unet
    if not unet:
        return f"shipped weights {sources.label(FACES)} (64x64, grey), noises of seeds 0 to 9", False
    noises = f"noises of {sources.label(sources.noise)}" if sources.noise else "noises of seeds 0 to 9"
    return f"{sources.label(unet)}, {noises}", True


def reads(sources: Sources) -> tuple[Path, ...]:
    """What has the steps run again."""
    return tuple(path for path in (sources.course_unet or FACES, sources.noise, sources.truth) if path)


def faces_part(sources: Sources) -> Part:
    """One picture per noise at eta 0 and, where there is a truth, the error against it."""
    place = sources.place("p2_faces")
    command = [
        "P2_ddim.py",
        *flags(sources),
        "--output",
        f"{place / 'pictures'}",
        "--record",
        f"{place / 'record.json'}",
    ]
    if sources.course_unet and sources.noise and sources.truth:
        command += ["--reference", f"{sources.truth}"]
    source, real = source_of(sources)
    return Part(
        name="p2-faces",
        problem=PROBLEM,
        title="Noise in, face out",
        text="A diffusion model for faces is sampled by DDIM: 50 of its 1,000 steps, and with eta 0 no further randomness, so the noise "
        "alone decides who appears. The homework hands out ten noises, the network and the faces that must come out.",
        source=source,
        real=real,
        steps=(Step("p2_faces", "P2: a face from each noise", (tuple(command),), reads(sources)),),
        show=lambda folder: show_faces(folder / "p2_faces"),
        hint="" if real else HINT,
    )


def show_faces(folder: Path) -> Shown:
    """The pictures, and their table where there is a truth."""
    record = read_json(folder / "record.json")
    table, settings = record["metrics"]["reference"], record["settings"]
    paths = tuple(sorted((folder / "pictures").glob("*.png")))
    shown = Shown(
        figures=[Gallery(paths, f"{len(paths)} noises, {len(paths)} faces, eta 0, {settings['steps']} steps.")]
    )
    if table:
        rows = tuple(
            (stem, f"{row['mse']:.4f}", f"{row['largest']:.0f}", "PASS" if row["pass"] else "FAIL")
            for stem, row in table.items()
        )
        head = ("noise", "mean squared error", "largest difference", "below 20")
        shown.tables.append(Table("Against the course's faces, on 0..255", head, rows))
        passed, mean = (
            sum(row["pass"] for row in table.values()),
            sum(row["mse"] for row in table.values()) / len(table),
        )
        shown.scores = [
            Score("faces within the grader's error", f"{passed} of {len(table)}", "all"),
            Score("mean squared error against the course's faces", f"{mean:.4f}", "below 20"),
        ]
    else:
        seconds = record["timings_s"]["drawing"] / len(paths)
        shown.scores = [
            Score(f"faces drawn by DDIM in {settings['steps']} steps", f"{len(paths)}, {seconds:.2f} s each")
        ]
    shown.tables.append(facts_table("Settings", {name: settings[name] for name in SHOWN_SETTINGS}))
    return shown


def figures_part(sources: Sources) -> Part:
    """The eta grid and the interpolations."""
    place = sources.place("p2_figures")
    command = ("P2_report.py", *flags(sources), "--output", f"{place}")
    source, real = source_of(sources)
    return Part(
        name="p2-figures",
        problem=PROBLEM,
        title="Eta, slerp and linear interpolation",
        text="With eta above 0 every step adds fresh noise, and the same start leads elsewhere. Between two noises the way matters: slerp "
        "turns one into the other and keeps its length; linear interpolation cuts the corner, and half way the noise is too short for "
        "anything that the model has seen.",
        source=source,
        real=real,
        steps=(Step("p2_figures", "P2: figures of eta and interpolation", (command,), reads(sources)),),
        show=lambda folder: show_figures(folder / "p2_figures"),
        hint="" if real else HINT,
    )


def show_figures(folder: Path) -> Shown:
    """Five figures, and the two numbers behind them."""
    metrics = read_json(folder / "record.json")["metrics"]
    middle = {way: norms[len(norms) // 2] for way, norms in metrics["interpolation"].items()}
    captions = {
        "eta.png": "Rows: eta. Columns: the first four noises.",
        "eta_mse.png": "How far eta moves each picture from that of eta 0, mean squared error on 0..255.",
        "slerp.png": "Slerp between the first two noises, in steps of a tenth.",
        "linear.png": "Linear interpolation between the same noises.",
        "noise_norm.png": "Length of the noise on both ways; the model has only ever seen 1.",
    }
    scores = [Score(f"length of the noise half way, {way}", f"{value:.2f}", "1") for way, value in middle.items()]
    return Shown(scores, [Figure(folder / name, text) for name, text in captions.items()])
