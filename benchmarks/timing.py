"""What the benchmarks share: times, peak memory, ratios, and the report of what was measured."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch

from runtime.cli import log
from runtime.device import Machine, Precision, resolve_precision
from runtime.files import ROOT
from runtime.record import Record

BENCH = ROOT / "runs" / "bench"
Result = TypeVar("Result")


def timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Return the wall time of one call in seconds, a GPU's queue drained before and after, and the call's result."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def seconds(work: Callable[[], object], device: torch.device, count: int = 1) -> float:
    """Return the wall time of `count` calls in a row, in seconds."""
    return timed(lambda: [work() for _ in range(count)], device)[0]


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done its work; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device, reset: bool = False) -> float:
    """Return the peak GB since the last reset: of the GPU, or of the whole process on a CPU (nan except on Linux).

    `reset` resets it first and returns what is in use now.
    """
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 1e9
    status, switch = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not switch.exists():
        return float("nan")
    if reset:
        if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
            library.malloc_trim(0)  # memory that the C library keeps would not count again
        switch.write_text("5")
    (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak) * 1024 / 1e9


def first_steps(record: Record, name: str, build: Callable[[], Callable[[], None]]) -> Callable[[], None]:
    """Build a step, call it twice and return it. On a GPU, add the peak GB of building and both calls to the record."""
    device = record.machine.device
    before = peak_memory(device, reset=True)
    step = build()
    log(f"{name}: first two steps took {seconds(step, device, 2):.1f} s")
    if device.type == "cuda":
        record.add_repeats({f"{name}, GB": [peak_memory(device) - before]})
    return step


def resolved(precisions: Sequence[Precision], machine: Machine) -> list[Precision]:
    """Return the precisions, each once, with auto replaced by this machine's."""
    return [*dict.fromkeys(cast(Precision, resolve_precision(precision, machine)) for precision in precisions)]


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Return slow / fast of every repeat."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def report(record: Record, path: Path) -> None:
    """Print mean +- standard deviation (n = repeats) of every measurement, and write the record."""
    for name, values in record.metrics["repeats"].items():
        spread = f" +- {statistics.pstdev(values):.2g} (n = {len(values)})" if len(values) > 1 else ""
        print(f"{name:50s} {statistics.mean(values):.4g}{spread}")
    record.save(path, name_it=True)
