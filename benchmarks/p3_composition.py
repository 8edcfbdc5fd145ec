"""Composition on the miniature: how often each level puts everything where it belongs, by the judge, on fresh layouts.

  python benchmarks/p3_composition.py --count 200 --seed 1            learns the six concepts first, once
  python benchmarks/p3_composition.py --cases two --levels joint conductor --count 20
  python benchmarks/p3_composition.py --ablation --count 60           conductor with each of its parts on and off
  python benchmarks/p3_composition.py --ordinary --count 20           ordinary objects and styles in the place of learned ones

two     two learned objects, each in its box                          three   three learned objects
scene   a learned object, an ordinary one in a colour, a background, a learned style: all four right
leak    two learned objects in colours: share of pictures in which a kind or colour is seen outside its box
alone   what the parts give alone, with the same vectors; possible: their product, what a level could reach at most
time    seconds per picture of two objects over those of a plain guided picture

Needs the miniature: python miniature/train_clip.py convert --output runs/miniature/clip; python miniature/train_diffusion.py assemble
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import repository_root  # noqa: F401  # isort: split
import torch
from torch import Tensor

from benchmarks.p3_composition_cases import (
    CASES,
    CaseName,
    LayoutCase,
    case_of,
    possible,
    question,
    with_reference,
)
from benchmarks.p3_learning import (
    BATCHES,
    EMBEDDING_NOISE,
    INITIAL,
    LR,
    MAX_LOSS_WEIGHT,
    STEPS,
    ZOOM_OUT,
    learn,
    pictures_of,
)
from benchmarks.p3_textual_inversion import MODEL
from concepts.composition.multipath import ConductorConfig, LayoutRequest, Level, compose
from concepts.dataset import ConceptSet, Kind
from concepts.embeddings import file_of, install, read_vectors
from concepts.sampling import Request, SamplerConfig, StableDiffusionSampler
from concepts.stable_diffusion import load_pipeline
from diffusion.guidance import Guidance
from miniature.judge_model import SceneClassifier, load_scene_classifier
from miniature.scenery.scenes import HELD_OUT_KINDS, HELD_OUT_STYLES, SIDE
from runtime.batches import in_batches
from runtime.cli import BadInput, check_positive, log, progress, run_script
from runtime.device import Device, detect, set_up
from runtime.files import ROOT
from runtime.images import labelled_grid
from runtime.record import Record
from runtime.seeds import derived_seed

KEPT = ROOT / "runs" / "bench" / "p3_composition"
PICTURES = KEPT / "pictures"  # of every concept
BATCH = 10
LEARN: dict[Kind, int] = STEPS | {"style": 400}  # and one vector: a style learned for likeness leaves objects less room
NAMES: dict[Kind, tuple[str, ...]] = {"object": HELD_OUT_KINDS, "style": HELD_OUT_STYLES}
WANTED = {"two": 0.9, "three": 0.85, "scene": 0.85}  # of what is possible
Table = dict[str, dict[str, float]]
VARIANTS: dict[str, ConductorConfig] = {
    "all": ConductorConfig(),
    "without attention": ConductorConfig(("features", "noise")),
    "without features": ConductorConfig(("attention", "noise")),
    "without noise": ConductorConfig(("attention", "features")),
    "attention only": ConductorConfig(("attention",)),
    "features only": ConductorConfig(("features",)),
    "noise only": ConductorConfig(("noise",)),
    "without focus": ConductorConfig(focus=False),
    "without sketch": ConductorConfig(sketch=0),
    "without containment": ConductorConfig(background_steps=0),
    "without collage": ConductorConfig(collage=0),
    "with refinement": ConductorConfig(refine=True),
    "with alignment": ConductorConfig(),  # to a picture with ordinary objects in the boxes
}


@dataclass(frozen=True)
class Settings:
    """Flags."""

    model: str = MODEL
    embeddings: Path | None = None
    """Folder of the vectors, where what is absent is learned; none given: one below runs/bench/p3_composition, by weights and steps."""
    cases: tuple[CaseName, ...] = CASES
    levels: tuple[Level, ...] = ("joint", "regional", "conductor")
    count: int = 200
    """Layouts per case."""
    alone: int = 400
    """Pictures of every sort of part alone, shared among its parts, at least five each."""
    ablation: bool = False
    """Instead of levels: conductor with its parts on and off."""
    ordinary: bool = False
    """Objects and styles that the model was trained on, as if they were learned: what composition does with perfect vectors."""
    means: ConductorConfig = ConductorConfig()
    learn: int = 0
    """Steps of textual inversion; 0: 200 for the objects, 400 for the styles."""
    steps: int = 25
    guidance: float = 7.0
    """What is composed from small objects wants more than a single one."""
    seed: int = 1
    device: Device = "auto"
    record: Path = ROOT / "runs" / "bench" / "p3_composition.json"


def main(bench: Settings) -> None:
    """Learns what isn't there, draws, judges, prints the table, writes the record."""
    check_positive(bench, "count", "alone", "steps")
    if min(bench.seed, bench.learn) < 0:
        raise BadInput("--seed, --learn: give zero or more")
    if not bench.cases or not bench.levels:
        raise BadInput("--cases, --levels: give at least one of each")
    if bench.ablation and bench.means != ConductorConfig():
        raise BadInput(
            "--ablation has means of its own: leave --inject, --focus, --sketch, --background-steps, --collage, --align, --refine out"
        )
    bench.means.check()
    machine = detect(bench.device)
    set_up("fp32", machine)
    record, judge = Record(bench, machine), load_scene_classifier(machine.device)
    painter = painter_of(bench, machine.device)
    record.metrics["alone"] = {}
    for name in bench.cases:
        cases = [case_of(name, derived_seed(bench.seed, index), bench.ordinary) for index in range(bench.count)]
        if name != "leak":
            alone(bench, judge, painter, cases, record.metrics["alone"])
            record.metrics.setdefault("possible", {})[name] = possible(cases, record.metrics["alone"])
        measure = ablated if bench.ablation else levels
        rates = measure(bench, name, cases, judge, painter)
        record.metrics |= rates
        record.add_repeats({f"{name}: {level}": [rate] for level, rate in rates[name].items()})
        record.save(bench.record)
    if not bench.ablation:
        record.metrics["time"] = times(painter, bench)
    for group in ("alone", "possible", "time"):
        record.add_repeats({f"{group}: {what}": [value] for what, value in record.metrics.get(group, {}).items()})
    record.save(bench.record)
    print("\n".join(table(record.metrics)))
    log(f"record: {bench.record}")


