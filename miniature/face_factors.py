"""Trains and grades the classifier of the face world's factors, and grades the test of valid faces that uses it.

  python miniature/face_factors.py train                   checkpoints/miniature/face_factors.safetensors; the same command resumes
  python miniature/face_factors.py grade --count 2000      factors read right, good faces that pass, spoilt ones that are refused

The network and the test: miniature/face_classifier.py. The ways to spoil a face: miniature/face_spoilings.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import repository_root  # noqa: F401  # isort: split
import torch
import tyro
from torch import Tensor

from digits.classifier import round_weights
from miniature.face_classifier import (
    KIND,
    SHIPPED,
    FaceClassifier,
    FaceReader,
    factor_loss,
    load_face_classifier,
    save_face_classifier,
    worsen_slightly,
)
from miniature.face_spoilings import SPOILINGS
from miniature.face_world import FACTORS, FaceRenderer, face_seeds, sample_factors, world_fingerprint
from miniature.training_flags import TrainingFlags
from runtime.cli import check_not_negative, check_positive, log, run_script
from runtime.device import Device, detect, memory_format, to_training_device
from runtime.files import check_writable_file
from runtime.images import to_float, to_uint8
from runtime.record import Record
from runtime.seeds import derived_seed
from training.draws import Draws
from training.ema import Ema
from training.loop import Trained, TrainingRun
from training.schedule import LearningRate


@tyro.conf.configure(tyro.conf.subcommand(name="train"))
@dataclass(frozen=True)
class TrainFaceClassifier(TrainingFlags):
    """Train on faces rendered during the training, none twice. Ctrl-C or SIGTERM stops cleanly, and the same command continues."""

    output: Path = SHIPPED
    """Classifier file to write."""
    run: Path = Path("runs/miniature/face_factors")
    steps: int = 4000
    batch: int = 64
    lr: float = 3e-3
    ema: float = 0.998
    weight_decay: float = 0.05
    grade: int = 2000
    """Number of new faces on which the finished classifier is graded."""


@tyro.conf.configure(tyro.conf.subcommand(name="grade"))
@dataclass(frozen=True)
class GradeFaceClassifier:
    """Measure the shares of factors read right, of good faces that pass as valid, and of spoilt faces that are refused."""

    classifier: Path = SHIPPED
    """Classifier file to grade."""
    count: int = 2000
    """Number of faces. Each is graded as drawn, slightly worsened, and spoilt in every way."""
    seed: int = 1
    """Seed of the faces; those of training have another."""
    device: Device = "auto"
    record: Path = Path("runs/miniature/face_factors/grade.json")
    """JSON file for settings and results."""


def train(settings: TrainFaceClassifier) -> None:
    """Train the classifier on all factors at once, grade it, and write its file."""
    settings.check("grade")
    check_writable_file(settings.output, "--output")
    machine = detect(settings.device)
    device, record = machine.device, Record(settings, machine)
    renderer = FaceRenderer(device)

    # the network, its average and its optimizer
    torch.manual_seed(settings.seed)
    network = FaceClassifier()
    if settings.init:
        network.load_state_dict(load_face_classifier(settings.init).state_dict())
    to_training_device(network, device)
    ema = Ema(network, settings.ema)
    averaged = cast(FaceClassifier, ema.module.eval())
    adamw = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True)

    # the run: continues from its checkpoint where there is one
    facts = settings.facts("", "weight_decay", world=world_fingerprint())
    lr = LearningRate(settings.lr, min(200, settings.steps // 10), decay=0.8)
    run = TrainingRun(settings.loop(KIND, lr, max_grad_norm=5.0), facts, Trained(network, adamw, ema), record)

    for step in run:
        draws = Draws(settings.seed, step, slice(settings.batch), settings.batch, device)
        seeds = face_seeds(settings.seed, settings.batch, first=step * settings.batch)
        rows = sample_factors(seeds).to(device)
        x = worsen_slightly(to_float(renderer(rows)), draws)
        run.update(factor_loss(network(x.contiguous(memory_format=memory_format(device))), rows))

    if run.done:
        averaged.load_state_dict(round_weights(averaged))  # graded as the file will hold it
        rates = measure_rates(FaceReader(averaged, device), settings.grade, settings.seed + 1)
        origin = {name: getattr(settings, name) for name in ("steps", "batch", "lr", "seed")}
        save_face_classifier(settings.output, averaged, origin | {"rates": rates})
        record.metrics |= {"rates": rates, "parameters": sum(p.numel() for p in network.parameters())}
        print(table(rates))
        log(f"classifier: {settings.output}, record: {settings.run / 'record.json'}")
    run.finish()


def grade(settings: GradeFaceClassifier) -> None:
    """Grade a classifier file: print the shares, and write the record."""
    check_positive(settings, "count")
    check_not_negative(settings, "seed")
    machine = detect(settings.device)
    record = Record(settings, machine)
    reader = FaceReader(load_face_classifier(settings.classifier), machine.device)
    with record.timed("grading"):
        rates = measure_rates(reader, settings.count, settings.seed)
    record.metrics = {"rates": rates}
    print(table(rates))
    record.save(settings.record, name_it=True)


def measure_rates(reader: FaceReader, count: int, seed: int) -> dict[str, float]:
    """Return shares of `count` faces drawn from `seed`: factors read right, good faces that pass, spoilt faces that are refused.

    Factors are read from slightly worsened faces.
    """
    rows = sample_factors(face_seeds(seed, count)).to(reader.device).long()
    draws = [Draws(derived_seed(seed, 1), index, slice(count), count, reader.device) for index in range(8)]
    clean = reader.renderer(rows)
    drawn, good = reader(clean), reader(to_uint8(worsen_slightly(to_float(clean), draws[0])))
    right = good.rows == rows.cpu()
    rates = {f"read right: {factor}": _share(right[:, column]) for column, factor in enumerate(FACTORS)}
    rates |= {
        "read right: all factors": _share(right.all(1)),
        "good, as drawn: valid": _share(drawn.valid),
        "good, slightly worse: valid": _share(good.valid),
    }
    refused = {}
    for (name, spoil), random in zip(SPOILINGS.items(), draws[1:], strict=True):
        refused[f"refused: {name}"] = _share(~reader(to_uint8(spoil(reader.renderer, rows, random))).valid)
    return rates | refused | {"refused: all spoilings": round(sum(refused.values()) / len(refused), 4)}


def _share(flags: Tensor) -> float:
    return round(float(flags.float().mean()), 4)


def table(rates: dict[str, float]) -> str:
    """Return the shares as text, one per line."""
    return "\n".join(f"{name:<44}{share:>8.4f}" for name, share in rates.items())


def main(command: TrainFaceClassifier | GradeFaceClassifier) -> None:
    """Run the chosen subcommand."""
    train(command) if isinstance(command, TrainFaceClassifier) else grade(command)


if __name__ == "__main__":
    command: Any = TrainFaceClassifier | GradeFaceClassifier  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
