"""Sample digits of both domains from a P1 checkpoint, named and laid out for the grader: out/mnistm/0_001.png .. out/svhn/9_050.png.

  python P1_inference.py --output out                the 1,000 graded images
  python P1_inference.py --output out --digits 3 7 --domains svhn --count 5 --guidance 1 --grid out/sevens.png
  python P1_inference.py --output out --model runs/mine/best.safetensors --classes cat      of your own images: out/DOMAIN/cat_001.png ..
  python P1_inference.py --output out --dry-run      checks everything and estimates the time, samples nothing
  torchrun --nproc_per_node 4 P1_inference.py --output out      four GPUs share the images (accelerate launch works as well)

Guidance: uncond + scale * (cond - uncond), where uncond knows the domain but not the digit.
"""

from __future__ import annotations

import runtime.interrupts  # noqa: F401

# isort: split
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from diffusion.guidance import Guidance
from diffusion.step_rules import OneStateRule
from digits.classifier import choose_classifiers
from digits.recipes import RECIPES
from digits.sampling import (
    CHECKPOINT,
    DigitRequest,
    DigitSampler,
    DigitSamplerConfig,
    check_steps,
    graded_requests,
    redraw,
)
from P1_model import HOMEWORK, Network, SamplerName, load_network
from runtime.cli import BadInput, Seed, check_fractions, default_hint, log, run_script
from runtime.device import Device, Precision, autocast, detect, set_up
from runtime.distributed import sharing
from runtime.files import ROOT, check_disk_space, check_writable_file, check_writable_folder, output_folder
from runtime.images import image_grid, save_image, to_uint8
from runtime.record import Record

# the samplers that these flags have an effect on
FLAG_SAMPLERS = {"eta": ("ddim",), "rule": ("ddim",), "steps": ("dpm", "ddim", "distilled")}


def shipped_default(name: str) -> Any:
    """Return the default that --help shows for a sampler flag: the checkpoint's value, with that of the shipped checkpoint."""
    return default_hint(f"the checkpoint's; shipped: {getattr(RECIPES['distill-steps'].sampler, name)}")


@dataclass(frozen=True)
class Settings:
    """Flags of sampling. Sampler flags that are left out take the checkpoint's values."""

    output: Path
    """Folder for mnistm/ and svhn/, or for the checkpoint's domains. Files of the same names are replaced, others stay."""
    model: Annotated[Path, tyro.conf.arg(aliases=("--checkpoint",))] = CHECKPOINT
    """safetensors file written by P1_training.py (best.safetensors), or the shipped one."""
    count: int = 50
    """Images per digit and domain."""
    digits: Annotated[tuple[str, ...] | None, tyro.conf.arg(aliases=("--classes",)), default_hint("all, 0 1 .. 9")] = (
        None
    )
    """Digits to sample. For a checkpoint of other images: names of its classes."""
    domains: Annotated[tuple[str, ...] | None, default_hint("all, mnistm svhn")] = None
    """Names of the domains to sample."""
    sampler: Annotated[SamplerName | None, shipped_default("name")] = None
    """dpm = DPM-Solver++ in few steps; ddim = DDIM with any --eta and --rule; ddpm = DDPM over all T steps.
    distilled = the fewest steps, with a checkpoint of P1_training.py --distill-steps."""
    steps: Annotated[int | None, shipped_default("steps")] = None
    """Sampling steps of dpm, ddim and distilled."""
    guidance: Annotated[float | None, shipped_default("guidance")] = None
    """Guidance scale: 1 = no guidance, at half the cost unless the checkpoint is distilled."""
    interval: Annotated[tuple[float, float] | None, shipped_default("interval")] = None
    """Two fractions: guidance is applied only at noise levels start <= t/T < end."""
    guidance_rescale: Annotated[float | None, shipped_default("rescale")] = None
    """0..1: pulls the contrast (standard deviation) of the guided output back to that of the unguided one. 0 = off."""
    eta: Annotated[float | None, shipped_default("eta")] = None
    """Randomness of ddim: 0 = none, 1 = as much as ddpm."""
    rule: Annotated[OneStateRule | None, shipped_default("rule")] = None
    """Step rule of ddim, as listed by P2_ddim.py --help."""
    retries: int = 3
    """Most times that an image is redrawn from another seed because its domain's classifier misreads it. 0 = off."""
    classifiers: tuple[str, ...] = ("auto",)
    """Files of P1_classifier.py, one per domain, for --retries. none = no retries.
    auto = the shipped ones for digits, none for other images."""
    seed: Seed = 0
    batch: int = 0
    """Images at once. 0 = 100 on a CPU, 1,000 on a GPU."""
    device: Device = "auto"
    precision: Precision = "auto"
    """auto = bf16 where the hardware has it, else fp16 on CUDA, else fp32."""
    grid: Path | None = None
    """Also save all images as this one PNG: a row per domain and digit. None = no grid."""
    record: Path = ROOT / "runs" / "p1_inference" / "record.json"
    """JSON file for settings, timings and results."""
    dry_run: bool = False
    """Check checkpoint, classifiers and disk space, estimate the time, and stop without sampling."""


