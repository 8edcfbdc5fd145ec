"""Speed and memory of P2 on the course's face network: ours, all pictures at once, against one picture at a time in plain fp32.

  python benchmarks/p2_ddim.py                          CPU: 2 pictures x 3 steps, about 5 minutes on two cores; GPU: ten x 50
  python benchmarks/p2_ddim.py --unet face/UNet.pt      the course's weights instead of random, well-conditioned ones

Baseline: benchmarks/plain_p2.py, the network and the rule as described, eager, TF32 off for convolutions too.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import repository_root  # noqa: F401  # isort: split
import torch
from torch import Tensor

from benchmarks.plain_p2 import PlainFaceUNet, plain_homework_ddim, well_conditioned_weights
from diffusion.steps import step_rule
from faces.models import Model, load_model
from faces.noises import Noise, seeded_noises
from faces.sampling import DdimConfig, compare, sample_all, to_image
from runtime.cli import log, run_script
from runtime.device import Device, Machine, allow_tf32, detect, keep_freed_memory, set_up
from runtime.files import ROOT, load_tensors
from runtime.record import Record

GFLOP = 496.0  # per picture of 256x256 and step
Kind = Literal["fp32", "tf32", "bf16"]


@dataclass(frozen=True)
class Settings:
    """Flags."""

    unet: Path | None = None
    """UNet.pt; None: random weights that stay stable over the steps."""
    count: int | None = None
    """Pictures; None: 2 on a CPU, 10 on a GPU."""
    steps: int | None = None
    """None: 3 on a CPU, 50 on a GPU."""
    size: int = 256
    repeats: int = 3
    precisions: tuple[Kind, ...] | None = None
    """None: what the device has in hardware."""
    device: Device = "auto"
    record: Path = ROOT / "runs" / "bench" / "p2_ddim.json"


@torch.inference_mode()
def one_at_a_time(network: PlainFaceUNet, noises: Sequence[Noise], steps: int, device: torch.device) -> Tensor:
    """[N,3,H,W] float32 on the CPU."""
    return torch.cat([plain_homework_ddim(network, noise.x[None].to(device), steps).cpu() for noise in noises])


def ours(model: Model, noises: Sequence[Noise], steps: int) -> Tensor:
    """The same by P2_ddim.py's own loop, all at once."""
    recipe = DdimConfig(step_rule("homework", len(model.schedule), steps), 0.0, 0)
    return torch.stack([image for _, image in sample_all(model, noises, recipe, len(noises), "ours")])


def measured(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float, float]:
    """(pictures, seconds, GB that the work took at its peak beyond what was there; nan where that can't be told)."""
    before = memory(device, reset=True)
    start = time.perf_counter()
    images = work()
    return images, time.perf_counter() - start, memory(device) - before


def memory(device: torch.device, reset: bool = False) -> float:
    """The largest GB since the last reset: of the GPU, or of the whole process on a CPU (Linux, else nan)."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 1e9
    status, switch = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not switch.exists():
        return float("nan")
    if reset:
        switch.write_text("5")
    found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(found[0]) * 1024 / 1e9


def matmul_ceiling(device: torch.device) -> float:
    """TFLOP/s of a large bf16 matrix multiplication."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(20):
        a @ a
    torch.cuda.synchronize(device)
    return 20 * 2 * 8192**3 / (time.perf_counter() - start) / 1e12


def grey(images: Tensor) -> list[Tensor]:
    """8-bit pictures by min-max, as they are graded."""
    return [to_image(image, "minmax") for image in images]


def difference(images: Tensor, reference: Tensor) -> dict[str, float]:
    """Mean MSE and largest difference of the 8-bit pictures."""
    rows = [compare(a, b) for a, b in zip(grey(images), grey(reference), strict=True)]
    return {"mse": statistics.mean(row["mse"] for row in rows), "largest": max(row["largest"] for row in rows)}


def available(machine: Machine) -> tuple[Kind, ...]:
    """The precisions that the device has in hardware."""
    if machine.device.type == "cuda":
        return ("fp32", "tf32", "bf16")
    return ("fp32", "bf16") if machine.native_bf16 else ("fp32",)