# ---------------------------------------------------------------- the model and its vectors


def painter_of(bench: Settings, device: torch.device) -> StableDiffusionSampler:
    """With all vectors in place."""
    if not bench.ordinary:
        folder = bench.embeddings or KEPT / learned_name(bench)
        for name in INITIAL:
            pictures_of(name, PICTURES, True)
        learn_absent(bench, folder)
    pipe = load_pipeline(bench.model, device, torch.float32)
    for name in () if bench.ordinary else HELD_OUT_KINDS + HELD_OUT_STYLES:
        install(pipe, read_vectors(file_of(folder, f"<{name}>")))
    pipe.unet.to(memory_format=torch.channels_last)
    return StableDiffusionSampler(pipe, SamplerConfig("dpm", bench.steps, Guidance(bench.guidance)))


def learned_name(bench: Settings) -> str:
    """Of the weights that vectors are learned for, since those of another model say nothing to it, and of the steps of learning."""
    parts = [Path(bench.model) / part for part in ("text_encoder", "unet")]
    files = [file for part in parts for file in sorted(part.glob("*.safetensors"))]
    if not files:
        raise BadInput(
            f"--model {bench.model}: wanted a diffusers folder with safetensors; without one, give --embeddings"
        )
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    return "-".join([digest, *(f"{bench.learn or LEARN[kind]}" for kind in NAMES), f"{EMBEDDING_NOISE}", f"{ZOOM_OUT}"])


def learn_absent(bench: Settings, folder: Path) -> None:
    """Learn all concepts that have no file yet: the objects in one run, the styles in another."""
    for kind, names in NAMES.items():
        absent = [name for name in names if not file_of(folder, f"<{name}>").is_file()]
        flags = {"model": bench.model, "device": bench.device, "steps": bench.learn or LEARN[kind], "lr": LR}
        flags |= {"batch": BATCHES[kind], "max_loss_weight": MAX_LOSS_WEIGHT}
        flags |= {"embedding_noise": EMBEDDING_NOISE, "zoom_out": ZOOM_OUT}
        if absent:
            concepts = [ConceptSet(f"<{name}>", PICTURES / name, INITIAL[name], kind) for name in absent]
            learn(concepts, folder, flags)


# ---------------------------------------------------------------- drawing and judging


