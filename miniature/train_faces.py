"""The miniature's face model: 64x64, in diffusers' layout, sampled by P2_ddim.py like any other.

  python miniature/train_faces.py train --faces faces_orl.tar.gz     checkpoints/miniature/faces; reports at once how long it takes
  python miniature/train_faces.py grade --faces faces_orl.tar.gz     memorisation of its training images: a sheet and figures

Photographs and crops: miniature/faces.py. The network and its folder: miniature/faces_model.py.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import repository_root  # noqa: F401  # isort: split
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from diffusion.loss import denoising_loss, min_snr_weight
from diffusion.schedule import linear
from faces.models import load_folder
from miniature.diffusion_parts import start_from
from miniature.faces import Faces, central_crops, held_out_people, load_faces, random_crops, training_crops
from miniature.faces_model import ORIGIN, SHIPPED, STEPS, WEIGHTS, make_network, sample_faces, save_folder
from miniature.training_flags import TrainingFlags, save_sheet
from runtime.cli import BadInput, check_not_negative, check_positive, log, run_script
from runtime.device import Device, detect, memory_format, set_up, to_channels_last, to_training_device
from runtime.files import ROOT, check_writable_folder, output_folder, read_json, require_file
from runtime.images import image_grid, save_image, to_uint8
from runtime.record import Record
from training.draws import Draws
from training.ema import Ema
from training.loop import Trained, TrainingRun
from training.schedule import LearningRate

FACES = ROOT / "hw2_data" / "faces_orl.tar.gz"


@tyro.conf.configure(tyro.conf.subcommand(name="train"))
@dataclass(frozen=True)
class TrainFaces(TrainingFlags):
    """Train a face model. Ctrl-C or SIGTERM stops cleanly, and the same command continues."""

    faces: Path = FACES
    """Folder of images, one subfolder per person, or a tar archive of one."""
    output: Path = SHIPPED
    """Folder for the model, laid out as diffusers' DDIMPipeline, weights in half precision."""
    held_out: int = 4
    """People who are not trained on; `grade` compares with them."""
    run: Path = Path("runs/miniature/faces")
    steps: int = 3500
    batch: int = 32
    lr: float = 1e-3
    ema: float = 0.999
    channels: tuple[int, ...] = (16, 32, 64, 128)
    """Channels per level, finest first; attention on the last."""
    blocks: int = 1
    """Residual blocks per level on the way down, one more on the way up."""
    draw_every: int = 1000
    """Steps between two sheets of sampled faces, in the run folder and TensorBoard; 0 = at the end only."""


@tyro.conf.configure(tyro.conf.subcommand(name="grade"))
@dataclass(frozen=True)
class GradeFaces:
    """Compare sampled faces with the training images, and held-out people's images with the same."""

    faces: Path = FACES
    """Folder or archive that the model was trained on."""
    model: Path = SHIPPED
    """Folder that `train` wrote."""
    count: int = 64
    """Faces to sample, at eta 0 in 50 steps."""
    seed: int = 0
    """Seed of the first face; the others follow."""
    device: Device = "auto"
    output: Path = Path("runs/miniature/faces/grade")
    """Folder for faces.png, memorisation.png and record.json."""


# ---------------------------------------------------------------- training


