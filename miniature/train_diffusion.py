"""The miniature's Stable Diffusion: a small U-Net on the latents of train_autoencoder.py, told by the text tower of the small CLIP.

  python miniature/train_diffusion.py train                     checkpoints/miniature/stable_diffusion/unet; the same command resumes
  python miniature/train_diffusion.py assemble --output DIR     the whole StableDiffusionPipeline folder, from the parts that ship
  python miniature/train_diffusion.py grade                     draws pictures of prompts and has the judge say what they hold

Needs the small CLIP as a transformers folder (--clip) and, for grading, the judge. Several GPUs: accelerate launch, or torchrun.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import repository_root  # noqa: F401  # isort: split

from concepts.single_file import make_scheduler
from miniature.diffusion_grading import Grade, cases_of, pictures_of, rates_of, shown, table
from miniature.diffusion_parts import (
    CLIP,
    COMPLETE,
    PARTS,
    assemble,
    load_pipeline,
    prompt_sheet,
    save_part,
    with_solver,
)
from miniature.diffusion_training import DiffusionTrainer, Train
from miniature.judge_model import load_scene_classifier
from miniature.trainer import check_numbers
from runtime.cli import BadInput, log, run_script
from runtime.device import detect, set_up
from runtime.images import save_image
from runtime.record import Record


@dataclass(frozen=True)
class Assemble:
    """Writes the whole pipeline folder, as StableDiffusionPipeline.from_pretrained takes it."""

    clip: Path = CLIP
    """The small CLIP as a transformers folder."""
    parts: Path = PARTS
    """The folder that holds vae/ and unet/."""
    output: Path = COMPLETE


def main(command: Train | Assemble | Grade) -> None:
    """The subcommand that was asked for."""
    if isinstance(command, Train):
        run_training(command)
    elif isinstance(command, Assemble):
        assemble(command.parts, command.clip, command.output)
        print(f"pipeline: {command.output}")
    else:
        run_grading(command)


def run_training(settings: Train) -> None:
    """Trains, saves the U-Net, assembles the pipeline, records; after a signal only the checkpoint is left."""
    trainer = DiffusionTrainer(settings)
    trainer.train()
    trainer.leave_if_stopped()
    if not trainer.main:
        return
    save_part(trainer.averaged, settings.parts / "unet")
    make_scheduler().save_pretrained(settings.parts / "scheduler")
    assemble(settings.parts, settings.clip, settings.output)
    trainer.save_record()
    loss, speed = (trainer.record.metrics.get(name, float("nan")) for name in ("loss", "images_per_s"))
    print(f"{trainer.step:,} steps, loss {loss:.4f}, {speed:.0f} pictures/s")
    log(f"U-Net: {settings.parts / 'unet'}, pipeline: {settings.output}, record: {settings.run / 'record.json'}")


def run_grading(settings: Grade) -> None:
    """Prints the table and writes record.json and a sheet."""
    check_numbers(settings, "count", "steps", "batch")
    if min(settings.held_out, settings.scenes, settings.couples) < 0:
        raise BadInput("--held-out, --scenes and --couples: give zero or more")
    machine = detect(settings.device)
    set_up("fp32", machine)
    judge = load_scene_classifier(machine.device, settings.judge)
    pipe = with_solver(load_pipeline(settings.parts, settings.clip)).to(machine.device)
    cases, record = cases_of(settings), Record(settings, machine)
    with record.timed("drawing"):
        images = pictures_of(pipe, cases, settings)
    rates = rates_of(judge, images, cases)
    seconds = record.timings["drawing"] / len(cases)
    record.metrics = {"rates": rates, "seconds_per_picture": round(seconds, 4)}
    rows = shown(cases)
    save_image(settings.output / "sheet.png", prompt_sheet(images[rows], [cases[row].prompt for row in rows]))
    record.save(settings.output / "record.json")
    print(f"{table(rates)}\n{'seconds per picture':<40}{seconds:>8.3f}")
    log(f"sheet and record: {settings.output}")


if __name__ == "__main__":
    command: Any = Train | Assemble | Grade  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
