"""Composition on the miniature: how often each level puts everything where it belongs, by the judge, on fresh layouts.

  python benchmarks/p3_composition.py --count 200 --seed 1            needs the miniature assembled; learns the six concepts first, once
  python benchmarks/p3_composition.py --cases two --levels joint conductor --count 20

two     two learned objects, each in its box                          three   three learned objects
scene   a learned object, an ordinary one in a colour, a background, a learned style: all four right
leak    two: share of pictures in which an object's kind is seen outside its box
alone   what the parts give alone with the same vectors; their product is what a level could reach at most
time    seconds per picture over those of a plain guided picture
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.p3_textual_inversion import INITIAL, MODEL, pictures_of
from diffusion.guidance import Guidance
from miniature.judge_model import Judge, load_judge
from miniature.scenes import BACKGROUNDS, COLOURS, HELD_OUT_KINDS, HELD_OUT_STYLES, KINDS, SIDE, fits
from P3_composition import Level, compose
from P3_concepts import Concept
from P3_drawing import Manner, Order, Painter
from P3_embeddings import file_of, install, read_vectors, save_vectors
from P3_inversion_run import Recipe, Run
from P3_layout import Box, Layout, box_mask, make_layout
from P3_model import load_pipeline
from runtime.cli import note, progress, require_positive, run_script
from runtime.device import detect, set_up
from runtime.generation import derived_seed
from runtime.record import Record

ROOT = Path(__file__).resolve().parents[1]
CaseName = Literal["two", "three", "scene"]
HALVES: tuple[Box, ...] = ((0.04, 0.25, 0.48, 0.75), (0.52, 0.25, 0.96, 0.75))
STACKED: tuple[Box, ...] = ((0.25, 0.04, 0.75, 0.48), (0.25, 0.52, 0.75, 0.96))
THIRDS: tuple[Box, ...] = ((0.02, 0.33, 0.33, 0.67), (0.345, 0.33, 0.655, 0.67), (0.67, 0.33, 0.98, 0.67))


@dataclass(frozen=True)
class Bench:
    """Flags."""

    model: str = MODEL
    embeddings: Path = ROOT / "runs" / "bench" / "p3_composition"
    """Folder of the vectors; what isn't there is learned."""
    cases: tuple[CaseName, ...] = ("two", "three", "scene")
    levels: tuple[Level, ...] = ("joint", "regional", "conductor")
    count: int = 200
    """Layouts per case."""
    learn: int = 500
    """Steps of textual inversion."""
    steps: int = 25
    guidance: float = 5.0
    seed: int = 1
    device: str = "auto"
    output: Path = ROOT / "runs" / "bench" / "p3_composition.json"


@dataclass(frozen=True)
class Case:
    """A layout, and what the judge should find: kinds (and colours) in boxes, of the whole the rest."""

    layout: Layout
    boxes: tuple[Box, ...]
    kinds: tuple[str, ...]
    colours: tuple[str | None, ...]
    whole: dict[str, str]


# ---------------------------------------------------------------- layouts


def make_case(name: CaseName, random: Random) -> Case:
    """One of many of its kind."""
    if name == "scene":
        return scene(random)
    boxes = THIRDS if name == "three" else random.choice((HALVES, STACKED))
    kinds = tuple(random.sample(HELD_OUT_KINDS, len(boxes)))
    regions = [(f"<{kind}>", f"a photo of a <{kind}>", box_mask(box)) for kind, box in zip(kinds, boxes, strict=True)]
    base = "a photo of " + " next to ".join(["an object"] * len(boxes))
    return Case(make_layout(base, regions), boxes, kinds, (None,) * len(boxes), {})


def scene(random: Random) -> Case:
    """The report's failing kind of prompt."""
    kind, style, other = random.choice(HELD_OUT_KINDS), random.choice(HELD_OUT_STYLES), random.choice(KINDS)
    colour, ground = random.choice([(c, g) for c in COLOURS for g in BACKGROUNDS if fits(c, g)])
    boxes = random.choice((HALVES, STACKED))
    thing, behind = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {other}", f"on a {ground} background"
    regions = [
        (f"<{kind}>", f"a photo of a <{kind}> {behind}", box_mask(boxes[0])),
        (other, f"a photo of {thing} {behind}", box_mask(boxes[1])),
    ]
    joint = f"a photo of a <{kind}> next to {thing} {behind} in the style of <{style}>"
    layout = make_layout(f"a photo of an object next to {thing} {behind}", regions, [f"<{style}>"], joint)
    return Case(layout, boxes, (kind, other), (None, colour), {"style": style, "background": ground})


# ---------------------------------------------------------------- what the judge says


def right(judge: Judge, case: Case, image: Tensor) -> bool:
    """Whether everything is as the case wants it; image [3,64,64] uint8."""
    boxes = torch.tensor(case.boxes) * SIDE
    for box, kind, colour in zip(boxes, case.kinds, case.colours, strict=True):
        if not judge.inside(image[None], box[None], [kind], [colour] if colour else None).all():
            return False
    return not case.whole or bool(
        judge.agrees(image[None], **{name: [word] for name, word in case.whole.items()}).all()
    )


