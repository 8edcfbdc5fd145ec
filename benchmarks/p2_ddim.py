"""Speed and memory of P2 on the course's face network: ours, all images at once, against one image at a time in plain fp32.

  python benchmarks/p2_ddim.py                          CPU: 2 images x 3 steps, about 5 minutes on two cores; GPU: 10 x 50
  python benchmarks/p2_ddim.py --unet face/UNet.pt      the course's weights in the place of random, well-conditioned ones

Baseline: benchmarks/plain_p2.py, the network and the rule as described, eager, TF32 off for convolutions too.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import repository_root  # noqa: F401  # isort: split
import torch
from torch import Tensor

from benchmarks.plain_p2 import PlainFaceUNet, plain_homework_ddim, well_conditioned_weights
from benchmarks.timing import BENCH, peak_memory, ratios, report, seconds, timed
from diffusion.step_rules import step_rule
from faces.models import load_model
from faces.noises import Noise, seeded_noises
from faces.sampling import DdimConfig, compare, sample_all, to_image
from runtime.cli import check_positive, log, run_script
from runtime.device import DTYPES, Device, Machine, allow_tf32, detect, keep_freed_memory, set_up
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


def side_by_side(
    source: Path, kind: Kind, noises: list[Noise], steps: int, repeats: int, machine: Machine
) -> dict[str, list[float]]:
    """Return the measurements of baseline and ours, in turn after a warm-up of one step each, and how their images differ."""
    device = machine.device
    plain = PlainFaceUNet().to(device).eval()
    plain.load_state_dict(load_tensors(source))
    model = load_model(str(source), device, DTYPES[kind])

    @torch.inference_mode()
    def baseline(steps: int = steps) -> list[Tensor]:
        allow_tf32(False)
        keep_freed_memory(False)
        return [plain_homework_ddim(plain, noise.x[None].to(device), steps)[0].cpu() for noise in noises]

    def ours(steps: int = steps) -> list[Tensor]:
        set_up(kind, machine)
        config = DdimConfig(step_rule("homework", len(model.schedule), steps), 0.0, 0)
        return [image for _, image in sample_all(model, noises, config, len(noises), "ours")]

    results: dict[str, list[float]] = {}
    images: dict[str, list[Tensor]] = {}
    baseline(1)
    ours(1)
    for repeat in range(repeats):
        log(f"{kind}: repeat {repeat + 1} of {repeats}")
        for name, way in (("baseline", baseline), ("ours", ours)):
            weights = peak_memory(device, reset=True)
            time, images[name] = timed(way, device)
            results.setdefault(f"{name}, s", []).append(time)
            results.setdefault(f"{name}, GB", []).append(peak_memory(device) - weights)
    graded = zip(images["ours"], images["baseline"], strict=True)
    differences = [compare(to_image(a, "minmax"), to_image(b, "minmax")) for a, b in graded]
    return results | {
        "times faster": ratios(results["baseline, s"], results["ours, s"]),
        "MSE on 0..255": [statistics.mean(difference["mse"] for difference in differences)],
        "largest difference on 0..255": [max(difference["largest"] for difference in differences)],
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
    kinds: tuple[Kind, ...] = ("fp32", "tf32", "bf16") if on_gpu else ("fp32", "bf16")
    without: tuple[Kind, ...] = ("fp32", "fp16") if on_gpu else ("fp32",)
    kinds = settings.precisions or (kinds if machine.native_bf16 else without)
    record = Record(settings, machine)

    with tempfile.TemporaryDirectory() as folder:
        source = settings.unet or Path(folder) / "UNet.pt"
        if not settings.unet:
            torch.save(well_conditioned_weights(0), source)
        noises = seeded_noises(range(count), load_model(str(source), torch.device("cpu"), torch.float32), settings.size)
        weights = settings.unet or "random weights"
        print(f"{count} images of {settings.size}x{settings.size}, {steps} steps, {weights}, {machine.name}")
        ceiling = matmul_ceiling(device) if on_gpu else 0.0

        for kind in kinds:
            results = side_by_side(source, kind, noises, steps, settings.repeats, machine)
            if on_gpu and kind == "bf16" and settings.size == 256:
                shares = [count * steps * GFLOP / 1e3 / time / ceiling for time in results["ours, s"]]
                results[f"share of the {ceiling:.0f} TFLOP/s of a large matrix multiplication"] = shares
            record.add_repeats({f"{kind}: {name}": values for name, values in results.items()})
            record.save(settings.record)
    report(record, settings.record)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