def run(bench: Settings, machine: Machine, source: Path, kind: Kind, noises: list[Noise], steps: int) -> dict[str, Any]:
    """Baseline and ours in turn, `repeats` times after a warm-up of one step each."""
    plain = PlainFaceUNet().to(machine.device).eval()
    plain.load_state_dict(load_tensors(source))
    model = load_model(str(source), machine.device, torch.bfloat16 if kind == "bf16" else torch.float32)

    def baseline() -> Tensor:
        allow_tf32(False)
        keep_freed_memory(False)
        return one_at_a_time(plain, noises, steps, machine.device)

    def quick() -> Tensor:
        set_up(kind, machine)
        return ours(model, noises, steps)

    one_at_a_time(plain, noises[:1], 1, machine.device)
    ours(model, noises, 1)
    rows = []
    for repeat in range(bench.repeats):
        log(f"{kind}: repeat {repeat + 1} of {bench.repeats}")
        slow, baseline_s, baseline_gb = measured(baseline, machine.device)
        fast, ours_s, ours_gb = measured(quick, machine.device)
        rows.append({"baseline_s": baseline_s, "ours_s": ours_s, "baseline_gb": baseline_gb, "ours_gb": ours_gb})
    return {"rows": rows, "ratio": [row["baseline_s"] / row["ours_s"] for row in rows], **difference(fast, slow)}


def show(kind: str, found: dict[str, Any], pictures: int, steps: int, ceiling: float | None) -> None:
    """One paragraph per precision."""
    seconds = statistics.mean(row["ours_s"] for row in found["rows"])
    baseline = statistics.mean(row["baseline_s"] for row in found["rows"])
    before, after = (max(row[key] for row in found["rows"]) for key in ("baseline_gb", "ours_gb"))
    print(f"{kind}: {baseline:.1f} s one at a time, {seconds:.1f} s ours, ratio {spread(found['ratio'])}")
    print(f"      working memory at its peak, weights apart: {before:.2f} GB one at a time, {after:.2f} GB ours")
    print(f"      8-bit pictures against the baseline: mean MSE {found['mse']:.4f}, largest {found['largest']:.0f}")
    if ceiling and kind == "bf16":
        share = pictures * steps * GFLOP / 1e3 / seconds / ceiling
        print(f"      {share:.0%} of the {ceiling:.0f} TFLOP/s that a large bf16 matrix multiplication reaches")


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the repeats."""
    return f"{statistics.mean(values):.2f} +- {statistics.pstdev(values):.2f} (n = {len(values)})"


def main(bench: Settings) -> None:
    """Prints the table, writes the record."""
    machine = detect(bench.device)
    on_gpu = machine.device.type == "cuda"
    count, steps = bench.count or (10 if on_gpu else 2), bench.steps or (50 if on_gpu else 3)
    record = Record(bench, machine)
    with tempfile.TemporaryDirectory() as folder:
        source = bench.unet or Path(folder) / "UNet.pt"
        if not bench.unet:
            torch.save(well_conditioned_weights(0), source)
        shape_of = load_model(str(source), torch.device("cpu"), torch.float32)
        noises = seeded_noises(range(count), shape_of, bench.size)
        print(
            f"{count} pictures of {bench.size}x{bench.size}, {steps} steps, {bench.unet or 'random weights'}, {machine.name}"
        )
        ceiling = matmul_ceiling(machine.device) if on_gpu else None
        for kind in bench.precisions or available(machine):
            result = run(bench, machine, source, kind, noises, steps)
            show(kind, result, count, steps, ceiling)
            names = ("baseline_s", "ours_s", "baseline_gb", "ours_gb")
            record.add_repeats({f"{kind}: {name}": [row[name] for row in result["rows"]] for name in names})
            record.add_repeats({f"{kind}: times faster": result["ratio"]})
            record.add_repeats({f"{kind}: MSE on 0..255": [result["mse"]]})
            record.save(bench.record)
    record.metrics["matmul_tflops"] = ceiling
    record.save(bench.record)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
