"""Textual inversion: speed against the plain method, and on the miniature what the judge and the course's grader see of what was learned.

  python benchmarks/p3_textual_inversion.py speed                    steps/s and gradient, side by side
  python benchmarks/p3_textual_inversion.py speed --model random-v1 --init dog --batch 4 --device cuda       memory too
  python benchmarks/p3_textual_inversion.py concepts                 held-out objects and styles, several seeds; goes on where it stopped
  python benchmarks/p3_textual_inversion.py concepts --names key fish --seeds 1 --more-vectors 2 4
  python benchmarks/p3_textual_inversion.py graded                   with what `concepts` learned: the course's 25 pictures and its grades

random-v1 is Stable Diffusion v1 with random weights: speed and memory don't depend on what it knows. plain_p3.py is the plain method.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import repository_root  # noqa: F401  # isort: split
import torch
import tyro

from benchmarks.p3_course import Course, token_of
from benchmarks.p3_learning import (
    BATCHES,
    EMBEDDING_NOISE,
    INITIAL,
    LR,
    MAX_LOSS_WEIGHT,
    STEPS,
    TOKEN,
    VECTORS,
    ZOOM_OUT,
    Trial,
    kind_of,
    mean_rates,
    outcome,
    pictures_of,
)
from benchmarks.plain_p3 import Plain, save_random_v1
from concepts.dataset import Augmentation, ConceptData, ConceptSet
from concepts.embeddings import file_of, read_vectors, save_vectors
from concepts.inversion import TextualInversion, prepare_frozen
from concepts.stable_diffusion import load_pipeline
from miniature.judge_model import load_scene_classifier
from miniature.scenery.scenes import HELD_OUT_KINDS, HELD_OUT_STYLES
from runtime.cli import BadInput, check_not_negative, check_positive, log, run_script
from runtime.device import AutoOnOff, Device, Machine, Precision, detect, set_up, should_compile
from runtime.files import ROOT, atomic
from runtime.record import Record
from training.loop import LoopConfig, Trained, TrainingRun
from training.schedule import LearningRate

MODEL = "runs/miniature/stable_diffusion"
BENCH = ROOT / "runs" / "bench"
LEARNING_RATE = 5e-3  # P3_textual_inversion.py's default, for both methods
WANTED = {
    "object": 0.93,
    "object and colour": 0.80,
    "object and background": 0.80,
    "style and object": 0.75,
}


@dataclass(frozen=True)
class Speed:
    """Ours against the plain method."""

    model: str = MODEL
    """A folder, a file, or random-v1."""
    init: str = INITIAL["fish"]
    """An ordinary word of the model."""
    steps: int = 20
    """Of each repeat."""
    batch: int = 8
    repeats: int = 5
    device: Device = "auto"
    precision: Precision = "auto"
    """Of our way."""
    compile: AutoOnOff = "auto"
    """Of our way; the first step, which compiles, is timed apart."""
    seed: int = 0
    record: Path = BENCH / "p3_textual_inversion_speed.json"


@dataclass(frozen=True)
class Concepts:
    """What is learned of every held-out object and style."""

    model: str = MODEL
    names: tuple[str, ...] = HELD_OUT_KINDS + HELD_OUT_STYLES
    seeds: int = 3
    """With as many vectors as are usual: one for an object, two for a style."""
    more_vectors: tuple[int, ...] = (2, 4)
    """Objects are learned with so many too, with one seed."""
    count: int = 25
    """Pictures of every question."""
    steps: int = 0
    """0: 200 for an object, 800 for a style."""
    batch: int = 0
    """0: 8 for an object, 24 for a style."""
    lr: float = LR
    max_norm: float = 1.0
    max_loss_weight: float = MAX_LOSS_WEIGHT
    embedding_noise: float = EMBEDDING_NOISE
    zoom_out: float = ZOOM_OUT
    captions: bool = True
    """Learns from sentences that tell what else each picture shows."""
    seed: int = 0
    """The first one."""
    device: Device = "auto"
    precision: Precision = "auto"
    folder: Path = BENCH / "p3_concepts"
    """Vectors and outcomes, one folder each: what is there is not made again."""
    record: Path = BENCH / "p3_textual_inversion.json"


@dataclass(frozen=True)
class Graded:
    """The course's routine, with the vectors that `concepts` left."""

    model: str = MODEL
    clip: str = "runs/miniature/clip"
    names: tuple[str, ...] = HELD_OUT_KINDS + HELD_OUT_STYLES
    repeats: int = 6
    """Seeds of the plain words' pictures: baselines lie two standard deviations between them above (text: below) their mean. By three, the
    deviation would be a matter of chance."""
    seed: int = 0
    device: Device = "auto"
    concepts: Path = BENCH / "p3_concepts"
    folder: Path = BENCH / "p3_course"
    """input.json, pictures, grades."""
    record: Path = BENCH / "p3_course.json"


