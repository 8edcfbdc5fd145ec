"""The miniature's autoencoder: 64x64 pictures as 16x16 latents of 4 channels, and back, in diffusers' form.

python miniature/train_autoencoder.py train                   checkpoints/miniature/stable_diffusion/vae; the same command resumes
python miniature/train_autoencoder.py grade --count 1000      PSNR on fresh pictures
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import repository_root  # noqa: F401  # isort: split
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from miniature.diffusion_parts import MAKE_VAE, PARTS, load_part, make_autoencoder, save_part
from miniature.judge_model import to_float
from miniature.judge_training import ANY
from miniature.scenery.render import as_tensor, batch, dataset
from miniature.trainer import Loop, Trainer, check_numbers
from runtime.cli import BadInput, log, progress, run_script
from runtime.device import Device, detect, memory_format, set_up
from runtime.images import image_grid, save_image
from runtime.record import Record
from runtime.seeds import derived_seed
from training.draws import Draws

CHUNK = 125  # pictures that are measured at a time
TRAINED, GRADED, SHOWN = range(3)  # domains of picture seeds


@dataclass(frozen=True)
class Train(Loop):
    """Trains on pictures rendered on the way; stops cleanly on Ctrl-C or SIGTERM, and goes on with the same command."""

    output: Path = PARTS
    """Where vae/ goes."""
    run: Path = Path("runs/miniature/autoencoder")
    steps: int = 4500
    batch: int = 16
    lr: float = 2e-3
    ema: float = 0.995
    channels: tuple[int, ...] = (32, 48, 64)
    """At 64x64, 32x32 and 16x16 positions; multiples of 8."""
    kl: float = 3e-4
    """Weight of the KL divergence per latent number: how much the posteriors are blurred into each other."""
    grade: int = 1000
    """Fresh pictures on which the finished autoencoder is graded."""


@dataclass(frozen=True)
class Grade:
    """Encodes and decodes fresh pictures, held-out pairs among them."""

    parts: Path = PARTS
    """The folder that holds vae/."""
    count: int = 1000
    seed: int = 1
    device: Device = "auto"
    output: Path = Path("runs/miniature/autoencoder/grade")
    """For record.json and sheet.png."""


# ---------------------------------------------------------------- training


class Reconstruction(nn.Module):
    """Encoder, posterior sample, decoder: what the loss looks at."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x [N,3,64,64] in -1..1 and noise [N,4,16,16] -> the reconstruction, and the KL divergence per latent number."""
        posterior = self.vae.encode(x).latent_dist
        mean, std, logvar = posterior.mean.float(), posterior.std.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return self.vae.decode(mean + std * noise).sample, kl


class AutoencoderTrainer(Trainer):
    """Fresh pictures at every step; L1 and L2 of the pixels, and a little KL (Rombach et al. 2022, without its discriminator)."""

    kind = "miniature autoencoder"
    settings: Train

    def prepare(self) -> None:
        check_numbers(self.settings, "grade")
        if any(width < 8 or width % 8 for width in self.settings.channels) or len(self.settings.channels) != 3:
            raise BadInput(f"--channels {self.settings.channels}: give three multiples of 8")

    def build(self) -> nn.Module:
        return Reconstruction(make_autoencoder(self.settings.channels))

    def loss(self, draws: Draws) -> Tensor:
        indices = range(draws.rows.start, draws.rows.stop)
        seeds = [derived_seed(self.settings.seed, TRAINED, self.step, index) for index in indices]
        x = pictures(seeds, self.device)
        rebuilt, kl = self.model(x, draws.normal(4, 16, 16))
        error = rebuilt.float() - x
        return error.abs().mean() + error.square().mean() + self.settings.kl * kl

    def sheet(self) -> Tensor:
        seeds = [derived_seed(self.settings.seed, SHOWN, index) for index in range(8)]
        return before_and_after(self.averaged.vae, pictures(seeds, self.device))


def pictures(seeds: list[int], device: torch.device) -> Tensor:
    """One fresh picture per seed, [N,3,64,64] in -1..1, of any pair of colour and object: the autoencoder is about looks, not words."""
    x = to_float(as_tensor(batch(seeds, ANY).images).to(device))
    return x.contiguous(memory_format=memory_format(device))


