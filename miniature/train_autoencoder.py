"""Trains and grades the miniature's autoencoder, in diffusers' form: 64x64 images to 16x16 latents of 4 channels, and back.

python miniature/train_autoencoder.py train                   checkpoints/miniature/stable_diffusion/vae; the same command resumes
python miniature/train_autoencoder.py grade --count 1000      PSNR on new images
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import repository_root  # noqa: F401  # isort: split
import torch
import tyro
from torch import Tensor, nn

from miniature.diffusion_parts import PARTS, WEIGHTS, load_vae, make_autoencoder, save_part, start_from
from miniature.scenery.render import as_tensor, dataset, render_batch, world_fingerprint
from miniature.scenery.scenes import ANY_PAIR
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
    to_training_device,
)
from runtime.files import check_writable_folder
from runtime.images import image_grid, save_image, to_float, to_uint8
from runtime.record import Record
from runtime.seeds import derived_seed
from training.draws import Draws
from training.ema import Ema
from training.loop import Trained, TrainingRun
from training.schedule import LearningRate

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

CHUNK = 125  # images that are measured at a time
TRAINED, GRADED, SHOWN = range(3)  # part of the image seeds, so that these sets of images differ


@tyro.conf.configure(tyro.conf.subcommand(name="train"))
@dataclass(frozen=True)
class TrainAutoencoder(TrainingFlags):
    """Train on images rendered during the training. Ctrl-C or SIGTERM stops cleanly, and the same command continues."""

    output: Path = PARTS
    """Folder in which vae/ is written."""
    run: Path = Path("runs/miniature/autoencoder")
    steps: int = 4500
    batch: int = 16
    lr: float = 2e-3
    ema: float = 0.995
    channels: tuple[int, ...] = (32, 48, 64)
    """Channels at 64x64, 32x32 and 16x16 positions; multiples of 8."""
    kl: float = 3e-4
    """Weight of the KL divergence per latent number. Higher values make the posteriors of different images overlap more."""
    show_every: int = 1000
    """Steps between two sheets of reconstructions; 0 = none."""
    grade: int = 1000
    """Number of new images on which the finished autoencoder is graded."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware has it, else fp16 on CUDA, else fp32."""
    compile: AutoOnOff = "auto"
    """torch.compile; auto: in a long training on CUDA or on a CPU with bf16."""


@tyro.conf.configure(tyro.conf.subcommand(name="grade"))
@dataclass(frozen=True)
class GradeAutoencoder:
    """Measure the PSNR of new images that are encoded and decoded, held-out (colour, object) pairs among them."""

    parts: Path = PARTS
    """Folder that holds vae/."""
    count: int = 1000
    """Number of images."""
    seed: int = 1
    device: Device = "auto"
    output: Path = Path("runs/miniature/autoencoder/grade")
    """Folder for record.json and sheet.png."""


# ---------------------------------------------------------------- training


class Reconstruction(nn.Module):
    """Encoder, sample of the posterior, decoder, as one module for training."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction of x [N,3,64,64] in -1..1, and the mean KL divergence per latent number; noise [N,4,16,16]."""
        posterior = self.vae.encode(x).latent_dist
        mean, std, logvar = posterior.mean.float(), posterior.std.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return self.vae.decode(mean + std * noise).sample, kl


