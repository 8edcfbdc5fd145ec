"""Training speed of P1 against the plain recipe, side by side in one run on the same network.

  python benchmarks/p1_training.py                       on hw2_data/digits
  python benchmarks/p1_training.py --data DIR --rounds 5 --steps 10

plain: pictures read one by one from PNG files, fp32 (TF32 off), eager, NCHW, Adam without fusion, loss read at every step, memory as
       the C library manages it.
ours:  the step of P1_training.py with its defaults for this machine.
The rounds alternate, so that a busy machine hurts both alike; the first step of each, which finds memory as the other left it, doesn't
count. Compiling, where it is used, is reported apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import repository_root  # noqa: F401  # isort: split
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from diffusion.schedule import add_noise, target
from P1_dataloader import DigitFolder, split_tables
from P1_model import DOMAINS, PRESETS, UNet
from P1_training import Settings, Trainer
from runtime.cli import log, progress, run_script
from runtime.device import Device, keep_freed_memory, set_up
from runtime.files import ROOT
from runtime.record import Record


@dataclass(frozen=True)
class Args:
    """Flags."""

    data: Path = ROOT / "hw2_data" / "digits"
    preset: Literal["report", "tiny", "cpu", "gpu"] = "cpu"
    steps: int = 8
    """Steps per round."""
    rounds: int = 5
    device: Device = "auto"
    output: Path = ROOT / "runs" / "bench" / "p1_training.json"


def plain_batches(data: Path, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches from the folder reader, for ever: images, one-hot digits, one-hot domains."""
    sets = [DigitFolder(data / name, split_tables(data / name)["train"], domain) for domain, name in enumerate(DOMAINS)]
    loader: DataLoader[tuple[Tensor, Tensor, Tensor]] = DataLoader(
        ConcatDataset(sets), batch, shuffle=True, drop_last=True
    )
    while True:
        yield from loader


def plain_step(trainer: Trainer) -> Callable[[], None]:
    """The textbook step on a network of the same layout."""
    problem, device = trainer.problem, trainer.device
    unet = UNet(PRESETS[trainer.preset]).to(device)
    optimizer = torch.optim.Adam(unet.parameters(), 1e-4, foreach=False, fused=False)
    batches = plain_batches(trainer.settings.data, trainer.recipe.batch)

    def step() -> None:
        x0, digit, domain = (part.to(device) for part in next(batches))
        t = torch.randint(0, len(problem.schedule), (len(x0),), device=device)
        eps = torch.randn_like(x0)
        alpha = problem.alphas[t][:, None, None, None]
        output = unet(add_noise(x0, eps, alpha), t, digit.argmax(1), domain.argmax(1))
        loss = (output - target(x0, eps, alpha, problem.schedule.prediction)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def seconds(step: Callable[[], object], count: int, device: torch.device) -> float:
    """Wall time of `count` steps, the device's queue drained."""
    start = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main(bench: Args) -> None:
    """Prints images per second of both, mean and spread, and the ratio."""
    settings = Settings(
        data=bench.data, output=ROOT / "runs" / "bench" / "p1", preset=bench.preset, device=bench.device, resume="never"
    )
    trainer = Trainer(settings)
    steps = {"plain": plain_step(trainer), "ours": trainer.one_step}
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        log(f"{name}: first two steps took {seconds(step, 2, trainer.device):.1f} s")
    for _ in progress(range(bench.rounds), "rounds"):
        for name, step in steps.items():
            set_up("fp32" if name == "plain" else settings.precision, trainer.machine, name == "ours")
            keep_freed_memory(name == "ours")
            seconds(step, 1, trainer.device)
            taken = seconds(step, bench.steps, trainer.device)
            speeds[name].append(bench.steps * trainer.recipe.batch / taken)
    ratios = [ours / plain for ours, plain in zip(speeds["ours"], speeds["plain"], strict=True)]
    for name, values in (*speeds.items(), ("ratio", ratios)):
        print(f"{name:6s} {statistics.mean(values):8.2f} +- {statistics.pstdev(values):.2f}  (n = {len(values)})")
    record = Record(bench, trainer.machine)
    record.metrics = {"images_per_s": speeds, "ratio": ratios, "batch": trainer.recipe.batch}
    record.save(bench.output)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