def main(settings: Settings) -> None:
    """Sample the images, redraw misread ones, write them and the record; several processes share the images."""
    check(settings)
    machine = detect(settings.device)
    precision = set_up(settings.precision, machine)
    network = load_network(settings.model, machine.device)
    spec, config = network.spec, sampler_config(settings, network)
    classes = chosen_labels("--digits", settings.digits, spec.classes)
    domains = chosen_labels("--domains", settings.domains, spec.domains)
    requests = graded_requests(
        settings.seed, settings.count, [*map(spec.classes.index, classes)], [*map(spec.domains.index, domains)], spec
    )
    largest = 1000 if machine.device.type == "cuda" else 100
    record = Record(replace(settings, digits=classes, domains=domains), machine)

    if settings.dry_run:
        choose_classifiers(settings.classifiers, spec, machine.device)
        for domain in domains:
            check_writable_folder(settings.output / domain)
        free = check_disk_space(settings.output, needed := len(requests) * 4096)
        seconds = DigitSampler(network, config, min(settings.batch or largest, len(requests))).expected_seconds(
            len(requests)
        )
        print(f"checkpoint {settings.model}: ok, {network.origin.get('preset')} preset")
        print(f"classifiers: ok; disk: {free / 1e9:.1f} GB free, {needed / 1e6:.1f} MB needed")
        print(f"sampler: {config.name}, {config.passes(len(network.schedule))} steps, guidance {config.guidance}")
        print(f"{len(requests)} images would take about {seconds:.0f} s")
        return

    names = [
        settings.output / domain / f"{digit}_{index:03d}.png"
        for domain in domains
        for digit in classes
        for index in range(1, settings.count + 1)
    ]
    if settings.grid and settings.grid.resolve() in {name.resolve() for name in names}:
        raise BadInput(f"--grid {settings.grid} is the name of one of the pictures: name another file")
    classifiers = []
    if settings.retries:  # loaded now, so that a missing one is reported before the work
        classifiers = choose_classifiers(settings.classifiers, spec, machine.device)
        if not classifiers:
            log("no classifiers: no picture is redrawn")
    for domain in domains:
        output_folder(settings.output / domain)
    warn_extra_files(names)

    with sharing() as shard, autocast(machine.device, precision):
        # this process's images, and other seeds for those that are misread
        most = settings.batch or shard.largest(len(requests), largest)
        sampler = DigitSampler(network, config, min(most, len(requests)))  # a batch is padded to its size
        with record.timed("sampling"):
            rows = shard.rows(len(requests), sampler.batch)
            samples = to_uint8(sampler.images([requests[row] for row in rows], "drawing digits"))
            images = dict(zip(rows, samples, strict=True))
            misread = redraw(sampler, classifiers, requests, images, settings.retries, shard) if classifiers else None
            counts = count_misread(requests, *misread, spec.domains) if misread else None

        with record.timed("writing"):
            for row, image in images.items():
                save_image(names[row], image)
        record.metrics = {
            "pictures": len(requests), "sampler": asdict(config), "batch": sampler.batch, "misread": counts,
            "processes": shard.world, "shares": shard.gather([len(rows)]),
        }  # fmt: skip

        # the record and the grid, by the first process
        everything = dict(shard.gather(list(images.items()))) if settings.grid else {}
        if shard.main:
            record.save(settings.record)
            for name, count in (counts or {}).items():
                share = ", ".join(f"{domain} {wrong}" for domain, wrong in count.items())
                graders = "the shipped classifiers" if settings.classifiers == ("auto",) else "--classifiers"
                who = f"by {graders}" if name == "first_try" else "selected by these classifiers"
                print(f"{name.replace('_', ' ')}, {who}: {sum(count.values())} of {len(requests)} misread ({share})")
            print(f"{len(requests)} pictures in {settings.output} ({record.timings['sampling']:.1f} s)")
            if settings.grid:
                whole = torch.stack([everything[row] for row in sorted(everything)])
                save_image(settings.grid, image_grid(whole, settings.count, scale=2))


