"""Show what this machine has: device, bf16, compiler, data, weights, and how long sampling and training take here.

python doctor.py        (or: make doctor)
"""

from __future__ import annotations

import runtime.interrupts  # noqa: F401

# isort: split
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from digits.recipes import RECIPES
from digits.sampling import CHECKPOINT, DigitSampler, DigitSamplerConfig
from P1_model import PRESETS, UNet, load_network
from runtime.cli import BadInput, run_script
from runtime.device import (
    AutoOnOff,
    Device,
    Machine,
    autocast,
    detect,
    resolve_precision,
    set_up,
    should_compile,
    to_channels_last,
)
from runtime.files import ROOT
from runtime.record import versions
from training.cpu_layers import compile_network

DATA = ("digits/mnistm", "digits/svhn", "face/UNet.pt", "face/noise", "clip_zeroshot/val", "textual_inversion")
WEIGHTS = {
    "p1_digits": "p1_digits.safetensors",
    "judge_mnistm": "judge_mnistm.safetensors",
    "judge_svhn": "judge_svhn.safetensors",
    "miniature/faces": "miniature/faces/unet/diffusion_pytorch_model.safetensors",
    "miniature/clip": "miniature/clip/open_clip_model.safetensors",
    "miniature/diffusion": "miniature/stable_diffusion/unet/diffusion_pytorch_model.safetensors",
}


@dataclass(frozen=True)
class Settings:
    """Settings of the doctor."""

    data: Path = ROOT / "hw2_data"
    """Folder of the course's data."""
    device: Device = "auto"
    compile: AutoOnOff = "auto"
    """torch.compile in the measured training; compiling takes a minute. auto = as P1_training.py does on this machine."""


def unusable_gpu() -> str:
    """Return the name of this machine's NVIDIA GPU and why torch can't use it, in one line; "" without a GPU or a problem."""
    if not shutil.which("nvidia-smi"):
        return ""
    gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=60).stdout
    names = [line.split(":", 1)[1].split("(UUID")[0].strip() for line in gpus.splitlines() if line.startswith("GPU ")]
    if not names:
        return ""
    if torch.version.cuda is None:
        return f"{names[0]}: torch {torch.__version__} is built without CUDA; install one from pytorch.org that has it"
    try:
        torch.ones(1, device="cuda").add(1).item()
    except RuntimeError as error:  # too old a driver, or no kernels for this GPU in this torch
        return f"{names[0]}: {str(error).strip().splitlines()[0]}"
    return ""


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the mean seconds of three calls, after one to warm up."""
    for repeat in range(4):
        if repeat == 1:
            start = time.perf_counter()
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / 3


def training_minutes(machine: Machine, preset: str, compiled: bool) -> float:
    """Estimate the minutes of a P1 training from three measured steps, of at most 16 images each on a CPU."""
    recipe, device = RECIPES[preset], machine.device
    precision = set_up("auto", machine, training=True)
    unet = to_channels_last(UNet(PRESETS[preset]), device)
    if compiled:
        compile_network(unet, device)
    batch = recipe.batch if device.type == "cuda" else min(16, recipe.batch)
    x = torch.randn(batch, 3, 28, 28, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.long, device=device)

    def step() -> None:
        with autocast(device, precision):
            loss = unet(x, labels, labels, labels).float().square().mean()
        loss.backward()

    return seconds(step, device) / batch * recipe.batch * recipe.steps / 60


@torch.inference_mode()
def face_minutes(machine: Machine) -> float:
    """Estimate the minutes of `bash hw2_2.sh` for ten images of 50 steps, from the time of one layer of the network.

    It is the most frequent layer. The whole network takes 496 GFLOP per image and step.
    """
    x = torch.randn(1, 128, 256, 256, device=machine.device).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(128, 128, 3, 3, device=machine.device)
    layer = 2 * 128 * 128 * 9 * 256**2 / 1e9  # GFLOP
    return seconds(lambda: F.conv2d(x, kernel, padding=1), machine.device) / layer * 496 * 10 * 50 / 60


def main(settings: Settings) -> None:
    """Print the machine, the files and the times."""
    unusable = unusable_gpu()
    machine = detect("cpu" if unusable and settings.device == "auto" else settings.device)
    precision = resolve_precision("auto", machine)
    print(f"device   {machine.device}: {machine.name}")
    if unusable:
        print(f"gpu      not usable: {unusable}")
    print(f"bf16     {'native' if machine.native_bf16 else f'not native: {precision} is used'}")
    print(f"compiler {'found: torch.compile is used where it pays' if machine.compiler else 'none: eager only'}")
    print("packages " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    for name in DATA:
        present = (settings.data / name).exists()
        print(f"data     {name:24s}{'found' if present else 'absent (hw2_data/README.md says how to get it)'}")
    for name, file in WEIGHTS.items():
        path = ROOT / "checkpoints" / file
        print(f"weights  {name:24s}{f'{path.stat().st_size / 1e6:.1f} MB' if path.is_file() else 'absent'}")

    preset = "gpu" if machine.device.type == "cuda" else "cpu"
    compiled = should_compile(settings.compile, machine, worthwhile=RECIPES[preset].steps >= machine.compile_steps)
    set_up("auto", machine)
    print("\nexpected on this machine (measured on a few steps just now):")
    try:
        network = load_network(CHECKPOINT, machine.device)
        sampler = DigitSampler(network, DigitSamplerConfig.from_dict(network.sampler), 1000 if preset == "gpu" else 100)
        with autocast(machine.device, precision):
            minutes = sampler.expected_seconds(1000) / 60
        print(f"  bash hw2_1.sh out               {minutes:8.1f} minutes")
    except BadInput as error:
        print(f"  bash hw2_1.sh out               not possible: {error}")
    print(f"  bash hw2_2.sh, 10 noises        {face_minutes(machine):8.0f} minutes (fp32, from one layer's time)")
    training = f"preset {preset}, {precision}, {'compiled' if compiled else 'eager'}"
    minutes = training_minutes(machine, preset, compiled)
    print(f"  python P1_training.py           {minutes:8.0f} minutes ({training})")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