def alone(
    bench: Settings,
    judge: SceneClassifier,
    painter: StableDiffusionSampler,
    cases: Sequence[LayoutCase],
    known: dict[str, float],
) -> None:
    """Adds the rates of all parts of these cases that aren't known yet."""
    parts = {part for case in cases for part in case.parts}
    sorts = Counter(part.split()[0] for part in parts)
    for part in sorted(parts - known.keys()):
        random, count = Random(bench.seed), max(5, bench.alone // sorts[part.split()[0]])
        asked = [question(part, random, bench.ordinary) for _ in range(count)]
        orders = [Request(prompt, derived_seed(bench.seed, 1, index)) for index, (prompt, _) in enumerate(asked)]
        images = drawn(painter.sample_images, orders, part)
        wanted = {name: [answers[name] for _, answers in asked] for name in asked[0][1]}
        known[part] = float(judge.agrees(images, **wanted).float().mean())


def drawn(paint: Callable[[list[Any]], Tensor], orders: Sequence[Any], title: str) -> Tensor:
    """[N,3,64,64] uint8."""
    chunks = in_batches(paint, orders, min(BATCH, len(orders)))
    return torch.cat([images[: len(chunk)] for chunk, images in progress(chunks, title, leave=False)])


def composed(
    bench: Settings,
    cases: Sequence[LayoutCase],
    painter: StableDiffusionSampler,
    level: Level,
    means: ConductorConfig,
    title: str,
) -> Tensor:
    """A picture of each case, with a seed of its own."""
    orders = [LayoutRequest(case.layout, derived_seed(bench.seed, 2, index)) for index, case in enumerate(cases)]
    return drawn(partial(compose, painter, level=level, config=means), orders, title)


def right(judge: SceneClassifier, case: LayoutCase, image: Tensor) -> bool:
    """Whether everything is as the case wants it; image [3,64,64] uint8."""
    for box, kind, colour in zip(case.boxes, case.kinds, case.colours, strict=True):
        where = torch.tensor([box]) * SIDE
        if not judge.inside(image[None], where, [kind], [colour] if colour else None).all():
            return False
    wanted = {name: [word] for name, word in case.whole.items()}
    return not wanted or bool(judge.agrees(image[None], **wanted).all())


def leaks(judge: SceneClassifier, case: LayoutCase, image: Tensor) -> bool:
    """Whether any object's kind or colour is seen outside its box."""
    for box, kind, colour in zip(case.boxes, case.kinds, case.colours, strict=True):
        where = torch.tensor([box]) * SIDE
        if judge.leaked(image[None], where, [kind], [colour] if colour else None).any():
            return True
    return False


def share(judge: SceneClassifier, name: CaseName, cases: Sequence[LayoutCase], images: Tensor) -> float:
    """Of pictures that are right, or that leak."""
    ask = leaks if name == "leak" else right
    return sum(ask(judge, case, image) for case, image in zip(cases, images, strict=True)) / len(cases)


def levels(
    bench: Settings,
    name: CaseName,
    cases: Sequence[LayoutCase],
    judge: SceneClassifier,
    painter: StableDiffusionSampler,
) -> Table:
    """{case: {level: rate}}, and a sheet of the first pictures."""
    rates: dict[str, float] = {}
    sheet = []
    for level in bench.levels:
        images = composed(bench, cases, painter, level, bench.means, f"{name}, {level}")
        rates[level] = share(judge, name, cases, images)
        sheet.append(images[:12])
        log(f"{name}, {level}: {rates[level]:.3f}")
    columns = [f"{index}" for index in range(len(sheet[0]))]
    labelled_grid(
        bench.record.with_name(f"{bench.record.stem}_{name}.png"), torch.cat(sheet), bench.levels, columns, name, 1.0
    )
    return {name: rates}


def ablated(
    bench: Settings,
    name: CaseName,
    cases: Sequence[LayoutCase],
    judge: SceneClassifier,
    painter: StableDiffusionSampler,
) -> Table:
    """{case: {variant: rate}} of conductor."""
    rates = {}
    for variant, means in VARIANTS.items():
        led = variant == "with alignment"
        plans = [with_reference(case, derived_seed(bench.seed, 3, k)) if led else case for k, case in enumerate(cases)]
        rates[variant] = share(judge, name, cases, composed(bench, plans, painter, "conductor", means, variant))
        log(f"{name}, {variant}: {rates[variant]:.3f}")
    return {name: rates}


def times(painter: StableDiffusionSampler, bench: Settings, repeats: int = 3) -> dict[str, float]:
    """Of single pictures of two objects, the least of some runs, over those of plain ones."""
    layout = case_of("two", 0, bench.ordinary).layout

    def seconds(level: Level | None) -> float:
        start = time.perf_counter()
        if level:
            compose(painter, [LayoutRequest(layout, 0)], level, bench.means)
        else:
            painter.sample_images([Request("a photo of a red star", 0)])
        return time.perf_counter() - start

    plain = min(seconds(None) for _ in range(repeats + 1))
    return {level: round(min(seconds(level) for _ in range(repeats)) / plain, 3) for level in bench.levels}


def table(metrics: dict[str, Any]) -> list[str]:
    """A line per case: rates, what is possible, what is wanted."""
    lines = []
    for name, values in metrics.items():
        if name in ("alone", "possible", "repeats"):
            continue
        line = f"{name:<8}" + "".join(f"{level:>{len(level) + 2}}{value:7.3f}" for level, value in values.items())
        if name in metrics.get("possible", {}):
            most = metrics["possible"][name]
            line += f"  possible{most:7.3f}  wanted{most * WANTED[name]:7.3f}"
        lines.append(line)
    return lines


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
