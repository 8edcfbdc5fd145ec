"""The miniature's face model: 64x64, in diffusers' layout, drawn by P2_ddim.py like any other.

  python miniature/train_faces.py train --faces faces_orl.tar.gz     checkpoints/miniature/faces; says at once how long it takes
  python miniature/train_faces.py grade --faces faces_orl.tar.gz     does it draw its training pictures again? A sheet and figures

Photographs and cuts: miniature/faces.py. The loop: miniature/faces_training.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import repository_root  # noqa: F401  # isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.steps import step_rule
from faces.models import Model, load_model
from faces.noises import Noise, seeded_noises
from faces.sampling import DdimConfig, sample_all, to_image
from miniature.faces import LEAST, cut, load_faces, middle_cuts, to_float
from miniature.faces_model import ORIGIN, SHIPPED, save_folder
from miniature.faces_training import FACES, Train, Training
from runtime.cli import BadInput, log, run_script
from runtime.device import Device, detect, set_up
from runtime.files import output_folder, read_json, require_file
from runtime.images import image_grid, save_image
from runtime.record import Record
from training.signals import leave_stopped


@dataclass(frozen=True)
class Grade:
    """Compares drawn faces with the training pictures, and held-out people's pictures with the same."""

    faces: Path = FACES
    """What the model was trained on: folder or archive."""
    model: Path = SHIPPED
    """Folder that `train` wrote."""
    count: int = 64
    """Faces to draw, at eta 0 in 50 steps."""
    seed: int = 0
    """Of the first face; the others follow."""
    device: Device = "auto"
    output: Path = Path("runs/miniature/faces/grade")
    """Folder for faces.png, memorisation.png and record.json."""


def main(settings: Train | Grade) -> None:
    """The subcommand that was asked for."""
    if isinstance(settings, Train):
        run_training(settings)
    else:
        run_grading(settings)


def run_training(settings: Train) -> None:
    """Trains, and writes the model folder and record.json; after a signal only the checkpoint is left."""
    training = Training(settings)
    record = Record(settings, training.machine)
    network = training.train()
    if training.step < settings.steps:
        leave_stopped(training.step, training.checkpoint)
    save_folder(network, settings.output, training.origin())
    record.timings["training"] = training.seconds
    record.metrics = {"parameters": sum(p.numel() for p in network.parameters())} | training.origin()
    record.save(settings.run / "record.json")
    print(f"{settings.output}: python P2_ddim.py --model {settings.output} draws faces from it")


def run_grading(settings: Grade) -> None:
    """Draws the faces, measures, writes sheets and record, prints the figures."""
    if settings.count < 1 or settings.seed < 0:
        raise BadInput(f"--count {settings.count}, --seed {settings.seed}: at least one face, seeds from zero")
    machine = detect(settings.device)
    set_up("fp32", machine)
    record = Record(settings, machine)
    train, held_out = references(settings)
    model = load_model(str(settings.model), machine.device, torch.float32)
    output_folder(settings.output)
    with record.timed("drawing"):
        drawn = faces_of(model, settings.count, settings.seed)
    nearest, rows = nearest_views(drawn, train)
    others, _ = nearest_views(held_out, train)
    record.metrics = figures(nearest, others)
    save_image(settings.output / "faces.png", image_grid(pictures(drawn), 16 if len(drawn) > 16 else len(drawn)))
    save_image(settings.output / "memorisation.png", beside(drawn, train[rows]))
    record.save(settings.output / "record.json")
    print("\n".join(f"{name:<58}{value:8.3f}" for name, value in record.metrics.items()))
    log(f"sheets and record: {settings.output}")


# ---------------------------------------------------------------- memorisation


def references(settings: Grade) -> tuple[Tensor, Tensor]:
    """Views of the training pictures and the held-out people's pictures, both [N,3,64,64] in -1..1."""
    origin = read_json(require_file(settings.model / ORIGIN, "only folders that `train` wrote can be graded"))
    faces = load_faces(settings.faces)
    if missing := set(origin["held_out"]) - set(faces.people):
        raise BadInput(
            f"--faces {settings.faces}: lacks {', '.join(sorted(missing))}, so the model learned from others"
        )
    held_out = faces.of(origin["held_out"])
    train = faces.of(sorted(set(faces.people) - set(origin["held_out"])))
    return views(train), middle_cuts(held_out)


def views(images: Tensor) -> Tensor:
    """What training may have shown of [N,3,80,80] uint8: large and small cuts, middle and corners, mirrored too: [12N,3,64,64]."""
    places = [(1.0, 0, 0), (LEAST + 0.05, 0, 0)] + [(LEAST, x, y) for x in (-0.7, 0.7) for y in (-0.7, 0.7)]
    found, still = [], torch.zeros(len(images))
    for scale, right, down in places:
        for flip in (False, True):
            flips = torch.full((len(images),), flip)
            found.append(cut(to_float(images), still + scale, still + right, still + down, flips))
    return torch.cat(found)


def faces_of(model: Model, count: int, seed: int) -> Tensor:
    """[count,3,64,64] in -1..1, at eta 0 in 50 steps of the homework's rule."""
    noises: list[Noise] = seeded_noises(list(range(seed, seed + count)), model, None)
    recipe = DdimConfig(step_rule("homework", len(model.schedule), 50), 0.0, 0)
    return torch.stack([image for _, image in sample_all(model, noises, recipe, 0, "drawing")]).clamp(-1, 1)


def nearest_views(x: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of each x [N] to its nearest training view, in grey levels (0..255, root mean square), and that view's row [N]."""
    a, b = features(x), features(train)
    distance, rows = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    return distance * 127.5 / a.shape[1] ** 0.5, rows


def features(x: Tensor) -> Tensor:
    """Grey and softened, [N,1024]: fine noise should not hide a copy."""
    return F.avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)


def figures(nearest: Tensor, others: Tensor) -> dict[str, float]:
    """Medians, the held-out 1st percentile, and the share of drawn faces that are nearer than that."""
    bar = others.quantile(0.01)
    return {
        "drawn faces to nearest training picture, median": float(nearest.median()),
        "held-out people to nearest training picture, median": float(others.median()),
        "held-out people, 1st percentile": float(bar),
        "share of drawn faces nearer than that": float((nearest < bar).float().mean()),
    }


def pictures(x: Tensor) -> Tensor:
    """[N,3,64,64] in -1..1 -> uint8."""
    return torch.stack([to_image(image, "clamp") for image in x])


def beside(drawn: Tensor, nearest: Tensor, columns: int = 16) -> Tensor:
    """A sheet: rows of drawn faces, below each its nearest training picture."""
    above, below = (pictures(x).split(columns) for x in (drawn, nearest))
    rows = [image_grid(torch.cat(pair), len(pair[0])) for pair in zip(above, below, strict=True)]
    width = max(row.shape[2] for row in rows)
    return torch.cat([F.pad(row, (0, width - row.shape[2], 0, 6), value=255) for row in rows], 1)


if __name__ == "__main__":
    command: Any = Train | Grade  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
