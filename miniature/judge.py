"""The judge of the miniature: tells object, colour, style, background and place in pictures and boxes, held-out ones included.

  python miniature/judge.py train                    writes checkpoints/miniature/judge.safetensors (49 minutes on a third of a CPU core)
  python miniature/judge.py grade --count 2000       how often it is right on fresh pictures, clean and worsened as generated ones are

Its answers in code: miniature/judge_model.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import repository_root  # noqa: F401  # isort: split
import torch
from torch import Tensor

from miniature.judge_model import (
    NONE,
    SHIPPED,
    SceneClassifier,
    load_scene_classifier,
    rounded,
    save_scene_classifier,
    to_float,
)
from miniature.judge_training import ANY, Train, Training, worsen
from miniature.judge_truth import IGNORED, truth_of
from miniature.scenery.render import Batch, as_tensor, dataset
from miniature.scenery.scenes import KINDS
from runtime.cli import BadInput, check_not_negative, log, run_script
from runtime.device import Device, detect
from runtime.record import Record
from runtime.seeds import derived_seed
from training.draws import Draws
from training.signals import leave_stopped

Rates = dict[str, float]


@dataclass(frozen=True)
class Grade:
    """Asks the judge about fresh pictures, of which everything is known."""

    judge: Path = SHIPPED
    """The judge file."""
    count: int = 2000
    """Pictures, with one to three objects each."""
    seed: int = 1
    device: Device = "auto"
    record: Path = Path("runs/miniature/judge/grade.json")
    """Where the record goes."""


def main(settings: Train | Grade) -> None:
    """The subcommand that was asked for."""
    if isinstance(settings, Train):
        run_training(settings)
    else:
        run_grading(settings)


def run_training(settings: Train) -> None:
    """Trains, grades, and writes the judge file and record.json; after a signal only the checkpoint is left."""
    training = Training(settings)
    record = Record(settings, training.machine)
    network = training.train()
    if training.step < settings.steps:
        leave_stopped(training.step, training.checkpoint)
    network.load_state_dict(rounded(network))  # graded as the file will hold it
    rates = graded(SceneClassifier(network), settings.grade, settings.seed + 1)
    origin = {
        "steps": settings.steps,
        "batch": settings.batch,
        "lr": settings.lr,
        "seed": settings.seed,
        "rates": rates,
    }
    save_scene_classifier(settings.output, network, origin)
    record.timings["training"] = training.seconds
    record.metrics = {"rates": rates, "parameters": sum(p.numel() for p in network.parameters())}
    record.save(settings.run / "record.json")
    print(table(rates))
    log(f"judge: {settings.output}, record: {settings.run / 'record.json'}")


def run_grading(settings: Grade) -> None:
    """Prints how often the judge is right, and writes the record."""
    if settings.count < 1:
        raise BadInput(f"--count {settings.count}: no pictures asked for")
    check_not_negative(settings, "seed")
    machine = detect(settings.device)
    record = Record(settings, machine)
    judge = load_scene_classifier(machine.device, settings.judge)
    with record.timed("grading"):
        rates = graded(judge, settings.count, settings.seed)
    record.metrics = {"rates": rates}
    record.save(settings.record)
    print(table(rates))
    log(f"record: {settings.record}")


# ---------------------------------------------------------------- grading


def graded(judge: SceneClassifier, count: int, seed: int) -> dict[str, Rates]:
    """Shares of right answers on `count` fresh pictures: {"clean": .., "worsened": ..} -> {question: share}."""
    made = dataset(count, seed, ANY)
    images = as_tensor(made.images)
    return {
        "clean": rates_of(judge, images, made, seed),
        "worsened": rates_of(judge, as_generated(images, seed), made, seed),
    }


def as_generated(images: Tensor, seed: int) -> Tensor:
    """The pictures with the imperfections that training shows, [N,3,64,64] uint8."""
    parts = []
    for index, chunk in enumerate(images.split(250)):
        draws = Draws(derived_seed(seed, 1), index, slice(len(chunk)), len(chunk), images.device)
        parts.append(((worsen(to_float(chunk), draws) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)


def rates_of(judge: SceneClassifier, images: Tensor, made: Batch, seed: int) -> Rates:
    """{question: share of right answers}."""
    return _in_boxes(judge, images, made, seed) | _of_wholes(judge, images, made, seed) | _leaks(judge, images, made)


def _in_boxes(judge: SceneClassifier, images: Tensor, made: Batch, seed: int) -> Rates:
    """Boxes a little off, as a user would give them, and some without an object."""
    truth = truth_of(made.scenes, [None] * len(images), Random(derived_seed(seed, 2)))
    seen = {question: x.cpu() for question, x in judge.boxed(images[truth.rows], truth.boxes).items()}
    kinds = truth.boxed["kind"]
    right = seen["kind"].argmax(1) == kinds
    return {
        "object, in its box": _mean(right[kinds != NONE]),
        "held-out object, in its box": _mean(right[(kinds >= len(KINDS)) & (kinds != NONE)]),
        "colour, in its box": _share(seen["colour"], truth.boxed["colour"]),
        "empty box": _mean(right[kinds == NONE]),
    }


def _of_wholes(judge: SceneClassifier, images: Tensor, made: Batch, seed: int) -> Rates:
    """Whole pictures: object, colour and place where there is one object, the rest of all."""
    truth = truth_of(made.scenes, [None] * len(images), Random(seed)).whole
    seen = {question: x.cpu() for question, x in judge.whole(images).items()}
    single = {"kind": "object, single", "colour": "colour, single", "place": "place, single"}
    rates = {single.get(question, question): _share(seen[question], labels) for question, labels in truth.items()}
    wanted = [{(thing.kind, thing.colour) for thing in scene.things} for scene in made.scenes]
    exact = torch.tensor([found == want for found, want in zip(judge.found(images), wanted, strict=True)])
    several = torch.tensor([len(want) > 1 for want in wanted])
    return rates | {
        "just its objects, single": _mean(exact[~several]),
        "just its objects, several": _mean(exact[several]),
    }


def _leaks(judge: SceneClassifier, images: Tensor, made: Batch) -> Rates:
    """Pictures of several objects: nothing of the first is outside its box, but the second is."""
    rows = [row for row, scene in enumerate(made.scenes) if len(scene.things) > 1]
    things = [made.scenes[row].things for row in rows]
    boxes = torch.tensor([thing[0].box for thing in things], dtype=torch.float32).view(-1, 4)
    first, second = (
        judge.leaked(images[rows], boxes, [t[i].kind for t in things], [t[i].colour for t in things]) for i in (0, 1)
    )
    return {"no leak where there is none": _mean(~first), "a leak where there is one": _mean(second)}


def _share(seen: Tensor, labels: Tensor) -> float:
    """Of the labels that are no IGNORED."""
    asked = labels != IGNORED
    return _mean(seen[asked].argmax(1) == labels[asked])


def _mean(right: Tensor) -> float:
    return round(float(right.float().mean()), 4)


def table(rates: dict[str, Rates]) -> str:
    """A line per question, a column per kind of picture."""
    lines = [f"{'share of right answers':<32}" + "".join(f"{name:>10}" for name in rates)]
    for question in next(iter(rates.values())):
        lines.append(f"{question:<32}" + "".join(f"{column[question]:>10.4f}" for column in rates.values()))
    return "\n".join(lines)


if __name__ == "__main__":
    command: Any = Train | Grade  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