def main(settings: Speed | Concepts | Graded) -> None:
    """Run one of the three measurements."""
    if isinstance(settings, Speed):
        check_positive(settings, "steps", "batch", "repeats")
        compare_speed(settings)
        return
    if unknown := set(settings.names) - set(INITIAL):
        raise BadInput(f"--names {', '.join(sorted(unknown))}: known are {', '.join(INITIAL)}")
    measure_concepts(settings) if isinstance(settings, Concepts) else grade_course(settings)


# ---------------------------------------------------------------- speed


def compare_speed(settings: Speed) -> None:
    """Print both speeds, their ratio, the gradients' difference and, on a GPU, the memory; write the record."""
    machine = detect(settings.device)
    record, device = Record(settings, machine), machine.device
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = save_random_v1(folder / "v1") if settings.model == "random-v1" else settings.model
        settings = replace(settings, model=model)
        concept = ConceptSet("<bench>", pictures_of("fish", folder, False), settings.init)
        set_up("fp32", machine)  # without TF32, which would round both
        difference = gradient_difference(settings, concept, device)
        found = side_by_side(settings, concept, machine, folder / "run")
    ratios = {
        kind: [plain / ours for plain, ours in zip(found[f"plain{kind}_s"], found[f"ours{kind}_s"], strict=True)]
        for kind in ("", "_cpu")
    }
    record.metrics |= {"precision": found["precision"], "first_s": found["first_s"]}
    record.add_repeats(
        {"plain, s per step, fp32": found["plain_s"], f"ours, s per step, {found['precision']}": found["ours_s"]}
    )
    record.add_repeats({"times faster": ratios[""], "times faster, by processor time": ratios["_cpu"]})
    record.add_repeats(
        {f"{name}, GB": [found[f"{name}_bytes"] / 1e9] for name in ("plain", "ours") if device.type == "cuda"}
    )
    record.add_repeats({"gradient, relative difference": [difference]})
    record.save(settings.record)
    for name, told in (("ours", found["precision"]), ("plain", "fp32, eager")):
        speed = 1 / statistics.mean(found[f"{name}_s"])
        memory = f", {found[f'{name}_bytes'] / 1e9:.2f} GB at most" if device.type == "cuda" else ""
        print(f"{name:<6}{speed:8.2f} steps/s of {settings.batch}, {told}{memory}")
    for title, values in (("ratio", ratios[""]), ("of CPU time", ratios["_cpu"])):
        if device.type == "cpu" or title == "ratio":
            print(f"{title:<12}{statistics.mean(values):6.2f} +- {statistics.pstdev(values):.2f}")
    print(f"gradient in fp32 differs by {difference:.1e}")
    print(f"our first step took {found['first_s']:.1f} s")
    log(f"record: {settings.record}")


def side_by_side(settings: Speed, concept: ConceptSet, machine: Machine, folder: Path) -> dict[str, Any]:
    """Return seconds per step, in turn, so that a busy machine disturbs both alike; on a GPU the peak memory of each alone."""
    device = machine.device
    precision = set_up(settings.precision, machine)
    _, data = prepared(settings, concept, device, torch.float32)
    samples = [data.batch(step, slice(settings.batch), settings.batch) for step in range(settings.steps)]

    def plain() -> Callable[[int], object]:
        method = Plain(settings.model, concept, device, LEARNING_RATE)
        return lambda step: method.step(samples[step % len(samples)])

    def ours() -> Callable[[int], object]:
        return our_step(settings, concept, machine, folder)

    found: dict[str, Any] = {"plain_s": [], "ours_s": [], "plain_cpu_s": [], "ours_cpu_s": [], "precision": precision}
    if device.type == "cuda":
        found |= {"plain_bytes": peak_bytes(plain, device), "ours_bytes": peak_bytes(ours, device)}
    steps = {"plain": plain(), "ours": ours()}
    found["first_s"] = seconds_per_step(steps["ours"], 1, device)[0]
    steps["plain"](0)
    for _ in range(settings.repeats):
        for name, step in steps.items():
            wall, cpu = seconds_per_step(step, settings.steps, device)
            found[f"{name}_s"].append(wall)
            found[f"{name}_cpu_s"].append(cpu)
    return found


