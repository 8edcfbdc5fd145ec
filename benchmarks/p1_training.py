"""Training speed of P1 against the plain recipe, alternating in one process on networks of the same layout.

  python benchmarks/p1_training.py                       on hw2_data/digits
  python benchmarks/p1_training.py --data DIR --rounds 5 --steps 10
  python benchmarks/p1_training.py --preset large --precisions fp32 bf16 fp16 --compile off      precisions side by side

plain: images read one by one from PNG files, fp32 (TF32 off), eager, NCHW, Adam without fusion, loss read at every step,
       memory as the C library manages it.
ours:  the step of P1_training.py with its defaults for this machine.
A busy machine slows both alike. A way's first step in each round is not counted, nor are its first two of all, which compile.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal

import repository_root  # noqa: F401  # isort: split
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from benchmarks.plain_p1 import DigitFolder
from benchmarks.timing import BENCH, first_steps, ratios, report, resolved, seconds
from diffusion.loss import denoising_loss
from diffusion.schedule import Schedule, add_noise, make_schedule, target
from digits.recipes import RECIPES, TrainingRecipe
from P1_dataloader import BalancedIndex, load_digits, split_tables
from P1_model import DOMAINS, NO_DIGIT, NO_DOMAIN, PRESETS, ModelConfig, UNet
from runtime.cli import progress, run_script
from runtime.device import (
    AutoOnOff,
    Device,
    Machine,
    Precision,
    detect,
    keep_freed_memory,
    set_up,
    should_compile,
    to_channels_last,
)
from runtime.files import ROOT
from runtime.images import to_float
from runtime.record import Record
from training.cpu_layers import compile_network
from training.draws import Draws
from training.ema import Ema
from training.loop import LoopConfig, Trained, TrainingRun
from training.schedule import LearningRate

DROP_DIGIT, DROP_DOMAIN = 0.15, 0.1  # P1_training.py's defaults


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    data: Path = ROOT / "hw2_data" / "digits"
    """Folder with mnistm/ and svhn/."""
    preset: Literal["report", "tiny", "cpu", "gpu", "large"] = "cpu"
    steps: int = 8
    """Steps of each way per round."""
    rounds: int = 5
    """Rounds, in each of which every way takes its steps."""
    precisions: tuple[Precision, ...] = ("auto",)
    """Precisions of our step, each a way. auto = bf16 where the hardware has it, else fp16 on CUDA, else fp32."""
    compile: AutoOnOff = "auto"
    """torch.compile of our step. auto = on CUDA, and on CPUs with bf16."""
    device: Device = "auto"
    record: Path = BENCH / "p1_training.json"


def plain_step(
    data: Path, layout: ModelConfig, schedule: Schedule, batch: int, device: torch.device
) -> Callable[[], None]:
    """Return a function that takes one plain training step on a network of this layout."""
    unet = UNet(layout).to(device)
    optimizer = torch.optim.Adam(unet.parameters(), 1e-4, foreach=False, fused=False)
    alpha_bars = schedule.alpha_bar.float().to(device)
    sets = [DigitFolder(data / name, split_tables(data / name)["train"], domain) for domain, name in enumerate(DOMAINS)]
    loader: DataLoader[Any] = DataLoader(ConcatDataset(sets), batch, shuffle=True, drop_last=True)
    batches = chain.from_iterable(repeat(loader))

    def step() -> None:
        x0, digit, domain = (part.to(device) for part in next(batches))
        t = torch.randint(0, len(schedule), (len(x0),), device=device)
        eps = torch.randn_like(x0)
        alpha_bar = alpha_bars[t][:, None, None, None]
        output = unet(add_noise(x0, eps, alpha_bar), t, digit.argmax(1), domain.argmax(1))
        loss = (output - target(x0, eps, alpha_bar, schedule.prediction)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def our_step(
    settings: Settings, recipe: TrainingRecipe, schedule: Schedule, machine: Machine, precision: Precision, folder: Path
) -> Callable[[], None]:
    """Return a function that takes one step as P1_training.py does: the same data, random draws, loss, layers and update."""
    device = machine.device
    set_up(precision, machine, training=True)
    data = load_digits(settings.data, "train").to(device)
    index, alpha_bar = BalancedIndex(data, 0.5, True), schedule.alpha_bar.float().to(device)
    unet = to_channels_last(UNet(PRESETS[settings.preset]), device)
    ema = Ema(unet, recipe.ema)
    fused = device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(unet.parameters(), recipe.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
    if should_compile(settings.compile, machine):
        compile_network(unet, device)
    rate = LearningRate(recipe.lr, 200, 0.5)
    config = LoopConfig(
        "benchmark", folder, 10**9, recipe.batch, rate, max_grad_norm=1.0, save_every=0, show=False, precision=precision
    )
    run = TrainingRun(config, {}, Trained(unet, optimizer, ema), Record(settings, machine))
    steps = iter(run)

    def step() -> None:
        draws = Draws(0, next(steps), slice(recipe.batch), recipe.batch, device)
        rows = index(draws.uniform(), draws.uniform())
        digit = torch.where(draws.uniform() < DROP_DIGIT, NO_DIGIT, data.digits[rows])
        domain = torch.where(draws.uniform() < DROP_DOMAIN, NO_DOMAIN, data.domains[rows])
        x0, t = to_float(data.images[rows]), draws.timesteps(len(schedule))
        eps = draws.normal(*x0.shape[1:])

        def network(x: Tensor, t: Tensor) -> Tensor:
            output: Tensor = unet(x.contiguous(memory_format=torch.channels_last), t, digit, domain)
            return output

        with run.autocast():
            loss = denoising_loss(network, x0, eps, t, alpha_bar, recipe.prediction)
        run.update(loss)

    return step


def main(settings: Settings) -> None:
    """Print images per second of every way, mean and spread, and the ratios; on a GPU the peak memory too."""
    machine, recipe = detect(settings.device), RECIPES[settings.preset]
    device, layout = machine.device, PRESETS[settings.preset]
    kinds = resolved(settings.precisions, machine)
    schedule = make_schedule(recipe.schedule, layout.timesteps, recipe.prediction)
    record = Record(settings, machine)
    print(f"batches of {recipe.batch}, {machine.name}")
    with tempfile.TemporaryDirectory() as folder:
        precisions: dict[str, Precision] = {"plain": "fp32"}
        ways = {"plain": partial(plain_step, settings.data, layout, schedule, recipe.batch, device)}
        for kind in kinds:
            name = "ours" if len(kinds) == 1 else f"ours, {kind}"
            precisions[name] = kind
            ways[name] = partial(our_step, settings, recipe, schedule, machine, kind, Path(folder) / kind)
        steps = {name: first_steps(record, name, build) for name, build in ways.items()}

        speeds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in progress(range(settings.rounds), "rounds"):
            for name, step in steps.items():
                set_up(precisions[name], machine, training=name != "plain")
                keep_freed_memory(name != "plain")
                seconds(step, device)
                speeds[name].append(settings.steps * recipe.batch / seconds(step, device, settings.steps))
            for name, values in speeds.items():
                record.add_repeats({f"{name}, images/s": values})
                if name != "plain":
                    record.add_repeats({name.replace("ours", "times faster"): ratios(values, speeds["plain"])})
            record.save(settings.record)  # for a run that is stopped at its limit
    report(record, settings.record)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
