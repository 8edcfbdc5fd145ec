"""Speed and memory of P2 on the course's face network: ours, all images at once, against one image at a time in plain fp32.

  python benchmarks/p2_ddim.py                          CPU: 2 images x 3 steps, about 5 minutes on two cores; GPU: 10 x 50
  python benchmarks/p2_ddim.py --unet hw2_data/face/UNet.pt      the course's weights instead of random, well-conditioned ones

Baseline: benchmarks/plain_p2.py, a plain version of the network and of the course's DDIM rule, eager, TF32 off for convolutions too.
The images of every precision are compared with the baseline's.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import repository_root  # noqa: F401  # isort: split
import torch
from torch import Tensor

from benchmarks.plain_p2 import PlainFaceUNet, plain_homework_ddim, well_conditioned_weights
from benchmarks.timing import BENCH, peak_memory, ratios, report, seconds, timed
from diffusion.step_rules import step_rule
from faces.models import Model, load_model
from faces.noises import Noise, seeded_noises
from faces.sampling import DdimConfig, compare, sample_all, to_image
from runtime.cli import check_positive, log, run_script
from runtime.device import DTYPES, Device, allow_tf32, detect, keep_freed_memory, set_up
from runtime.files import load_tensors
from runtime.record import Record

GFLOP = 496.0  # per 256x256 image and step
Kind = Literal["fp32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    unet: Path | None = None
    """UNet.pt. None = random weights that stay stable over the steps."""
    count: int = 0
    """Images. 0 = 2 on a CPU, 10 on a GPU."""
    steps: int = 0
    """Network calls per image. 0 = 3 on a CPU, 50 on a GPU."""
    size: int = 256
    """Height and width in pixels."""
    repeats: int = 3
    precisions: tuple[Kind, ...] | None = None
    """Precisions of our way. None = those that the device has in hardware."""
    device: Device = "auto"
    record: Path = BENCH / "p2_ddim.json"


def side_by_side(source: Path, kinds: Sequence[Kind], noises: list[Noise], steps: int, record: Record) -> None:
    """Add seconds and GB, beyond the weights, of the baseline and of ours in every `kind` of precision to the record.

    Add also how our images differ from the baseline's. The ways take turns after a warm-up of one step each.
    The record is saved after every turn, for a run that is stopped.
    """
    machine, device = record.machine, record.machine.device
    plain = PlainFaceUNet().to(device).eval()
    plain.load_state_dict(load_tensors(source))

    @torch.inference_mode()
    def baseline(steps: int = steps) -> list[Tensor]:
        allow_tf32(False)
        keep_freed_memory(False)
        return [plain_homework_ddim(plain, noise.x[None].to(device), steps)[0].cpu() for noise in noises]

    def ours(kind: Kind, model: Model, steps: int = steps) -> list[Tensor]:
        set_up(kind, machine)
        config = DdimConfig(step_rule("homework", len(model.schedule), steps), 0.0, 0)
        return [image for _, image in sample_all(model, noises, config, len(noises), kind)]

    ways: dict[str, Callable[..., list[Tensor]]] = {"baseline": baseline}
    ways |= {kind: partial(ours, kind, load_model(str(source), device, DTYPES[kind])) for kind in kinds}
    times: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(steps=1)
    for repeat in range(record.settings.repeats):
        for name, way in ways.items():
            log(f"{name}: repeat {repeat + 1} of {record.settings.repeats}")
            weights = peak_memory(device, reset=True)
            time, images = timed(way, device)
            times[name].append(time)
            memory[name].append(peak_memory(device) - weights)
            record.add_repeats({f"{name}, s": times[name], f"{name}, GB": memory[name]})
            if name == "baseline":
                expected = images
            else:
                record.add_repeats({f"{name}, times faster": ratios(times["baseline"], times[name])})
                record.add_repeats(
                    {f"{name}, {what}": [value] for what, value in differences(images, expected).items()}
                )
            record.save(record.settings.record)


def differences(images: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Return the mean squared error and the largest difference of images from the expected ones, each scaled to 0..255 by its range."""
    pairs = zip(images, expected, strict=True)
    rows = [compare(to_image(a, "minmax"), to_image(b, "minmax")) for a, b in pairs]
    return {
        "MSE on 0..255": statistics.mean(row["mse"] for row in rows),
        "largest difference on 0..255": max(row["largest"] for row in rows),
    }


def matmul_ceiling(device: torch.device) -> float:
    """Return the TFLOP/s of a large bf16 matrix multiplication."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    seconds(lambda: a @ a, device, 3)
    return 20 * 2 * 8192**3 / seconds(lambda: a @ a, device, 20) / 1e12


def main(settings: Settings) -> None:
    """Print the measurements of every precision."""
    check_positive(settings, "size", "repeats")
    machine = detect(settings.device)
    device, on_gpu = machine.device, machine.device.type == "cuda"
    count, steps = settings.count or (10 if on_gpu else 2), settings.steps or (50 if on_gpu else 3)
    native: tuple[Kind, ...] = ("fp32", "tf32", "bf16", "fp16") if on_gpu else ("fp32", "bf16")
    without: tuple[Kind, ...] = ("fp32", "fp16") if on_gpu else ("fp32",)
    kinds = settings.precisions or (native if machine.native_bf16 else without)
    record = Record(settings, machine)

    with tempfile.TemporaryDirectory() as folder:
        source = settings.unet or Path(folder) / "UNet.pt"
        if not settings.unet:
            torch.save(well_conditioned_weights(0), source)
        noises = seeded_noises(range(count), load_model(str(source), torch.device("cpu"), torch.float32), settings.size)
        weights = settings.unet or "random weights"
        print(f"{count} images of {settings.size}x{settings.size}, {steps} steps, {weights}, {machine.name}")
        side_by_side(source, kinds, noises, steps, record)
    if on_gpu and "bf16" in kinds and settings.size == 256:
        ceiling = matmul_ceiling(device)
        times = record.metrics["repeats"]["bf16, s"]
        shares = [count * steps * GFLOP / 1e3 / time / ceiling for time in times]
        record.add_repeats({f"bf16, share of the {ceiling:.0f} TFLOP/s of a large matrix multiplication": shares})
    report(record, settings.record)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
