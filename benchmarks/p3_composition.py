"""Composition on the miniature: how often each level of layout control puts everything where it belongs, on fresh layouts.

  python benchmarks/p3_composition.py --count 200 --seed 1            learns the six concepts first, once
  python benchmarks/p3_composition.py --cases two --levels joint conductor --count 20
  python benchmarks/p3_composition.py --ablation --count 60           conductor with each of its parts on and off
  python benchmarks/p3_composition.py --large                         only time and memory, at 512x512; a GPU, or patience

Levels: joint (one prompt for all), regional (each prompt in its region), conductor (a branch of the U-Net for each concept).
Cases, in which every object has a box:
two     two learned objects                                           three   three learned objects
alike   two learned objects in the same colour, which is named        leak    two learned objects in different colours, which are named
four    the four learned objects in two rows                          five    these and an ordinary one, which captions name
scene   a learned object, an ordinary one in a colour, a background colour, a learned style

Per case and level: the share of images that are right, strictly (p3_strict.py) and by the scene classifier alone; the share that collapse
(a box holds another of the objects); the share that leak (an object's kind lies outside its box, or its colour if all differ).
alone   the share of right images when a part of the case, such as an object or the style, is drawn alone, large, with the same vectors
possible  the success rate to expect of a case if its parts succeed independently: the mean product of the shares above
rendered  the same shares of renders of the layouts that pass through the autoencoder: what the measure finds in correct images
Last come seconds and peak memory of one image of two objects, against an image from one prompt without a layout.

Needs the miniature: python miniature/train_clip.py convert --output runs/miniature/clip; python miniature/train_diffusion.py assemble
--large needs nothing: Stable Diffusion v1 with random weights (plain_p3.py), on which time and memory don't depend.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from random import Random

import repository_root  # noqa: F401  # isort: split
import torch
from torch import Tensor

from benchmarks.p3_composition_cases import CASES, CaseName, LayoutCase, case_of, possible, question, with_reference
from benchmarks.p3_learning import INITIAL, MODEL, NAMES, RECIPE, SAMPLER, check_model, learn, sample, write_images
from benchmarks.p3_shape import open_autoencoder
from benchmarks.p3_strict import PartMeasure, StrictMeasure, shares_of
from benchmarks.plain_p3 import save_random_v1
from benchmarks.timing import BENCH, peak_memory, ratios, report, seconds
from concepts.composition.layout import Layout, Region, make_layout
from concepts.composition.masks import box_mask
from concepts.composition.multipath import ConductorConfig, LayoutRequest, Level, compose
from concepts.dataset import ConceptSet, Kind
from concepts.embeddings import Vectors, file_of, find_vectors, install
from concepts.inversion import weights_fingerprint
from concepts.sampling import Request, SamplerConfig, Solver, StableDiffusionSampler
from concepts.stable_diffusion import load_pipeline
from diffusion.guidance import Guidance
from miniature.diffusion_parts import PARTS
from miniature.judge_model import load_scene_classifier
from runtime.cli import BadInput, check_not_negative, check_positive, log, run_script
from runtime.device import DTYPES, Device, Machine, detect, set_up
from runtime.images import labelled_grid
from runtime.record import Record
from runtime.seeds import derived_seed

FOLDER = BENCH / "p3_composition"
IMAGES = FOLDER / "pictures"  # from which the concepts are learned
# styles have one vector, too, and fewer steps: a style that is learned more closely suppresses objects
LEARNING_STEPS: dict[Kind, int] = {"object": RECIPE["object"].steps, "style": 400}
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
    "with alignment": ConductorConfig(),  # to an image with ordinary objects in the boxes
}
LARGE_LAYOUT = make_layout(
    "a photo of a dog next to a cat",
    [
        Region("dog", "a photo of a dog on the left", box_mask((0.05, 0.2, 0.45, 0.9))),
        Region("cat", "a photo of a cat on the right", box_mask((0.55, 0.2, 0.95, 0.9))),
    ],
    joint="a photo of a dog next to a cat",
)
SHOWN = 8  # images of a level on the sheet
Results = dict[str, list[float]]


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    model: str | None = None
    """Stable Diffusion: a folder or a file, with --large also random-v1. None = the miniature, with --large random-v1."""
    embeddings: Path | None = None
    """Folder of the learned vectors; missing ones are learned. None = one below runs/bench/p3_composition, per weights and recipe."""
    cases: tuple[CaseName, ...] = CASES
    levels: tuple[Level, ...] = ("joint", "regional", "conductor")
    count: int = 200
    """Layouts per case."""
    alone: int = 400
    """Images for each sort of part (object, style, ..) that is drawn alone. Its parts share them, at least five each."""
    parts: Path = PARTS
    """Folder that holds vae/, the autoencoder: its copies of renders set the bar for shapes."""
    ablation: bool = False
    """Compare variants of conductor, with its parts on and off, in place of the levels."""
    large: bool = False
    """Only measure time and memory, on a layout without learned concepts."""
    config: ConductorConfig = ConductorConfig()
    learn: int = 0
    """Steps of textual inversion. 0 = 60 for the objects, 400 for the styles."""
    solver: Solver = SAMPLER.solver
    steps: int = 25
    """Sampling steps."""
    guidance: float = SAMPLER.guidance.scale
    """Guidance scale."""
    repeats: int = 3
    """Images of every level that are timed."""
    seed: int = 1
    device: Device = "auto"
    record: Path = BENCH / "p3_composition.json"


def main(settings: Settings) -> None:
    """Learn missing vectors. For every case sample, grade, print the shares and write the record. Then time the levels."""
    check_positive(settings, "count", "alone", "steps", "repeats")
    check_not_negative(settings, "seed", "learn")
    if not settings.cases or not settings.levels:
        raise BadInput("--cases, --levels: give at least one of each")
    if settings.ablation and settings.config != ConductorConfig():
        raise BadInput(
            "--ablation chooses them itself: leave --inject, --focus, --sketch, --background-steps, --collage, --align, --refine out"
        )
    settings.config.check()
    machine = detect(settings.device)
    record = Record(settings, machine)

    sampler = open_sampler(settings, machine)
    if settings.large:
        record.add_repeats(times(settings, sampler, LARGE_LAYOUT))
    else:
        classifier = load_scene_classifier(machine.device)
        through = open_autoencoder(settings.parts, machine.device)
        alone = PartMeasure(classifier, through)
        rates: dict[str, dict[str, float]] = {"strict": {}, "scene classifier": {}}  # of the parts alone
        for name in settings.cases:
            indices = range(settings.count)
            cases = [case_of(name, derived_seed(settings.seed, index)) for index in indices]
            if name != "leak":
                add_part_rates(rates, settings, cases, alone, sampler)
                for measure, each in rates.items():
                    record.add_repeats({f"{name}, {measure}: possible": [possible(cases, each)]})
            grader = StrictMeasure(classifier, through, cases)
            record.add_repeats({f"{name}, {verdict}: rendered": [share] for verdict, share in grader.ceiling().items()})
            record.add_repeats(case_shares(settings, name, cases, grader, sampler))
            record.save(settings.record)
        for measure, each in rates.items():
            record.add_repeats({f"alone, {measure}: {part}": [rate] for part, rate in each.items()})
        if not settings.ablation:
            record.add_repeats(times(settings, sampler, case_of("two", 0).layout))

    report(record, settings.record)


# ---------------------------------------------------------------- models


def open_sampler(settings: Settings, machine: Machine) -> StableDiffusionSampler:
    """Return the sampler: with the vectors of all concepts, in fp32; with --large without vectors, in the precision of auto."""
    dtype = DTYPES[set_up("auto" if settings.large else "fp32", machine)]
    model = settings.model or ("random-v1" if settings.large else MODEL)
    vectors = {} if settings.large else learned_vectors(settings, model)
    with tempfile.TemporaryDirectory() as temporary:
        model = save_random_v1(Path(temporary)) if model == "random-v1" else model
        pipe = load_pipeline(model, machine.device, dtype)
    install(pipe, vectors)
    pipe.unet.to(memory_format=torch.channels_last)
    return StableDiffusionSampler(pipe, SamplerConfig(settings.solver, settings.steps, Guidance(settings.guidance)))


def learned_vectors(settings: Settings, model: str) -> Vectors:
    """Return {token: vectors} of the concepts in --cases, from the folder. Learn missing ones first: objects in one run, then styles."""
    needed = {kind: names for kind, names in NAMES.items() if kind == "object" or "scene" in settings.cases}
    steps = {kind: settings.learn or number for kind, number in LEARNING_STEPS.items()}
    folder = settings.embeddings
    if not folder:
        check_model(model)
        if not Path(model).is_dir():
            raise BadInput(f"--model {model} is no diffusers folder: give --embeddings with it")
        parts = [
            weights_fingerprint(Path(model)),
            *steps.values(),
            *astuple(RECIPE["object"]),
        ]  # vectors depend on these
        folder = FOLDER / "-".join(map(str, parts))
    for kind, names in needed.items():
        missing = [name for name in names if not file_of(folder, f"<{name}>").is_file()]
        concepts = [ConceptSet(f"<{name}>", write_images(name, IMAGES, True), INITIAL[kind], kind) for name in missing]
        if concepts:
            learn(concepts, folder, model=model, device=settings.device, steps=steps[kind])
    return find_vectors([f"<{name}>" for names in needed.values() for name in names], [folder]).vectors


# ---------------------------------------------------------------- sampling and grading


def add_part_rates(
    rates: dict[str, dict[str, float]],
    settings: Settings,
    cases: Sequence[LayoutCase],
    measure: PartMeasure,
    sampler: StableDiffusionSampler,
) -> None:
    """Draw each part of these cases alone, unless `rates` has it, and add {measure: {part: share of right images}} to `rates`."""
    parts = {part for case in cases for part in case.parts}
    sorts = Counter(part.split()[0] for part in parts)
    for part in sorted(parts - rates["strict"].keys()):
        random, count = Random(settings.seed), max(5, settings.alone // sorts[part.split()[0]])
        prompts, answers = zip(*(question(part, random) for _ in range(count)), strict=True)
        requests = [Request(prompt, derived_seed(settings.seed, 1, index)) for index, prompt in enumerate(prompts)]
        images = sample(sampler.sample_images, requests, part)
        for name, values in measure.verdicts(images, answers).items():
            rates[name][part] = float(values.float().mean())


def case_shares(
    settings: Settings,
    name: CaseName,
    cases: Sequence[LayoutCase],
    measure: StrictMeasure,
    sampler: StableDiffusionSampler,
) -> Results:
    """Return {"case, verdict: level or variant": [share]}; write a sheet of each level's first images next to the record."""
    ways: dict[str, tuple[Level, ConductorConfig]] = {level: (level, settings.config) for level in settings.levels}
    if settings.ablation:
        ways = {variant: ("conductor", config) for variant, config in VARIANTS.items()}
    shares: Results = {}
    sheet = []
    for way, (level, config) in ways.items():
        requests = []
        for index, case in enumerate(cases):
            aligned = settings.ablation and way == "with alignment"
            plan = with_reference(case, derived_seed(settings.seed, 3, index)) if aligned else case
            requests.append(LayoutRequest(plan.layout, derived_seed(settings.seed, 2, index)))
        images = sample(partial(compose, sampler, level=level, config=config), requests, f"{name}, {way}")
        own = shares_of([measure.verdict(case, image) for case, image in zip(cases, images.split(1), strict=True)])
        shares |= {f"{name}, {verdict}: {way}": [share] for verdict, share in own.items()}
        sheet.append(images[:SHOWN])
        log(f"{name}, {way}: " + ", ".join(f"{verdict} {share:.3f}" for verdict, share in own.items()))
    columns = [case.title for case in cases[:SHOWN]]
    path = settings.record.with_name(f"{settings.record.stem}_{name}.png")
    labelled_grid(path, torch.cat(sheet), list(ways), columns, name, 1.0)
    return shares


def times(settings: Settings, sampler: StableDiffusionSampler, layout: Layout) -> Results:
    """Time an image of every level, and a plain one without layout, in turn after a warm-up of each.

    Return the seconds of every repeat, the ratios of each level to the plain image, and the peak GB of each warm-up.
    """
    ways: dict[str, Callable[[], Tensor]] = {"plain": partial(sampler.sample_images, [Request(layout.joint, 0)])}
    for level in settings.levels:
        ways[level] = partial(compose, sampler, [LayoutRequest(layout, 0)], level, settings.config)
    memory: Results = {}
    for name, way in ways.items():
        peak_memory(sampler.device, reset=True)
        way()
        memory[f"{name}, GB"] = [peak_memory(sampler.device)]
    results: Results = {f"{name}, s": [] for name in ways}
    for _ in range(settings.repeats):
        for name, way in ways.items():
            results[f"{name}, s"].append(seconds(way, sampler.device))
    for level in settings.levels:
        results[f"{level}, s over plain"] = ratios(results[f"{level}, s"], results["plain, s"])
    return results | memory


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