def prepared(
    settings: Speed, concept: ConceptSet, device: torch.device, dtype: torch.dtype
) -> tuple[TextualInversion, ConceptData]:
    """Return the frozen model with the concept's token, and its encoded images."""
    pipe = load_pipeline(settings.model, device, dtype)
    inversion = TextualInversion(pipe, [concept], settings.seed)
    data = ConceptData(pipe, concept, settings.seed, Augmentation())
    pipe.vae.to("cpu")
    return inversion, data


def our_step(settings: Speed, concept: ConceptSet, machine: Machine, folder: Path) -> Callable[[int], object]:
    """Return the step of P3_textual_inversion.py with its defaults."""
    device, batch = machine.device, settings.batch
    precision = set_up(settings.precision, machine)
    inversion, data = prepared(settings, concept, device, torch.bfloat16 if precision == "bf16" else torch.float32)
    worthwhile = settings.compile == "on" or device.type == "cuda"
    prepare_frozen(inversion.pipe, precision, worthwhile and should_compile(settings.compile, machine))
    embeddings = inversion.embeddings.learned
    optimizer = torch.optim.AdamW(embeddings.parameters(), weight_decay=0.0, fused=device.type in ("cuda", "cpu"))
    config = LoopConfig("benchmark", folder, 10**9, batch, LearningRate(LEARNING_RATE, 25, 0.5), save_every=0)
    run = TrainingRun(config, {}, Trained(embeddings, optimizer), Record(settings, machine), resume=False)
    steps = iter(run)

    def step(_: int) -> None:
        samples = data.batch(next(steps), slice(batch), batch)
        run.update(inversion.loss(samples), after_step=partial(inversion.cap_norms, 1.0))

    return step


def seconds_per_step(work: Callable[[int], object], steps: int, device: torch.device) -> tuple[float, float]:
    """Return the seconds per step: wall time, and CPU time, which other programs don't affect."""
    synchronize(device)
    start, cpu = time.perf_counter(), time.process_time()
    for index in range(steps):
        work(index)
    synchronize(device)
    return (time.perf_counter() - start) / steps, (time.process_time() - cpu) / steps


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(build: Callable[[], Callable[[int], object]], device: torch.device) -> int:
    """Return the peak memory of loading and two steps, with nothing else on the GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step = build()
    step(0), step(1)
    return torch.cuda.max_memory_allocated(device)


def gradient_difference(settings: Speed, concept: ConceptSet, device: torch.device) -> float:
    """Return the relative difference of the new row's gradients in fp32 on the same samples."""
    inversion, data = prepared(settings, concept, device, torch.float32)
    samples = data.batch(0, slice(settings.batch), settings.batch)
    inversion.loss(samples).backward()
    ours = inversion.embeddings.learned.weight.grad
    theirs = Plain(settings.model, concept, device, LEARNING_RATE).gradient(samples)
    assert ours is not None
    return float((ours[0] - theirs).norm() / theirs.norm())


# ---------------------------------------------------------------- concepts


