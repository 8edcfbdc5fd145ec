"""Draws digits of both domains from a P1 checkpoint, named and laid out for the grader: out/mnistm/0_001.png .. out/svhn/9_050.png.

  python P1_inference.py --output out                the 1,000 graded pictures
  python P1_inference.py --output out --digits 3 7 --domains svhn --count 5 --guidance 1 --grid sevens.png
  python P1_inference.py --output out --dry-run      checks everything, says how long it will take, draws nothing
  torchrun --nproc_per_node 4 P1_inference.py --output out      four GPUs share the pictures (accelerate launch works as well)

Guidance: uncond + scale * (cond - uncond), where uncond knows the domain but not the digit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffusion.steps import Rule, step_rule
from digits.classifier import DigitClassifier, shipped_classifiers
from digits.sampling import (
    CHECKPOINT,
    DigitRequest,
    DigitSamplerConfig,
    expected_seconds,
    graded_requests,
    redraw,
    sample_all,
    steps_of,
)
from P1_model import DOMAINS, Network, load_network
from runtime.cli import BadInput, check_fractions, log, run_script
from runtime.device import Device, Precision, detect, set_up
from runtime.distributed import Shard, sharing
from runtime.files import ROOT, check_disk_space, check_writable_file, check_writable_folder, output_folder
from runtime.images import image_grid, save_image, to_uint8
from runtime.record import Record

# ---------------------------------------------------------------- the command


@dataclass(frozen=True)
class Settings:
    """Flags; sampler flags that are left out come from the checkpoint."""

    output: Path
    """Folder for mnistm/ and svhn/; files of the same names are replaced, others stay."""
    checkpoint: Path = CHECKPOINT
    """safetensors file written by P1_training.py (best.safetensors) or shipped."""
    count: int = 50
    """Pictures per digit and domain."""
    digits: tuple[int, ...] = tuple(range(10))
    domains: tuple[Literal["mnistm", "svhn"], ...] = ("mnistm", "svhn")
    sampler: Literal["dpm", "ddim", "ddpm"] | None = None
    """dpm: DPM-Solver++ in few steps; ddim: any eta and rule; ddpm: all T steps."""
    steps: int | None = None
    guidance: float | None = None
    """scale in uncond + scale * (cond - uncond); 1 is no guidance and costs half."""
    interval: tuple[float, float] | None = None
    """Guidance acts only at noise levels start <= t/T < end."""
    guidance_rescale: float | None = None
    """0..1: pulls the guided contrast back to the unguided one's."""
    eta: float | None = None
    """Randomness of ddim: 0 none, 1 as much as ddpm."""
    rule: Rule | None = None
    """Step rule of ddim."""
    retries: int = 3
    """A picture that the shipped judge misreads is drawn again with another seed, at most so often;
    0 shows what the network alone does."""
    seed: int = 0
    batch: int = 0
    """Pictures at once; 0: 100 on a CPU, 1,000 on a GPU."""
    device: Device = "auto"
    precision: Precision = "auto"
    grid: Path | None = None
    """Also saves all pictures as one PNG: a row per domain and digit."""
    record: Path = ROOT / "runs" / "p1_inference" / "record.json"
    dry_run: bool = False
    """Check checkpoint, judges, disk and time, then stop."""


def resolve_sampler(settings: Settings, network: Network) -> DigitSamplerConfig:
    """The checkpoint's sampler with the flags that were given; raises BadInput for impossible numbers."""
    names = {f.name: f.name for f in fields(DigitSamplerConfig)} | {"name": "sampler", "rescale": "guidance_rescale"}
    given = {k: v for k, flag in names.items() if (v := getattr(settings, flag)) is not None}
    sampler = replace(DigitSamplerConfig.from_dict(network.sampler), **given)
    check_fractions(sampler, "eta")
    check_fractions(settings, "guidance_rescale")
    if not math.isfinite(sampler.guidance):
        raise BadInput(f"--guidance {sampler.guidance}: must be a finite number")
    low, high = sampler.interval
    if not 0 <= low <= high <= 1:
        raise BadInput(f"--interval {low} {high}: give two fractions of T, the lower one first")
    try:
        step_rule(sampler.rule, len(network.schedule), sampler.steps)
    except ValueError as error:
        raise BadInput(f"--steps: {error}") from None
    return sampler


def check(settings: Settings) -> None:
    """Raises BadInput for counts, digits and batches that ask for nothing, and for places where nothing can be written."""
    if settings.count < 1:
        raise BadInput(f"--count {settings.count}: no pictures asked for")
    for flag, values in (("--digits", settings.digits), ("--domains", settings.domains)):
        if not values:
            raise BadInput(f"{flag} names none: no pictures asked for")
    if settings.count > 999:
        raise BadInput(f"--count {settings.count}: names have three digits, at most 999 each")
    if any(not 0 <= digit <= 9 for digit in settings.digits):
        raise BadInput(f"--digits {' '.join(map(str, settings.digits))}: must be 0..9")
    if settings.retries < 0:
        raise BadInput(f"--retries {settings.retries}: must be 0 or more")
    if settings.batch < 0:
        raise BadInput(f"--batch {settings.batch}: must be above zero, or 0 for automatic")
    check_writable_file(settings.record, "--record")
    if settings.grid:
        check_writable_file(settings.grid, "--grid")


