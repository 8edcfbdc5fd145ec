"""Trains and grades the judge, which classifies object, colour, style, background and place in images and boxes.

  python miniature/judge.py train                    writes checkpoints/miniature/judge.safetensors (49 minutes on a third of a CPU core)
  python miniature/judge.py grade --count 2000       accuracy on new images, as rendered and with the flaws of generated images

It also classifies held-out objects and styles. The network and its answers: miniature/judge_model.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

import repository_root  # noqa: F401  # isort: split
import torch
import tyro
from torch import Tensor

from digits.classifier import round_weights
from miniature.judge_model import (
    KIND,
    NONE,
    SHIPPED,
    SceneClassifier,
    SceneNetwork,
    load_scene_classifier,
    save_scene_classifier,
)
from miniature.judge_training import IGNORED, loss_of, make_batch, truth_of, worsen
from miniature.scenery.render import RenderedBatch, as_tensor, dataset, world_fingerprint
from miniature.scenery.scenes import ANY_PAIR, KINDS
from miniature.training_flags import TrainingFlags
from runtime.cli import check_fractions, check_not_negative, check_positive, log, run_script
from runtime.device import Device, detect, to_channels_last
from runtime.files import check_writable_file
from runtime.images import to_float, to_uint8
from runtime.record import Record
from runtime.seeds import derived_seed
from training.draws import Draws
from training.ema import Ema
from training.loop import Trained, TrainingRun
from training.schedule import LearningRate

Rates = dict[str, float]


@tyro.conf.configure(tyro.conf.subcommand(name="train"))
@dataclass(frozen=True)
class TrainSceneClassifier(TrainingFlags):
    """Train on images rendered during the training. Ctrl-C or SIGTERM stops cleanly, and the same command continues."""

    output: Path = SHIPPED
    """Judge file to write."""
    run: Path = Path("runs/miniature/judge")
    steps: int = 2600
    batch: int = 64
    lr: float = 3e-3
    ema: float = 0.998
    weight_decay: float = 0.05
    erased: float = 0.25
    """Share of images, 0 to 1, in which one object is painted over."""
    save_every: int = 100
    grade: int = 1000
    """Number of new images on which the finished judge is graded."""


@tyro.conf.configure(tyro.conf.subcommand(name="grade"))
@dataclass(frozen=True)
class GradeSceneClassifier:
    """Measure the judge's accuracy on new rendered images, whose contents are known."""

    judge: Path = SHIPPED
    """Judge file to grade."""
    count: int = 2000
    """Number of images, with one to three objects each."""
    seed: int = 1
    device: Device = "auto"
    record: Path = Path("runs/miniature/judge/grade.json")
    """JSON file for settings and results."""