def train(settings: TrainFaces) -> None:
    """Train eps prediction on the course's schedule with min-SNR weight 5, and write the model folder."""
    settings.check()
    check_not_negative(settings, "draw_every")
    check_writable_folder(settings.output)
    machine = detect(settings.device)
    set_up("fp32", machine)
    device, record = machine.device, Record(settings, machine)

    # the data, and what the loss needs of the schedule
    faces = load_faces(settings.faces)
    held_out = people_to_hold_out(faces, settings)
    images = faces.of(sorted(set(faces.people) - set(held_out))).to(device)
    schedule = linear(STEPS)
    alpha_bar = schedule.alpha_bar.float().to(device)
    weight = partial(min_snr_weight, gamma=5.0, prediction="eps")

    # the network, its average and its optimizer
    torch.manual_seed(settings.seed)
    unet = make_network(settings.channels, settings.blocks)
    if settings.init:
        initial, initial_schedule = load_folder(settings.init)
        if not torch.equal(initial_schedule.alpha_bar, schedule.alpha_bar):
            raise BadInput(f"--init {settings.init} has another schedule than the course's")
        start_from(unet, initial, settings.init)
    to_training_device(unet, device)
    ema = Ema(unet, settings.ema)
    averaged: Any = ema.module.eval()
    adamw = torch.optim.AdamW(unet.parameters(), settings.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    # the run: continues from its checkpoint where there is one
    facts = settings.facts(
        *(WEIGHTS, "channels", "blocks"),
        held_out=held_out,
        images=hashlib.blake2b(images.cpu().numpy().tobytes(), digest_size=8).hexdigest(),
    )
    lr = LearningRate(settings.lr, min(200, settings.steps // 10), decay=0.7)
    run = TrainingRun(settings.loop("face model", lr), facts, Trained(unet, adamw, ema), record)
    parameters = sum(p.numel() for p in unet.parameters())
    log(
        f"{parameters / 1e6:.1f} M parameters on {machine.name}; {len(images)} images, without those of "
        f"{', '.join(held_out)}; {settings.steps:,} steps of {settings.batch}; run folder {settings.run}"
    )

    def network(x: Tensor, t: Tensor) -> Tensor:
        eps: Tensor = unet(x.contiguous(memory_format=memory_format(device)), t, return_dict=False)[0]
        return eps

    for step in run:
        draws = Draws(settings.seed, step, slice(settings.batch), settings.batch, device)
        x0 = random_crops(images, draws)
        t, eps = draws.timesteps(STEPS), draws.normal(*x0.shape[1:])
        run.update(denoising_loss(network, x0, eps, t, alpha_bar, "eps", weight))

        if run.every(settings.draw_every):
            save_sheet(run, image_grid(to_uint8(sample_faces(averaged, schedule, range(16))), 8, 2))

    if run.done:
        origin = {name: getattr(settings, name) for name in ("steps", "batch", "lr", "ema", "seed")}
        origin |= {"faces": settings.faces.name, "pictures": len(images), "held_out": held_out}
        save_folder(averaged, settings.output, origin)
        record.metrics |= {"parameters": parameters} | origin
        print(f"{settings.output}: python P2_ddim.py --model {settings.output} draws faces from it")
    run.finish()


def people_to_hold_out(faces: Faces, settings: TrainFaces) -> list[str]:
    """Return those of the initial model, which was not trained on them; else choose them by the seed."""
    chosen = held_out_people(faces, settings.held_out, settings.seed)
    origin = settings.init and settings.init / ORIGIN
    before: list[str] = read_json(origin).get("held_out", []) if origin and origin.is_file() else []
    return before if before and set(before) < set(faces.people) else chosen


# ---------------------------------------------------------------- memorisation


def grade(settings: GradeFaces) -> None:
    """Sample faces, measure their distance to the training images, print the figures, and write sheets and record."""
    check_positive(settings, "count")
    check_not_negative(settings, "seed")
    output_folder(settings.output)
    machine = detect(settings.device)
    set_up("fp32", machine)
    record = Record(settings, machine)
    origin = read_json(require_file(settings.model / ORIGIN, "only folders that `train` wrote can be graded"))
    faces = load_faces(settings.faces)
    if missing := set(origin["held_out"]) - set(faces.people):
        raise BadInput(
            f"--faces {settings.faces}: lacks {', '.join(sorted(missing))}, so the model learned from others"
        )
    train = training_crops(faces.of(sorted(set(faces.people) - set(origin["held_out"]))))
    held_out = central_crops(faces.of(origin["held_out"]))
    unet, schedule = load_folder(settings.model)
    unet.eval().requires_grad_(False)
    to_channels_last(unet, machine.device, torch.float32)
    with record.timed("drawing"):
        samples = sample_faces(unet, schedule, range(settings.seed, settings.seed + settings.count))
    distances, rows = nearest(samples, train)
    record.metrics = figures(distances, nearest(held_out, train)[0])
    save_image(settings.output / "faces.png", image_grid(to_uint8(samples), min(16, len(samples))))
    save_image(settings.output / "memorisation.png", pair_sheet(samples, train[rows]))
    record.save(settings.output / "record.json")
    print("\n".join(f"{name:<58}{value:8.3f}" for name, value in record.metrics.items()))
    log(f"sheets and record: {settings.output}")


def nearest(x: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance of each x [N] to its nearest training crop, and that crop's row [N].

    The distance is a root mean square in grey levels (0..255) of grey, softened images, so that fine noise does not hide a copy.
    """
    a, b = (F.avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1) for images in (x, train))
    distance, rows = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    return distance * 127.5 / a.shape[1] ** 0.5, rows


def figures(samples: Tensor, held_out: Tensor) -> dict[str, float]:
    """Return medians, the held-out 1st percentile, and the share of sampled faces below that."""
    bar = held_out.quantile(0.01)
    return {
        "drawn faces to nearest training picture, median": float(samples.median()),
        "held-out people to nearest training picture, median": float(held_out.median()),
        "held-out people, 1st percentile": float(bar),
        "share of drawn faces nearer than that": float((samples < bar).float().mean()),
    }


def pair_sheet(samples: Tensor, crops: Tensor, columns: int = 16) -> Tensor:
    """Return a sheet: rows of sampled faces, below each its nearest training crop."""
    above, below = (to_uint8(x).split(columns) for x in (samples, crops))
    rows = [image_grid(torch.cat(pair), len(pair[0])) for pair in zip(above, below, strict=True)]
    width = max(row.shape[2] for row in rows)
    return torch.cat([F.pad(row, (0, width - row.shape[2], 0, 6), value=255) for row in rows], 1)


def main(command: TrainFaces | GradeFaces) -> None:
    """Run the chosen subcommand."""
    train(command) if isinstance(command, TrainFaces) else grade(command)


if __name__ == "__main__":
    command: Any = TrainFaces | GradeFaces  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