def leaks(judge: Judge, case: Case, image: Tensor) -> bool:
    """Whether any object's kind is seen outside its box."""
    boxes = torch.tensor(case.boxes) * SIDE
    pairs = zip(boxes, case.kinds, strict=True)
    return any(bool(judge.leaked(image[None], box[None], [kind]).any()) for box, kind in pairs)


def alone(judge: Judge, painter: Painter, bench: Bench) -> dict[str, float]:
    """Rates of every learned object and style alone, and of ordinary objects in a colour on a background."""
    random = Random(bench.seed)
    found = {}
    for name in HELD_OUT_KINDS + HELD_OUT_STYLES:
        style = name in HELD_OUT_STYLES
        prompt = f"a photo of a {random.choice(KINDS)} in the style of <{name}>" if style else f"a photo of a <{name}>"
        orders = [Order(prompt, derived_seed(bench.seed, index)) for index in range(40)]
        images = torch.cat([painter.paint(orders[start : start + 20]) for start in (0, 20)])
        found[name] = float(judge.agrees(images, **{"style" if style else "kind": [name] * 40}).float().mean())
    return found


# ---------------------------------------------------------------- the runs


def main(bench: Bench) -> None:
    """Learns what isn't there, draws, judges, prints the table, writes the record."""
    require_positive(bench, "count", "learn", "steps")
    machine = detect(bench.device)
    set_up("fp32", machine)
    record, judge = Record(bench, machine), load_judge(machine.device)
    learn(bench)
    pipe = load_pipeline(bench.model, machine.device, torch.float32)
    for name in HELD_OUT_KINDS + HELD_OUT_STYLES:
        install(pipe, read_vectors(file_of(bench.embeddings, f"<{name}>")))
    painter = Painter(pipe, Manner("dpm", bench.steps, Guidance(bench.guidance)))
    record.metrics["alone"] = alone(judge, painter, bench)
    for name in bench.cases:
        record.metrics |= measured(bench, name, judge, painter)
        record.save(bench.output)
    record.metrics["time"] = times(painter)
    record.save(bench.output)
    for name, values in record.metrics.items():
        print(f"{name:<10}" + "".join(f"{level:>14}{value:7.3f}" for level, value in values.items()))
    note(f"record: {bench.output}")


def learn(bench: Bench) -> None:
    """All concepts that have no file yet, in one run."""
    absent = [x for x in HELD_OUT_KINDS + HELD_OUT_STYLES if not file_of(bench.embeddings, f"<{x}>").is_file()]
    if not absent:
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        concepts = [
            Concept(f"<{x}>", pictures_of(x, folder), INITIAL[x], "style" if x in HELD_OUT_STYLES else "object")
            for x in absent
        ]
        run = Run(Recipe(bench.model, steps=bench.learn, device=bench.device, run=folder / "run"), concepts)
        for _ in progress(range(bench.learn), f"learning {', '.join(absent)}"):
            run.one_step()
        for token, rows in run.learner.learned().items():
            save_vectors(file_of(bench.embeddings, token), token, rows, f"{bench.model}, {bench.learn} steps")


def measured(bench: Bench, name: CaseName, judge: Judge, painter: Painter) -> dict[str, dict[str, float]]:
    """{case: {level: rate}}, and for two objects {"leak": ..}."""
    found: dict[str, dict[str, float]] = {name: {}} | ({"leak": {}} if name == "two" else {})
    cases = [make_case(name, Random(derived_seed(bench.seed, index))) for index in range(bench.count)]
    for level in bench.levels:
        images = [
            compose(painter, case.layout, [derived_seed(bench.seed, index)], level)[0]
            for index, case in enumerate(progress(cases, f"{name}, {level}"))
        ]
        pairs = list(zip(cases, images, strict=True))
        found[name][level] = share([right(judge, *pair) for pair in pairs])
        if name == "two":
            found["leak"][level] = share([leaks(judge, *pair) for pair in pairs])
        note(f"{name}, {level}: {found[name][level]:.3f}")
    return found


def share(yes: Sequence[bool]) -> float:
    """Of True."""
    return sum(yes) / len(yes)


def times(painter: Painter, repeats: int = 3) -> dict[str, float]:
    """Of four pictures of two objects, least of some runs, over those of plain ones."""
    layout, seeds = make_case("two", Random(0)).layout, list(range(4))

    def seconds(level: Level | None) -> float:
        start = time.perf_counter()
        if level:
            compose(painter, layout, seeds, level)
        else:
            painter.paint([Order("a photo of a red star", seed) for seed in seeds])
        return time.perf_counter() - start

    levels: tuple[Level, ...] = ("joint", "regional", "conductor")
    plain = min(seconds(None) for _ in range(repeats + 1))
    return {level: round(min(seconds(level) for _ in range(repeats)) / plain, 3) for level in levels}


if __name__ == "__main__":
    run_script(main, Bench, __doc__)