def file_names(settings: Settings) -> list[Path]:
    """Where each picture goes, in the order of `graded_requests`: {domain}/{digit}_{001..}.png."""
    return [
        settings.output / domain / f"{digit}_{index:03d}.png"
        for domain in settings.domains
        for digit in settings.digits
        for index in range(1, settings.count + 1)
    ]


def warn_extra_files(names: Sequence[Path]) -> None:
    """One line if the folders hold anything that this run doesn't write."""
    ours = set(names)
    folders = sorted({name.parent for name in names})
    foreign = sorted(p for f in folders if f.is_dir() for p in f.iterdir() if p not in ours)
    if foreign:
        log(f"warning: {len(foreign)} other file(s) in the output are left alone, such as {foreign[0]}")


def dry_run(settings: Settings, network: Network, sampler: DigitSamplerConfig, count: int, batch: int) -> None:
    """Prints what would happen; raises BadInput where the disk is too small or the judges are missing."""
    shipped_classifiers(next(network.unet.parameters()).device)
    check_writable_folder(settings.output)
    free = check_disk_space(settings.output, needed := count * 4096)
    print(f"checkpoint {settings.checkpoint}: ok, {network.origin.get('preset')} preset")
    print(f"judges: ok; disk: {free / 1e9:.1f} GB free, {needed / 1e6:.1f} MB needed")
    print(f"sampler: {sampler.name}, {steps_of(network, sampler)} steps, guidance {sampler.guidance}")
    print(f"{count} pictures would take about {expected_seconds(network, sampler, count, batch):.0f} s")


def main(settings: Settings) -> None:
    """Draws, writes, records; several processes share the pictures."""
    check(settings)
    machine = detect(settings.device)
    precision = set_up(settings.precision, machine)
    network = load_network(settings.checkpoint, machine.device)
    sampler = resolve_sampler(settings, network)
    domains = [DOMAINS.index(domain) for domain in settings.domains]
    pictures = graded_requests(settings.seed, settings.count, settings.digits, domains)
    most = 1000 if machine.device.type == "cuda" else 100
    if settings.dry_run:
        return dry_run(settings, network, sampler, len(pictures), settings.batch or min(most, len(pictures)))
    names = file_names(settings)
    for folder in (settings.output, *(settings.output / domain for domain in settings.domains)):
        output_folder(folder)
    warn_extra_files(names)
    judges = shipped_classifiers(machine.device) if settings.retries else []  # a missing one is told before the work
    record = Record(settings, machine)
    with sharing() as shard, torch.autocast(machine.device.type, torch.bfloat16, precision == "bf16"):
        batch = settings.batch or shard.largest(len(pictures), most)
        images = draw_share(settings, network, pictures, judges, sampler, batch, record, shard)
        with record.timed("writing"):
            for row, image in images.items():
                save_image(names[row], image)
        finish(settings, images, record, shard)
    return None


def draw_share(
    settings: Settings,
    network: Network,
    pictures: Sequence[DigitRequest],
    judges: Sequence[DigitClassifier],
    sampler: DigitSamplerConfig,
    batch: int,
    record: Record,
    shard: Shard,
) -> dict[int, Tensor]:
    """This process's pictures, {row: [3,28,28] uint8}, drawn and, where there are judges, drawn again."""
    with record.timed("sampling"):
        rows = shard.rows(len(pictures), batch)
        drawn = to_uint8(sample_all(network, [pictures[row] for row in rows], sampler, batch, "drawing digits"))
        images = dict(zip(rows, drawn, strict=True))
        left = redraw(network, pictures, images, judges, sampler, batch, settings.retries, shard) if judges else None
    record.metrics = {"pictures": len(pictures), "sampler": asdict(sampler), "batch": batch, "misread": left}
    record.metrics |= {"processes": shard.world, "shares": shard.gather([len(rows)])}
    return images


def finish(settings: Settings, images: dict[int, Tensor], record: Record, shard: Shard) -> None:
    """The grid and the record, by the first process."""
    everything = dict(shard.gather(list(images.items()))) if settings.grid else {}
    if not shard.main:
        return
    if settings.grid:
        whole = torch.stack([everything[row] for row in sorted(everything)])
        save_image(settings.grid, image_grid(whole, settings.count, scale=2))
    record.save(settings.record)
    print(f"{record.metrics['pictures']} pictures in {settings.output} ({record.timings['sampling']:.1f} s)")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
