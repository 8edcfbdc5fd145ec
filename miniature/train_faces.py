"""Trains and grades the miniature's face model: 64x64 faces of miniature/face_world.py, in diffusers' layout for P2_ddim.py.

  python miniature/train_faces.py train                    checkpoints/miniature/faces; reports at once how long it takes
  python miniature/train_faces.py grade                    valid faces, and how near they are to the training images

The network and its folder: miniature/faces_model.py. What a valid face is: miniature/face_classifier.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import repository_root  # noqa: F401  # isort: split
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from diffusion.loss import damped_v_weight, denoising_loss
from diffusion.schedule import linear
from faces.models import load_folder
from miniature.diffusion_parts import start_from
from miniature.face_classifier import SHIPPED as CLASSIFIER
from miniature.face_classifier import FaceReader, FaceReading, load_face_classifier
from miniature.face_world import FaceRenderer, face_seeds, sample_factors, world_fingerprint
from miniature.faces_model import ORIGIN, SHIPPED, STEPS, WEIGHTS, make_network, sample_faces, save_folder
from miniature.training_flags import TrainingFlags, save_sheet
from runtime.cli import BadInput, check_not_negative, check_positive, log, progress, run_script
from runtime.device import (
    AutoOnOff,
    Device,
    Precision,
    detect,
    memory_format,
    set_up,
    should_compile,
    to_channels_last,
    to_training_device,
)
from runtime.files import check_writable_folder, output_folder, read_json, require_file
from runtime.images import image_grid, save_image, to_float, to_uint8
from runtime.record import Record
from training.draws import Draws
from training.ema import Ema
from training.loop import Trained, TrainingRun
from training.schedule import LearningRate

COMPARED = 5000  # training images that are compared at a time


@tyro.conf.configure(tyro.conf.subcommand(name="train"))
@dataclass(frozen=True)
class TrainFaces(TrainingFlags):
    """Train a face model. Ctrl-C or SIGTERM stops cleanly, and the same command continues."""

    output: Path = SHIPPED
    """Folder for the model, laid out as diffusers' DDIMPipeline, weights in half precision."""
    run: Path = Path("runs/miniature/faces")
    images: int = 100_000
    """Number of training faces, rendered whenever they are needed. Other faces of the world are held out."""
    steps: int = 20_000
    batch: int = 32
    lr: float = 1e-3
    ema: float = 0.999
    channels: tuple[int, ...] = (16, 32, 64, 128)
    """Channels per level, finest first; the last level has attention."""
    blocks: int = 1
    """Residual blocks per level on the way down, one more on the way up."""
    gamma: float = 5.0
    """Signal-to-noise ratio (SNR) above which a timestep counts less: the loss has weight min(1, (1 + gamma) / (1 + SNR))."""
    draw_every: int = 1000
    """Steps between two sheets of sampled faces, in the run folder and TensorBoard; 0 = at the end only."""
    precision: Precision = "auto"
    """auto: bf16 on a GPU that has it, else fp16 on CUDA, else fp32. A CPU with native bf16 takes steps 1.5 times faster in bf16."""
    compile: AutoOnOff = "auto"
    """torch.compile; auto: in a long training on CUDA."""


@tyro.conf.configure(tyro.conf.subcommand(name="grade"))
@dataclass(frozen=True)
class GradeFaces:
    """Measure how many sampled faces are valid, and how near sampled and held-out faces are to the training images."""

    model: Path = SHIPPED
    """Folder that `train` wrote."""
    classifier: Path = CLASSIFIER
    """File that miniature/face_factors.py wrote."""
    count: int = 500
    """Number of faces to sample, at eta 0 in 50 steps, and of held-out faces to compare."""
    seed: int = 0
    """Seed of the first face; face k has this seed + k."""
    device: Device = "auto"
    output: Path = Path("runs/miniature/faces/grade")
    """Folder for faces.png, refused.png, nearest.png and record.json."""


# ---------------------------------------------------------------- training


