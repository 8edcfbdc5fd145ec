"""Run all three problems and write one web page of the results, report/index.html.

  python report.py                                           with the data in hw2_data if present, else with shipped weights
  python report.py --model sd-v1-4.ckpt                    the same, with Stable Diffusion
  python report.py --quick --output demo                     shipped weights only, fewer images and steps: make demo
  python report.py --problems P2                             one problem

The page is written after every part, and says what is still to come. It names the missing inputs of a step. A step is kept while its
command, its inputs and the code are the same, so the same command continues where it was stopped.
"""

from __future__ import annotations

import runtime.interrupts  # noqa: F401

# isort: split
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pages import inversion, p1, p2, zeroshot
from pages.duration import minutes_text
from pages.elements import Score, Section
from pages.inputs import DIGITS, Inputs
from pages.page import RenderedSection, pending_section, render_section, write_page
from runtime.cli import BadInput, log, run_script
from runtime.device import Device, detect
from runtime.files import ROOT, output_folder
from runtime.steps import Runner, relative


@dataclass(frozen=True)
class Settings:
    """Settings of the report."""

    output: Path = ROOT / "report"
    """Folder for index.html and, below steps/, everything that it is made from."""
    data: Path = ROOT / "hw2_data"
    """Folder of the course's data, complete or in part."""
    model: str | None = None
    """Stable Diffusion v1: a diffusers folder, a hub name, or a single file. None = the shipped miniature."""
    unet: Path | None = None
    """The course's UNet.pt. None = face/UNet.pt in the data, else the shipped faces."""
    digits: Path = DIGITS
    """P1 checkpoint."""
    mnistm_classifier: Path | None = None
    """The course's Classifier.pth. None = Classifier.pth in the data, else the shipped classifier."""
    clip: str = "openai/clip-vit-base-patch32"
    """CLIP that grades the images of --model: a transformers folder or a hub name."""
    problems: tuple[Literal["P1", "P2", "P3"], ...] = ("P1", "P2", "P3")
    quick: bool = False
    """Use shipped weights only, with fewer images and steps."""
    fresh: bool = False
    """Run every step again."""
    device: Device = "auto"


def find_inputs(settings: Settings) -> Inputs:
    """Return the input files: those that flags name, else those in the data. Raise BadInput for a named file that does not exist."""
    files = {"unet": settings.unet, "mnistm-classifier": settings.mnistm_classifier, "digits": settings.digits}
    for flag, path in files.items():
        if path and not path.is_file():
            raise BadInput(f"--{flag} {path} does not exist")
    if settings.data != Settings.data and not settings.data.is_dir():
        raise BadInput(f"--data {settings.data} is not a folder")
    if settings.quick and (settings.model or settings.unet or settings.mnistm_classifier):
        raise BadInput(
            "--quick takes the shipped weights: leave --model, --unet and --mnistm-classifier out, or --quick"
        )
    detect(settings.device)

    def in_data(name: str, flag: Path | None = None) -> Path | None:
        path = (flag or settings.data / name).resolve()
        return path if flag or (path.exists() and not settings.quick) else None

    def local(name: str) -> str:
        return str(Path(name).resolve()) if Path(name).exists() else name

    return Inputs(
        steps=settings.output.resolve() / "steps",
        digits=settings.digits.resolve(),
        mnistm_classifier=in_data("Classifier.pth", settings.mnistm_classifier),
        unet=in_data("face/UNet.pt", settings.unet),
        noise=in_data("face/noise"),
        reference=in_data("face/GT"),
        photographs=in_data("clip_zeroshot/val"),
        textual_inversion=settings.data.resolve() / "textual_inversion",
        model=local(settings.model) if settings.model else None,
        clip=local(settings.clip),
        device=settings.device,
        quick=settings.quick,
    )


def sections_of(settings: Settings, inputs: Inputs) -> list[Section]:
    """Return the sections of the requested problems in the order of the page."""
    pages = {"P1": (p1,), "P2": (p2,), "P3": (zeroshot, inversion)}
    return [
        section
        for name in pages
        if name in settings.problems
        for page in pages[name]
        for section in page.sections(inputs)
    ]


def run_sections(
    sections: Sequence[Section], runner: Runner, write: Callable[[Sequence[RenderedSection]], None]
) -> list[RenderedSection]:
    """Run the steps of every section in order. If a step fails, run the section's fallback next.

    After each section, call `write` with all sections; those that have yet to run are pending.
    Return the rendered sections, fallbacks included.
    """
    rendered, waiting = [], list(sections)
    while waiting:
        section = waiting.pop(0)
        outcomes = [runner.run(step) for step in section.steps]
        rendered.append(render_section(section, runner.folder, runner.outcomes))
        if section.fallback and any(outcome.reason for outcome in outcomes):
            runner.total += len(section.fallback.steps)
            waiting.insert(0, section.fallback)
        write([*rendered, *map(pending_section, waiting)])
    return rendered


def print_scores(rendered: Sequence[RenderedSection]) -> None:
    """Print the scores that the top of the page shows, and why a section has none."""
    for one in rendered:
        for score in one.elements:
            if isinstance(score, Score):
                print(f"{one.section.problem}  {score.what:<58} {score.value}")
        if one.reason:
            print(f"{one.section.problem}  {one.section.title}: not there. {one.reason.splitlines()[0]}")


def main(settings: Settings) -> None:
    """Run the steps, write the page, print the scores. Exit code 1 if a section has no results."""
    start = time.perf_counter()
    inputs = find_inputs(settings)
    sections = sections_of(settings, inputs)
    output_folder(settings.output)

    # how long it will take
    steps = [step for section in sections for step in section.steps]
    runner = Runner(inputs.steps, len(steps), settings.fresh)
    waiting = [step for step in steps if not runner.is_kept(step)]
    shipped = [step for section in sections if section.shipped for step in section.steps if step in waiting]
    minutes = minutes_text(shipped, len(waiting) - len(shipped), settings.quick) if waiting else "all are kept"
    log(f"{len(waiting)} of {len(steps)} steps to run: {minutes}")

    # the page, after every part
    page, command = settings.output.resolve() / "index.html", shlex.join(["python", "report.py", *sys.argv[1:]])

    def write(rendered: Sequence[RenderedSection]) -> None:
        write_page(page, rendered, command, minutes)
        log(f"   page so far: {relative(page)}")

    if not page.is_file():
        write([pending_section(section) for section in sections])
    rendered = run_sections(sections, runner, write)

    log("")
    print_scores(rendered)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes. The page: {relative(page)}")
    if any(one.reason for one in rendered):
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