def train(settings: TrainSceneClassifier) -> None:
    """Train the judge on all questions at once, grade it, and write its file."""
    settings.check("grade")
    check_fractions(settings, "erased")
    check_writable_file(settings.output, "--output")
    machine = detect(settings.device)
    device, record = machine.device, Record(settings, machine)

    # the network, its average and its optimizer
    torch.manual_seed(settings.seed)
    network = SceneNetwork()
    if settings.init:
        network.load_state_dict(load_scene_classifier(path=settings.init).network.state_dict())
    to_channels_last(network, device)
    ema = Ema(network, settings.ema)
    averaged = cast(SceneNetwork, ema.module.eval())
    adamw = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True)

    # the run: continues from its checkpoint where there is one
    facts = settings.facts("", "weight_decay", "erased", world=world_fingerprint(ANY_PAIR))
    lr = LearningRate(settings.lr, settings.steps // 10, decay=0.8)
    run = TrainingRun(settings.loop(KIND, lr, max_grad_norm=5.0), facts, Trained(network, adamw, ema), record)

    for step in run:
        draws = Draws(settings.seed, step, slice(settings.batch), settings.batch, device)
        x, truth = make_batch(settings.seed, step, settings.batch, settings.erased, device)
        x = worsen(x, draws).contiguous(memory_format=torch.channels_last)
        run.update(loss_of(network, x, truth))

    if run.done:
        averaged.load_state_dict(round_weights(averaged))  # graded as the file will hold it
        rates = measure_rates(SceneClassifier(averaged), settings.grade, settings.seed + 1)
        origin = {name: getattr(settings, name) for name in ("steps", "batch", "lr", "seed")}
        save_scene_classifier(settings.output, averaged, origin | {"rates": rates})
        record.metrics |= {"rates": rates, "parameters": sum(p.numel() for p in network.parameters())}
        print(table(rates))
        log(f"judge: {settings.output}, record: {settings.run / 'record.json'}")
    run.finish()


# ---------------------------------------------------------------- grading


def grade(settings: GradeSceneClassifier) -> None:
    """Grade a judge file: print the shares of right answers, and write the record."""
    check_positive(settings, "count")
    check_not_negative(settings, "seed")
    machine = detect(settings.device)
    record = Record(settings, machine)
    judge = load_scene_classifier(machine.device, settings.judge)
    with record.timed("grading"):
        rates = measure_rates(judge, settings.count, settings.seed)
    record.metrics = {"rates": rates}
    print(table(rates))
    record.save(settings.record, name_it=True)


def measure_rates(judge: SceneClassifier, count: int, seed: int) -> dict[str, Rates]:
    """Return {"clean": {question: share of right answers}, "worsened": ..} on `count` new images.

    Clean images are as rendered. Worsened images have flaws of generated ones.
    """
    batch = dataset(count, seed, ANY_PAIR)
    clean = as_tensor(batch.images)
    return {
        name: _in_boxes(judge, images, batch, seed)
        | _of_wholes(judge, images, batch, seed)
        | _leaks(judge, images, batch)
        for name, images in {"clean": clean, "worsened": as_generated(clean, seed)}.items()
    }


def as_generated(images: Tensor, seed: int) -> Tensor:
    """Return the images [N,3,64,64] uint8 with flaws of generated images, as in training."""
    parts = []
    for index, chunk in enumerate(images.split(250)):
        draws = Draws(derived_seed(seed, 1), index, slice(len(chunk)), len(chunk), images.device)
        parts.append(to_uint8(worsen(to_float(chunk), draws)))
    return torch.cat(parts)


def _in_boxes(judge: SceneClassifier, images: Tensor, batch: RenderedBatch, seed: int) -> Rates:
    """Grade boxes: of objects, displaced a little, and empty ones."""
    truth = truth_of(batch.scenes, [None] * len(images), Random(derived_seed(seed, 2)))
    answers = {question: x.cpu() for question, x in judge.boxed(images[truth.rows], truth.boxes).items()}
    kinds = truth.boxed["kind"]
    right = answers["kind"].argmax(1) == kinds
    return {
        "object, in its box": _mean(right[kinds != NONE]),
        "held-out object, in its box": _mean(right[(kinds >= len(KINDS)) & (kinds != NONE)]),
        "colour, in its box": _share(answers["colour"], truth.boxed["colour"]),
        "empty box": _mean(right[kinds == NONE]),
    }


def _of_wholes(judge: SceneClassifier, images: Tensor, batch: RenderedBatch, seed: int) -> Rates:
    """Grade whole images: object, colour and place where there is one object, the other questions everywhere."""
    truth = truth_of(batch.scenes, [None] * len(images), Random(seed)).whole
    answers = {question: x.cpu() for question, x in judge.whole(images).items()}
    single = {"kind": "object, single", "colour": "colour, single", "place": "place, single"}
    rates = {single.get(question, question): _share(answers[question], labels) for question, labels in truth.items()}
    expected = [{(thing.kind, thing.colour) for thing in scene.things} for scene in batch.scenes]
    exact = torch.tensor([a == b for a, b in zip(judge.objects(images), expected, strict=True)])
    several = torch.tensor([len(pairs) > 1 for pairs in expected])
    return rates | {
        "just its objects, single": _mean(exact[~several]),
        "just its objects, several": _mean(exact[several]),
    }


def _leaks(judge: SceneClassifier, images: Tensor, batch: RenderedBatch) -> Rates:
    """Grade images with several objects: with the first object's box ignored, the first must not be found, and the second must be."""
    rows = [row for row, scene in enumerate(batch.scenes) if len(scene.things) > 1]
    things = [batch.scenes[row].things for row in rows]
    boxes = torch.tensor([thing[0].box for thing in things], dtype=torch.float32).view(-1, 4)
    first, second = (
        judge.leaked(images[rows], boxes, [t[i].kind for t in things], [t[i].colour for t in things]) for i in (0, 1)
    )
    return {"no leak, rightly": _mean(~first), "a leak, rightly": _mean(second)}


def _share(answers: Tensor, labels: Tensor) -> float:
    rows = labels != IGNORED
    return _mean(answers[rows].argmax(1) == labels[rows])


def _mean(right: Tensor) -> float:
    return round(float(right.float().mean()), 4)


def table(rates: dict[str, Rates]) -> str:
    """Return a line per question, with a column for clean and one for worsened images."""
    lines = [f"{'share of right answers':<32}" + "".join(f"{name:>10}" for name in rates)]
    for question in next(iter(rates.values())):
        lines.append(f"{question:<32}" + "".join(f"{column[question]:>10.4f}" for column in rates.values()))
    return "\n".join(lines)


def main(command: TrainSceneClassifier | GradeSceneClassifier) -> None:
    """Run the chosen subcommand."""
    train(command) if isinstance(command, TrainSceneClassifier) else grade(command)


if __name__ == "__main__":
    command: Any = TrainSceneClassifier | GradeSceneClassifier  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
