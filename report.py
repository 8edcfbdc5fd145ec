"""Everything at once: runs all three problems and writes one web page of what came out, report/index.html.

  python report.py                                           with the data in hw2_data, as far as there are any, else with shipped weights
  python report.py --data hw2_data --model sd-v1-4.ckpt --unet face/UNet.pt
  python report.py --quick --output demo                     shipped weights only, fewer pictures and steps: make demo
  python report.py --problems P2                             one problem

What a step needs and doesn't find is told on the page. A step is kept as long as its command, its input and the code are the same, so
the same command goes on where it was stopped.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pages import p1, p2, words, zeroshot
from pages.content import Part
from pages.page import View, view_of, write_page
from pages.sources import DIGITS, Sources
from runtime.cli import BadInput, log, run_script
from runtime.device import Device, detect
from runtime.files import ROOT, output_folder
from runtime.steps import Runner, short

Problem = Literal["P1", "P2", "P3"]


@dataclass(frozen=True)
class Settings:
    """Flags."""

    output: Path = ROOT / "report"
    """Folder for index.html and, below steps/, all that it is made from."""
    data: Path = ROOT / "hw2_data"
    """The course's data, or as much of them as there is."""
    model: str | None = None
    """Stable Diffusion v1: a diffusers folder, a hub name, or a single file; None: the miniature."""
    unet: Path | None = None
    """The course's UNet.pt; None: face/UNet.pt in the data, else the shipped faces."""
    digits: Path = DIGITS
    """A P1 checkpoint."""
    judge: Path | None = None
    """The course's Classifier.pth; None: Classifier.pth in the data, else the shipped judge."""
    clip: str = "openai/clip-vit-base-patch32"
    """The CLIP that grades pictures of --model: a transformers folder or a hub name."""
    problems: tuple[Problem, ...] = ("P1", "P2", "P3")
    quick: bool = False
    """Shipped weights only, fewer pictures and steps."""
    fresh: bool = False
    """Run every step again."""
    device: Device = "auto"


def sources_of(settings: Settings) -> Sources:
    """All paths absolute, since the steps run in the repository; raises BadInput for a file that is named and not there."""
    for flag, path in (("--unet", settings.unet), ("--judge", settings.judge), ("--digits", settings.digits)):
        if path and not path.is_file():
            raise BadInput(f"{flag} {path} does not exist")
    if settings.data != Settings.data and not settings.data.is_dir():
        raise BadInput(f"--data {settings.data} is not a folder")
    if settings.quick and (settings.model or settings.unet or settings.judge):
        raise BadInput("--quick takes the shipped weights: leave --model, --unet and --judge out, or --quick")
    detect(settings.device)
    model = settings.model and (
        str(Path(settings.model).resolve()) if Path(settings.model).exists() else settings.model
    )
    return Sources(
        steps=settings.output.resolve() / "steps",
        data=settings.data.resolve(),
        model=model or None,
        unet=settings.unet and settings.unet.resolve(),
        digits=settings.digits.resolve(),
        judge=settings.judge and settings.judge.resolve(),
        clip=str(Path(settings.clip).resolve()) if Path(settings.clip).exists() else settings.clip,
        device=settings.device,
        quick=settings.quick,
    )


def parts_of(settings: Settings, sources: Sources) -> list[Part]:
    """All parts of the problems that were asked for, in the order of the page."""
    found: list[Part] = []
    if "P1" in settings.problems:
        found += p1.parts(sources)
    if "P2" in settings.problems:
        found += p2.parts(sources)
    if "P3" in settings.problems:
        found += [zeroshot.part(sources), *words.parts(sources)]
    return found


def run_parts(parts: Sequence[Part], sources: Sources, fresh: bool) -> list[View]:
    """Every step in turn; where one fails and there is another part for that case, that part as well."""
    runner = Runner(sources.steps, sum(len(part.steps) for part in parts), fresh)
    views, waiting = [], list(parts)
    while waiting:
        part = waiting.pop(0)
        outcomes = [runner.run(step) for step in part.steps]
        views.append(view_of(part, sources.steps, runner.outcomes))
        if part.instead and not all(outcome.there for outcome in outcomes):
            runner.total += len(part.instead.steps)
            waiting.insert(0, part.instead)
    return views


def print_scores(views: Sequence[View], page: str, seconds: float) -> None:
    """The table at the top of the page, and where that is."""
    for view in views:
        for score in view.shown.scores:
            wanted = f"  (wanted: {score.wanted})" if score.wanted else ""
            print(f"{view.part.problem}  {score.what:<58} {score.value}{wanted}")
        if view.reason:
            print(f"{view.part.problem}  {view.part.title}: not there. {view.reason.splitlines()[0]}")
    print(f"{seconds / 60:.1f} minutes. The page: {page}")


def main(settings: Settings) -> None:
    """Runs the steps, writes the page, prints the scores; exit code 1 where something is not there."""
    start = time.perf_counter()
    sources = sources_of(settings)
    parts = parts_of(settings, sources)
    output_folder(settings.output)
    views = run_parts(parts, sources, settings.fresh)
    page = settings.output.resolve() / "index.html"
    write_page(page, views, shlex.join(["python", "report.py", *sys.argv[1:]]))
    log("")
    print_scores(views, short(page), time.perf_counter() - start)
    if any(view.reason for view in views):
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