def train(settings: TrainFaces) -> None:
    """Train v prediction on the course's schedule, and write the model folder.

    A network of this size that predicts eps gives faces a tint: at strong noise, a small error in eps is a large error in x0.
    """
    settings.check("images", "gamma")
    check_not_negative(settings, "draw_every")
    check_writable_folder(settings.output)
    machine = detect(settings.device)
    on_gpu = machine.device.type == "cuda"
    precision = set_up("fp32" if settings.precision == "auto" and not on_gpu else settings.precision, machine, True)
    device, record = machine.device, Record(settings, machine)

    # the data, and what the loss needs of the schedule
    renderer = FaceRenderer(device)
    faces = sample_factors(face_seeds(settings.seed, settings.images)).to(device)
    schedule = linear(STEPS, prediction="v")
    alpha_bar = schedule.alpha_bar.float().to(device)
    weight = partial(damped_v_weight, gamma=settings.gamma)

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
    compiled = should_compile(settings.compile, machine, on_gpu and settings.steps >= machine.compile_steps)
    if compiled:
        unet.compile()

    # the run: continues from its checkpoint where there is one
    facts = settings.facts(WEIGHTS, "images", "channels", "blocks", "gamma", prediction="v", world=world_fingerprint())
    lr = LearningRate(settings.lr, min(200, settings.steps // 10), decay=0.7)
    run = TrainingRun(
        settings.loop("face model", lr, precision, compiled=compiled), facts, Trained(unet, adamw, ema), record
    )
    parameters = sum(p.numel() for p in unet.parameters())
    log(
        f"{parameters / 1e6:.1f} M parameters, {precision}, on {machine.name}; {settings.images:,} faces; "
        f"{settings.steps:,} steps of {settings.batch}; run folder {settings.run}"
    )

    def network(x: Tensor, t: Tensor) -> Tensor:
        with run.autocast():
            v: Tensor = unet(x.contiguous(memory_format=memory_format(device)), t, return_dict=False)[0]
        return v.float()

    for step in run:
        draws = Draws(settings.seed, step, slice(settings.batch), settings.batch, device)
        x0 = to_float(renderer(faces[(draws.uniform() * len(faces)).long()]))
        t, eps = draws.timesteps(STEPS), draws.normal(*x0.shape[1:])
        run.update(denoising_loss(network, x0, eps, t, alpha_bar, "v", weight))

        if run.every(settings.draw_every):
            save_sheet(run, image_grid(to_uint8(sample_faces(averaged, schedule, range(32))), 8, 2))

    if run.done:
        names = ("steps", "batch", "lr", "ema", "gamma", "seed", "images")
        origin = {name: getattr(settings, name) for name in names} | {"precision": precision}
        save_folder(averaged, settings.output, origin | {"world": world_fingerprint()})
        record.metrics |= {"parameters": parameters} | origin
        print(f"{settings.output}: python P2_ddim.py --model {settings.output} draws faces from it")
    run.finish()


# ---------------------------------------------------------------- grading


def grade(settings: GradeFaces) -> None:
    """Sample faces, read them, measure their distance to the training images, print the results, and write sheets and record."""
    check_positive(settings, "count")
    check_not_negative(settings, "seed")
    output_folder(settings.output)
    machine = detect(settings.device)
    set_up("fp32", machine)
    record = Record(settings, machine)
    origin = read_json(require_file(settings.model / ORIGIN, "only folders that `train` wrote can be graded"))
    if origin.get("world") != world_fingerprint():
        raise BadInput(f"--model {settings.model} was not trained on this face world")
    reader = FaceReader(load_face_classifier(settings.classifier), machine.device)
    unet, schedule = load_folder(settings.model)
    unet.eval().requires_grad_(False)
    to_channels_last(unet, machine.device, torch.float32)
    with record.timed("drawing"):
        samples = to_uint8(sample_faces(unet, schedule, range(settings.seed, settings.seed + settings.count)))

    # distances of the samples, and of held-out faces, to the training images
    reading = reader(samples)
    held_out = reader.renderer(sample_factors(face_seeds(origin["seed"] + 1, settings.count))).cpu()
    trained = sample_factors(face_seeds(origin["seed"], origin["images"]))
    distances, rows = nearest(torch.cat([samples, held_out]), trained, reader.renderer)
    record.metrics = figures(reading, *distances.split(settings.count))

    columns = min(16, settings.count)  # of faces; a face and what it is compared with take two
    refused = samples[~reading.valid][: 4 * columns]
    save_image(settings.output / "faces.png", image_grid(samples[: 4 * columns], columns))
    if len(refused):
        both = torch.stack([refused, reader.renderer(reading.rows[~reading.valid][: 4 * columns]).cpu()], 1)
        save_image(settings.output / "refused.png", image_grid(both.flatten(0, 1), columns + columns % 2))
    both = torch.stack([samples[:columns], reader.renderer(trained[rows[:columns]]).cpu()], 1)
    save_image(settings.output / "nearest.png", image_grid(both.flatten(0, 1), columns + columns % 2))
    record.save(settings.output / "record.json")
    print("\n".join(f"{name:<58}{value:8.3f}" for name, value in record.metrics.items()))
    log(f"sheets (each face before what it is compared with) and record: {settings.output}")


def nearest(images: Tensor, trained: Tensor, renderer: FaceRenderer) -> tuple[Tensor, Tensor]:
    """Return the distance [N] of each image [N,3,64,64] uint8 to its nearest training image, and that image's row [N] in `trained`.

    `trained` [M,14] are the factors of the training images. The distance is a root mean square in grey levels (0..255), at half the
    resolution so that fine noise does not hide a copy.
    """

    def features(x: Tensor) -> Tensor:
        return F.avg_pool2d(x.to(renderer.device).float(), 2).flatten(1)

    a = features(images)
    best, rows = torch.full((len(a),), torch.inf), torch.zeros(len(a), dtype=torch.long)
    for start in progress(range(0, len(trained), COMPARED), "comparing", leave=False):
        distance, row = torch.cdist(a, features(renderer(trained[start : start + COMPARED]))).min(1)
        closer = distance.cpu() < best
        best, rows = torch.where(closer, distance.cpu(), best), torch.where(closer, row.cpu() + start, rows)
    return best / a.shape[1] ** 0.5, rows


def figures(reading: FaceReading, samples: Tensor, held_out: Tensor) -> dict[str, float]:
    """Return the results by name: shares of valid and of confidently read faces, and medians of distances.

    `samples` and `held_out` [N] are distances to the nearest training image. The last result is the share of samples below the 1st
    percentile of `held_out`.
    """
    bar = held_out.quantile(0.01)
    return {
        "drawn faces that are valid": float(reading.valid.float().mean()),
        "drawn faces whose factors are read with confidence": float(reading.certain.float().mean()),
        "drawn faces, distance from what their factors say, median": float(reading.distance.median()),
        "drawn faces to nearest training image, median": float(samples.median()),
        "held-out faces to nearest training image, median": float(held_out.median()),
        "held-out faces, 1st percentile": float(bar),
        "share of drawn faces nearer than that": float((samples < bar).float().mean()),
    }


def main(command: TrainFaces | GradeFaces) -> None:
    """Run the chosen subcommand."""
    train(command) if isinstance(command, TrainFaces) else grade(command)


if __name__ == "__main__":
    command: Any = TrainFaces | GradeFaces  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