def check(settings: Settings) -> None:
    """Raise BadInput for an invalid --count, --retries or --batch, and for a --grid that can't be written."""
    if settings.count < 1:
        raise BadInput(f"--count {settings.count}: no pictures asked for")
    if settings.count > 999:
        raise BadInput(f"--count {settings.count}: names have three digits, at most 999 each")
    if settings.retries < 0:
        raise BadInput(f"--retries {settings.retries}: must be 0 or more")
    if settings.batch < 0:
        raise BadInput(f"--batch {settings.batch}: must be above zero, or 0 for automatic")
    if settings.grid:
        check_writable_file(settings.grid, "--grid", [".png"])


def chosen_labels(flag: str, names: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """Return the names in `names` (None = all of `known`), each once; raise BadInput for an unknown one and for an empty list."""
    if names is None:
        return tuple(known)
    if not names:
        raise BadInput(f"{flag} names none: no pictures asked for")
    if not {*names} <= {*known}:
        expected = "0..9" if known == HOMEWORK.classes else f"among {', '.join(known)}"
        raise BadInput(f"{flag} {' '.join(names)}: must be {expected}")
    return tuple(dict.fromkeys(names))


def sampler_config(settings: Settings, network: Network) -> DigitSamplerConfig:
    """Return the checkpoint's sampler settings, changed by the flags; raise BadInput for an invalid value or a flag without effect."""
    flags = {f.name: f.name for f in fields(DigitSamplerConfig)} | {"name": "sampler", "rescale": "guidance_rescale"}
    changes = {name: value for name, flag in flags.items() if (value := getattr(settings, flag)) is not None}
    config = replace(DigitSamplerConfig.from_dict(network.sampler), **changes)
    check_fractions(config, "eta")
    check_fractions(settings, "guidance_rescale")
    if not math.isfinite(config.guidance):
        raise BadInput(f"--guidance {config.guidance}: must be a finite number")
    network.check_guidance(Guidance(config.guidance, rescale=config.rescale))
    low, high = config.interval
    if not 0 <= low <= high <= 1:
        raise BadInput(f"--interval {low} {high}: give two fractions of T, the lower one first")
    for flag, samplers in FLAG_SAMPLERS.items():
        if getattr(settings, flag) is not None and config.name not in samplers:
            raise BadInput(f"--{flag} has no effect on --sampler {config.name}: it goes with {' or '.join(samplers)}")
    check_steps(network, config)
    return config


def count_misread(
    requests: Sequence[DigitRequest], first: Sequence[int], left: Sequence[int], domains: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Return {"first_try": {domain: count}, "after_retries": {domain: count}} of misread images.

    `first` and `left` are the rows of `requests` misread at the first try and after the retries.
    """

    def per_domain(rows: Sequence[int]) -> dict[str, int]:
        counts = Counter(requests[row].domain for row in rows)
        return {domains[domain]: counts[domain] for domain in sorted({request.domain for request in requests})}

    return {"first_try": per_domain(first), "after_retries": per_domain(left)}


def warn_extra_files(names: Sequence[Path]) -> None:
    """Log one line if the folders of `names` hold files other than these."""
    ours, folders = set(names), sorted({name.parent for name in names})
    extra = sorted(path for folder in folders for path in folder.iterdir() if path not in ours)
    if extra:
        log(f"warning: {len(extra)} other file(s) in the output are left alone, such as {extra[0]}")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