def train(settings: TrainAutoencoder) -> None:
    """Train on L1, L2 and a little KL (Rombach et al. 2022, without the discriminator); then set the latents' scale, save and grade."""
    settings.check("grade")
    if any(width < 8 or width % 8 for width in settings.channels) or len(settings.channels) != 3:
        raise BadInput(f"--channels {settings.channels}: give three multiples of 8")
    check_writable_folder(settings.output)
    machine = detect(settings.device)
    device, precision = machine.device, set_up(settings.precision, machine, training=True)
    record = Record(settings, machine)

    # the network, its average and its optimizer
    torch.manual_seed(settings.seed)
    network = Reconstruction(make_autoencoder(settings.channels))
    if settings.init:
        start_from(network.vae, load_vae(settings.init), settings.init)
    to_training_device(network, device)
    ema = Ema(network, settings.ema)
    averaged = cast(Reconstruction, ema.module.eval()).vae
    adamw = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=0.01, fused=device.type != "mps")
    compiled = should_compile(settings.compile, machine, settings.steps >= machine.compile_steps)
    if compiled:
        network.compile()

    # the run: continues from its checkpoint where there is one
    lr = LearningRate(settings.lr, min(200, settings.steps // 10), decay=0.6)
    config = settings.loop("miniature autoencoder", lr, precision=precision, compiled=compiled)
    facts = settings.facts(WEIGHTS, "channels", "kl", world=world_fingerprint(ANY_PAIR))
    run = TrainingRun(config, facts, Trained(network, adamw, ema), record)

    for step in run:
        seeds = [derived_seed(settings.seed, TRAINED, step, index) for index in range(settings.batch)]
        x = random_images(seeds, device)
        noise = Draws(settings.seed, step, slice(settings.batch), settings.batch, device).normal(4, 16, 16)
        with run.autocast():
            reconstruction, kl = network(x, noise)
        error = reconstruction.float() - x
        run.update(error.abs().mean() + error.square().mean() + settings.kl * kl)

        if settings.show_every and run.every(settings.show_every):
            save_sheet(run, before_and_after(averaged, sheet_images(settings.seed, device)))

    if run.done:
        save_part(with_measured_scale(averaged, settings.seed), settings.output / "vae")
        vae = to_training_device(load_vae(settings.output / "vae"), device)
        rates = measure_psnr(vae, settings.grade, settings.seed + 1)
        record.metrics |= rates | {"scaling_factor": vae.config["scaling_factor"]}
        print(summary(rates, vae))
        log(f"autoencoder: {settings.output / 'vae'}, record: {settings.run / 'record.json'}")
    run.finish(parameters=sum(p.numel() for p in network.parameters()))


def random_images(seeds: list[int], device: torch.device) -> Tensor:
    """Render one image per seed, [N,3,64,64] in -1..1; held-out (colour, object) pairs occur too."""
    x = to_float(as_tensor(render_batch(seeds, ANY_PAIR).images).to(device))
    return x.contiguous(memory_format=memory_format(device))


def sheet_images(seed: int, device: torch.device) -> Tensor:
    """Render the eight images [8,3,64,64] in -1..1 of the sheets that compare images and reconstructions; `seed` fixes them."""
    return random_images([derived_seed(seed, SHOWN, index) for index in range(8)], device)


def with_measured_scale(vae: AutoencoderKL, seed: int, count: int = 500) -> AutoencoderKL:
    """Return a copy with the scaling factor that gives its latents unit variance (Rombach et al. 2022, section D.1)."""
    vae = copy.deepcopy(vae).eval()
    device = next(vae.parameters()).device
    seeds = [derived_seed(seed, SHOWN, index) for index in range(count)]
    with torch.inference_mode():
        parts = [vae.encode(random_images(seeds[i : i + CHUNK], device)).latent_dist for i in range(0, count, CHUNK)]
        mean = torch.cat([part.mean for part in parts])
        noise = torch.cat([part.var for part in parts]).mean()
    vae.register_to_config(scaling_factor=round(float((mean.var() + noise).rsqrt()), 5))
    return vae


# ---------------------------------------------------------------- grading


@torch.inference_mode()
def reconstruct(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Return x [N,3,64,64] in -1..1, encoded to the posterior's mean and decoded, as uint8."""
    return to_uint8(vae.decode(vae.encode(x).latent_dist.mean).sample.float())


def before_and_after(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Return one image [3,H,W] uint8: x in the first row, its reconstruction in the second."""
    return image_grid(torch.cat([to_uint8(x), reconstruct(vae, x)]).cpu(), len(x), scale=2)


def measure_psnr(vae: AutoencoderKL, count: int, seed: int) -> dict[str, float]:
    """Return the PSNR in dB of the reconstructions of `count` new images, rounded to bytes as in an image file.

    `psnr` is that of the mean squared error over all images. `psnr_per_picture` is the mean over images, never lower; `worst` the lowest.
    """
    device = next(vae.parameters()).device
    images = as_tensor(dataset(count, derived_seed(seed, GRADED), ANY_PAIR).images)
    errors = []
    for chunk in progress(images.split(CHUNK), "measuring", leave=False):
        reconstruction = reconstruct(vae, to_float(chunk.to(device))).cpu()
        errors.append((reconstruction.double() - chunk.double()).square().mean((1, 2, 3)))
    mse = torch.cat(errors)
    single = 10 * torch.log10(255**2 / mse.clamp(min=1e-3))
    return {
        "psnr": round(10 * math.log10(255**2 / max(1e-3, float(mse.mean()))), 3),
        "psnr_per_picture": round(float(single.mean()), 3),
        "worst": round(float(single.min()), 3),
    }


def grade(settings: GradeAutoencoder) -> None:
    """Print the PSNR, and write the record and a sheet."""
    check_positive(settings, "count")
    check_not_negative(settings, "seed")
    check_writable_folder(settings.output)
    machine = detect(settings.device)
    set_up("fp32", machine)
    record = Record(settings, machine)
    vae = to_training_device(load_vae(settings.parts / "vae"), machine.device)
    with record.timed("grading"):
        rates = measure_psnr(vae, settings.count, settings.seed)
    record.metrics = rates | {"scaling_factor": vae.config["scaling_factor"]}
    sheet = before_and_after(vae, sheet_images(settings.seed, machine.device))
    save_image(settings.output / "sheet.png", sheet)
    record.save(settings.output / "record.json")
    print(summary(rates, vae))
    log(f"sheet and record: {settings.output}")


def summary(rates: dict[str, float], vae: AutoencoderKL) -> str:
    """Return one line with the PSNR and the scaling factor."""
    return (
        f"PSNR {rates['psnr']:.2f} dB (mean over images {rates['psnr_per_picture']:.2f}, worst {rates['worst']:.2f}); "
        f"latents x {vae.config['scaling_factor']} have unit variance"
    )


def main(command: TrainAutoencoder | GradeAutoencoder) -> None:
    """Run the chosen subcommand."""
    train(command) if isinstance(command, TrainAutoencoder) else grade(command)


if __name__ == "__main__":
    command: Any = TrainAutoencoder | GradeAutoencoder  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
