"""Composition at Stable Diffusion's own size: seconds per picture and, on a GPU, peak memory, against a plain guided picture.

  python benchmarks/p3_large.py                                   two concepts at 512x512, 25 steps; a GPU, or patience
  python benchmarks/p3_large.py --model runs/miniature/stable_diffusion --steps 5        a try on a CPU

The default model is Stable Diffusion v1 with random weights (plain_p3.py): time and memory don't depend on what it knows.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import repository_root  # noqa: F401  # isort: split
import torch
from torch import Tensor

from benchmarks.plain_p3 import save_random_v1
from concepts.composition.layout import Region, box_mask, make_layout
from concepts.composition.multipath import LayoutRequest, compose
from concepts.sampling import Request, SamplerConfig, StableDiffusionSampler
from concepts.stable_diffusion import load_pipeline
from diffusion.guidance import Guidance
from runtime.cli import check_positive, run_script
from runtime.device import Device, Precision, detect, set_up
from runtime.files import ROOT
from runtime.record import Record

LAYOUT = make_layout(
    "a photo of a dog next to a cat",
    [
        Region("dog", "a photo of a dog on the left", box_mask((0.05, 0.2, 0.45, 0.9))),
        Region("cat", "a photo of a cat on the right", box_mask((0.55, 0.2, 0.95, 0.9))),
    ],
    [],
    "a photo of a dog next to a cat",
)


@dataclass(frozen=True)
class Settings:
    """Flags."""

    model: str = "random-v1"
    """A folder, a file, or random-v1."""
    steps: int = 25
    repeats: int = 3
    device: Device = "auto"
    precision: Precision = "auto"
    record: Path = ROOT / "runs" / "bench" / "p3_large.json"


def main(bench: Settings) -> None:
    """Prints a line for each way and writes the record."""
    check_positive(bench, "steps", "repeats")
    machine = detect(bench.device)
    half = set_up(bench.precision, machine) == "bf16"
    with tempfile.TemporaryDirectory() as temporary:
        model = save_random_v1(Path(temporary)) if bench.model == "random-v1" else bench.model
        pipe = load_pipeline(model, machine.device, torch.bfloat16 if half else torch.float32)
    pipe.unet.to(memory_format=torch.channels_last)
    painter = StableDiffusionSampler(pipe, SamplerConfig("dpm", bench.steps, Guidance(7.5)))
    ways: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: painter.sample_images([Request(LAYOUT.joint, 0)]),
        "regional": lambda: compose(painter, [LayoutRequest(LAYOUT, 0)], "regional"),
        "conductor": lambda: compose(painter, [LayoutRequest(LAYOUT, 0)], "conductor"),
    }
    record = Record(bench, machine)
    plain = 0.0
    for name, way in ways.items():
        seconds, memory = measured(way, bench.repeats, machine.device)
        mean = statistics.mean(seconds)
        plain = plain or mean
        print(f"{name:<10}{mean:8.2f} s{mean / plain:8.2f}x" + (f"{memory:8.2f} GB" if memory else ""), flush=True)
        record.add_repeats({f"{name}, s": seconds} | ({f"{name}, GB": [memory]} if memory else {}))
        record.save(bench.record)


def measured(way: Callable[[], Tensor], repeats: int, device: torch.device) -> tuple[list[float], float | None]:
    """Return the seconds of each repeat after a warm-up, and on a GPU the peak memory in GB, weights included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        way()  # hands the picture over to the CPU, so that nothing is left in a queue
        seconds.append(time.perf_counter() - start)
    return seconds[1:], torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