def with_measured_scale(vae: AutoencoderKL, seed: int, count: int = 500) -> AutoencoderKL:
    """A copy that knows the factor by which its latents have unit variance (Rombach et al. 2022, section D.1)."""
    vae = copy.deepcopy(vae).eval()
    device = next(vae.parameters()).device
    seeds = [derived_seed(seed, SHOWN, index) for index in range(count)]
    with torch.inference_mode():
        parts = [vae.encode(pictures(seeds[i : i + CHUNK], device)).latent_dist for i in range(0, count, CHUNK)]
        mean = torch.cat([part.mean for part in parts])
        noise = torch.cat([part.var for part in parts]).mean()
    vae.register_to_config(scaling_factor=round(float((mean.var() + noise).rsqrt()), 5))
    return vae


# ---------------------------------------------------------------- grading


def to_uint8(x: Tensor) -> Tensor:
    """-1..1, or a little beyond -> 0..255."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@torch.inference_mode()
def rebuilt(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Through the posterior's mean and back, [N,3,64,64] uint8."""
    return to_uint8(vae.decode(vae.encode(x).latent_dist.mean).sample.float())


def before_and_after(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """One picture: the first row as it was, the second as it came back."""
    return image_grid(torch.cat([to_uint8(x), rebuilt(vae, x)]).cpu(), len(x), scale=2)


def measured(vae: AutoencoderKL, count: int, seed: int) -> dict[str, float]:
    """PSNR in dB on `count` fresh pictures, rounded to bytes as a picture file is: of the mean squared error over all pictures, and the
    mean of the pictures' own (which is never lower)."""
    device = next(vae.parameters()).device
    images = as_tensor(dataset(count, derived_seed(seed, GRADED), ANY).images)
    errors = []
    for chunk in progress(images.split(CHUNK), "measuring", leave=False):
        back = rebuilt(vae, to_float(chunk.to(device))).cpu()
        errors.append((back.double() - chunk.double()).square().mean((1, 2, 3)))
    mse = torch.cat(errors)
    single = 10 * torch.log10(255**2 / mse.clamp(min=1e-3))
    return {
        "psnr": round(10 * math.log10(255**2 / max(1e-3, float(mse.mean()))), 3),
        "psnr_per_picture": round(float(single.mean()), 3),
        "worst": round(float(single.min()), 3),
    }


# ---------------------------------------------------------------- the commands


def main(command: Train | Grade) -> None:
    """The subcommand that was asked for."""
    if isinstance(command, Train):
        run_training(command)
    else:
        run_grading(command)


def run_training(settings: Train) -> None:
    """Trains, measures the scale, saves, grades what was saved, records."""
    trainer = AutoencoderTrainer(settings)
    trainer.train()
    trainer.leave_if_stopped()
    if not trainer.main:
        return
    save_part(with_measured_scale(trainer.averaged.vae, settings.seed), settings.output / "vae")
    vae = load_part(AutoencoderKL, settings.output / "vae", MAKE_VAE).to(trainer.device)
    rates = measured(vae, settings.grade, settings.seed + 1)
    trainer.record.metrics |= rates | {"scaling_factor": vae.config["scaling_factor"]}
    trainer.save_record()
    print(told(rates, vae))
    log(f"autoencoder: {settings.output / 'vae'}, record: {settings.run / 'record.json'}")


def run_grading(settings: Grade) -> None:
    """Prints how well pictures come back, and writes the record and a sheet."""
    check_numbers(settings, "count")
    machine = detect(settings.device)
    set_up("fp32", machine)
    record = Record(settings, machine)
    vae = load_part(AutoencoderKL, settings.parts / "vae", MAKE_VAE).to(machine.device)
    with record.timed("grading"):
        rates = measured(vae, settings.count, settings.seed)
    record.metrics = rates | {"scaling_factor": vae.config["scaling_factor"]}
    shown = [derived_seed(settings.seed, SHOWN, index) for index in range(8)]
    save_image(settings.output / "sheet.png", before_and_after(vae, pictures(shown, machine.device)))
    record.save(settings.output / "record.json")
    print(told(rates, vae))
    log(f"sheet and record: {settings.output}")


def told(rates: dict[str, float], vae: AutoencoderKL) -> str:
    """One line."""
    return (
        f"PSNR {rates['psnr']:.2f} dB (mean of the pictures' own {rates['psnr_per_picture']:.2f}, worst {rates['worst']:.2f}); "
        f"latents x {vae.config['scaling_factor']} have unit variance"
    )


if __name__ == "__main__":
    command: Any = Train | Grade  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
