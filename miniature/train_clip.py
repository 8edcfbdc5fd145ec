"""The CLIP of the miniature: a small image-text model, trained with open_clip's model and loss on pictures and captions of the world.

  python miniature/train_clip.py train                      checkpoints/miniature/clip, in open_clip's form
  python miniature/train_clip.py grade --count 2000         what it knows of fresh pictures, held-out (colour, object) pairs first
  python miniature/train_clip.py convert --output DIR       the same model as a transformers CLIPModel with its processor
  python P3_clip_zeroshot.py --model local-dir:checkpoints/miniature/clip --images DIR/val --prompts single

Its form in code: miniature/clip_model.py; its words: miniature/vocabulary.py; what it learns from: miniature/clip_batches.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import repository_root  # noqa: F401  # isort: split

from miniature.clip_grading import graded, table
from miniature.clip_model import SHIPPED, convert, load_clip, rounded, save_clip
from miniature.clip_training import Train, Training
from runtime.cli import BadInput, check_not_negative, log, run_script
from runtime.device import Device, detect
from runtime.record import Record
from training.signals import leave_stopped


@dataclass(frozen=True)
class Grade:
    """Asks the model about fresh pictures, of which everything is known."""

    model: Path = SHIPPED
    """Its folder."""
    count: int = 2000
    """Pictures per question."""
    seed: int = 1
    device: Device = "auto"
    record: Path = Path("runs/miniature/clip/grade.json")
    """Where the record goes."""


@dataclass(frozen=True)
class Convert:
    """Writes the model as transformers' CLIPModel and CLIPProcessor, in fp32."""

    output: Path
    """Folder."""
    model: Path = SHIPPED
    """Folder in open_clip's form."""


def main(settings: Train | Grade | Convert) -> None:
    """The subcommand that was asked for."""
    if isinstance(settings, Train):
        run_training(settings)
    elif isinstance(settings, Grade):
        run_grading(settings)
    else:
        convert(settings.model, settings.output)
        print(f"CLIPModel and CLIPProcessor in {settings.output}")


def run_training(settings: Train) -> None:
    """Trains, grades, and writes the model and record.json; after a signal only the checkpoint is left."""
    training = Training(settings)
    record = Record(settings, training.machine)
    clip = training.train()
    if training.step < settings.steps:
        leave_stopped(training.step, training.checkpoint)
    clip.model.load_state_dict(rounded(clip.model))  # graded as the file will hold it
    with record.timed("grading"):
        rates = graded(clip, settings.grade, settings.seed + 1)
    origin = {name: asdict(settings)[name] for name in ("steps", "batch", "lr", "weight_decay", "ema", "seed")}
    save_clip(settings.output, clip.model, clip.config, {**origin, "rates": rates})
    record.timings["training"] = training.seconds
    record.metrics = {"rates": rates, "parameters": sum(p.numel() for p in clip.model.parameters())}
    record.save(settings.run / "record.json")
    print(table(rates))
    log(f"model: {settings.output}, record: {settings.run / 'record.json'}")


def run_grading(settings: Grade) -> None:
    """Prints how often the model is right, and writes the record."""
    if settings.count < 1:
        raise BadInput(f"--count {settings.count}: no pictures asked for")
    check_not_negative(settings, "seed")
    machine = detect(settings.device)
    record = Record(settings, machine)
    clip = load_clip(settings.model)
    clip.model.to(machine.device)
    with record.timed("grading"):
        record.metrics = {"rates": graded(clip, settings.count, settings.seed)}
    record.save(settings.record)
    print(table(record.metrics["rates"]))
    log(f"record: {settings.record}")


if __name__ == "__main__":
    command: Any = Train | Grade | Convert  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