def measure_concepts(settings: Concepts) -> None:
    """Learn every concept with every seed, ask all questions, print the table and write the record."""
    check_positive(settings, "seeds", "count")
    check_not_negative(settings, "steps", "batch")
    if not settings.names:
        raise BadInput("--names: give at least one")
    machine = detect(settings.device)
    set_up("fp32", machine)
    record, judge = Record(settings, machine), load_scene_classifier(machine.device)
    with record.timed("learning and drawing"):
        outcomes = [outcome(trial, judge, settings.folder) for trial in trials_of(settings)]
    seconds = [made["seconds"] for made in outcomes]
    rates = mean_rates(outcomes)
    record.metrics = {"outcomes": outcomes, "longest_s": max(seconds)}
    record.add_repeats(
        {f"{question}: {who}": shares for question, columns in rates.items() for who, shares in columns.items()}
    )
    record.save(settings.record)
    lines = [
        *table(rates),
        f"a concept took {statistics.mean(seconds):.0f} s of training, at most {max(seconds):.0f} s",
    ]
    with atomic(settings.record.with_suffix(".txt")) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    log(f"record: {settings.record}; the table: {settings.record.with_suffix('.txt')}")


def trials_of(settings: Concepts) -> list[Trial]:
    """Return the usual vectors with every seed, the initial word with the first, then more vectors for the objects."""
    cases = [(name, VECTORS[kind_of(name)], seed) for name in settings.names for seed in range(settings.seeds)]
    cases += [(name, n, 0) for n in settings.more_vectors for name in settings.names if name in HELD_OUT_KINDS]
    return [
        Trial(
            name,
            vectors,
            flags_of(settings, name, settings.seed + seed),
            settings.count,
            settings.captions,
            vectors == VECTORS[kind_of(name)] and not seed,
        )
        for name, vectors, seed in cases
    ]


def flags_of(settings: Concepts, name: str, seed: int) -> dict[str, Any]:
    """Return the flags of P3_textual_inversion.py for this concept and seed."""
    same = ("model", "lr", "max_norm", "max_loss_weight", "embedding_noise", "zoom_out", "device", "precision")
    return {flag: getattr(settings, flag) for flag in same} | {
        "steps": settings.steps or STEPS[kind_of(name)],
        "batch": settings.batch or BATCHES[kind_of(name)],
        "seed": seed,
    }


def table(rates: dict[str, dict[str, list[float]]]) -> list[str]:
    """Return a line per question and column: mean, spread over concepts and seeds, target."""
    lines = [f"{'share of pictures that are right':<34}{'of':<14}{'mean':>7}{'spread':>8}{'runs':>6}{'wanted':>8}"]
    for question, columns in rates.items():
        for who, shares in columns.items():
            wanted = f"{WANTED[question]:8.2f}" if question in WANTED and who != "initial word" else ""
            numbers = f"{statistics.mean(shares):7.3f}{statistics.pstdev(shares):8.3f}{len(shares):6d}"
            lines.append(f"{question:<34}{who:<14}{numbers}{wanted}")
    return lines


# ---------------------------------------------------------------- the course's grades


def grade_course(settings: Graded) -> None:
    """Make baselines, images and grades; print how many cases passed."""
    if settings.repeats < 2:
        raise BadInput(f"--repeats {settings.repeats}: a deviation takes two or more")
    machine = detect(settings.device)
    record, vectors = Record(settings, machine), {}
    for name in settings.names:
        learned = file_of(settings.concepts / f"{name}-{VECTORS[kind_of(name)]}-{settings.seed}", TOKEN)
        if not learned.is_file():
            raise BadInput(f"{learned} does not exist: `p3_textual_inversion.py concepts` makes it")
        vectors[name] = file_of(settings.folder / "vectors", token_of(name))
        save_vectors(vectors[name], token_of(name), read_vectors(learned)[TOKEN], f"{learned}")
    course = Course(settings.model, settings.clip, settings.folder, settings.repeats, settings.seed, settings.device)
    with record.timed("drawing and grading"):
        record.metrics = course.graded(vectors)
    record.add_repeats({"share of cases passed": [float(case["passed"]) for case in record.metrics["cases"]]})
    record.save(settings.record)
    print(
        f"{record.metrics['passed']} of {len(record.metrics['cases'])} cases passed; margins {record.metrics['margins']}"
    )
    log(f"record: {settings.record}; input.json, pictures and grades: {settings.folder}")


if __name__ == "__main__":
    command: Any = (  # tyro makes a subcommand of each
        Annotated[Speed, tyro.conf.subcommand("speed")]
        | Annotated[Concepts, tyro.conf.subcommand("concepts")]
        | Annotated[Graded, tyro.conf.subcommand("graded")]
    )
    run_script(main, command, __doc__)
