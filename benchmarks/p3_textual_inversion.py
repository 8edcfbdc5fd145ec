"""Textual inversion: speed against the plain method, and how well the miniature's held-out objects and styles are learned.

  python benchmarks/p3_textual_inversion.py speed                    steps/s and gradient, side by side
  python benchmarks/p3_textual_inversion.py speed --model random-v1 --init dog --batch 4 --device cuda       memory too
  python benchmarks/p3_textual_inversion.py speed --model random-v1 --init dog --batch 4 --precisions fp32 bf16 fp16 --compile off
  python benchmarks/p3_textual_inversion.py concepts                 every held-out concept, several seeds; continues where it stopped
  python benchmarks/p3_textual_inversion.py concepts --names key fish --seeds 1 --more-vectors 2 4
  python benchmarks/p3_textual_inversion.py concepts --method plain --seconds 30      the plain method, for as long as ours takes
  python benchmarks/p3_textual_inversion.py concepts --ablation --no-captions --seeds 1      objects, parts of the recipe on and off
  python benchmarks/p3_textual_inversion.py graded                   the vectors of `concepts`, graded as in the course

speed     plain_p3.py is the plain method. random-v1 is Stable Diffusion v1 with random weights, on which speed does not depend.
concepts  Share of images that show what the prompt says, for the token and its initial word: by the miniature's scene classifier,
          and strictly, by silhouettes and style as well (p3_strict.py). Images that copy one of the five given ones are counted.
          A question is a kind of prompt, such as object and colour, with the answers that the classifier should give.
graded    25 images per prompt by P3_inference.py, scored by P3_evaluate.py. Baselines come from the nearest ordinary word,
          as dog is for one's own dog: the named kind or style that shares most describing words with the concept. The initial
          words would not do: captions call these very concepts "object" and "unusual". A baseline is the ordinary word's mean
          score over several seeds, plus (image) or minus (text) two standard deviations between seeds, pooled per kind.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count, cycle
from pathlib import Path
from random import Random
from typing import Any, Literal

import repository_root  # noqa: F401  # isort: split
import torch
from torch import Tensor

from benchmarks.p3_learning import (
    INITIAL,
    MODEL,
    NAMES,
    RECIPE,
    SAMPLER,
    SamplerFlags,
    check_model,
    kind_of,
    learn,
    sample,
    write_images,
)
from benchmarks.p3_shape import STYLE, open_autoencoder
from benchmarks.p3_strict import PartMeasure
from benchmarks.plain_p3 import Plain, save_random_v1
from benchmarks.timing import BENCH, first_steps, ratios, report, resolved, seconds
from concepts.dataset import Augmentation, ConceptData, ConceptSet, InversionBatch, Kind, image_files
from concepts.embeddings import file_of, install, read_vectors, save_vectors
from concepts.inversion import TextualInversion, prepare_frozen, weights_fingerprint
from concepts.sampling import Request, StableDiffusionSampler
from concepts.stable_diffusion import load_pipeline
from miniature.diffusion_parts import PARTS
from miniature.judge_model import load_scene_classifier
from miniature.scenery.captions import STYLE_TRAITS, TRAITS, with_article
from miniature.scenery.scenes import BACKGROUNDS, COLOURS, KINDS, STYLES, fits
from runtime.cli import BadInput, check_not_negative, check_positive, log, run_script
from runtime.device import DTYPES, AutoOnOff, Device, Machine, Precision, detect, set_up, should_compile
from runtime.files import ROOT, read_json, write_json
from runtime.images import labelled_grid, open_image
from runtime.record import Record
from runtime.seeds import derived_seed
from training.loop import LoopConfig, Trained, TrainingRun
from training.schedule import LearningRate

CONCEPTS = NAMES["object"] + NAMES["style"]
TOKEN = "<new>"
LR = 5e-3  # of both methods in `speed`: the default of P3_textual_inversion.py
SHOWN = 10  # images of a question on the sheet
COPY = 20  # dB; an image nearer to a given one is a copy
PROMPTS: dict[Kind, tuple[tuple[str, str], ...]] = {  # (prompt, text it is graded against: a caption of the unnamed)
    "object": (
        ("a photo of a {} on a blue background", "a photo of an object on a blue background"),
        ("a {} on the left, outline style", "an object on the left, outline style"),
    ),
    "style": (
        ("a photo of a red star in the style of {}", "a photo of a red star in the style of something unusual"),
        ("a yellow house in the style of {}", "a yellow house in the style of something unusual"),
    ),
}
ABLATION: dict[str, dict[str, Any]] = {  # {label: changes of the recipe of an object}
    "the recipe": {},
    "with mirroring": {"flip": True},
    "weighted loss": {"max_loss_weight": 30.0},
    "no norm limit": {"max_norm": 0.0},
    "embedding noise": {"embedding_noise": 1.0},
    "twice the learning rate": {"lr": 1e-2},
    "30 steps": {"steps": 30},
    "200 steps": {"steps": 200},
    "600 steps": {"steps": 600},
    "4 vectors": {"vectors": 4},
}
Scores = dict[str, list[list[float]]]  # concept -> image and text score of each prompt
Margins = dict[Kind, list[float]]  # what is added to the ordinary word's image and text score


@dataclass(frozen=True)
class Speed:
    """Compare the speed of our training steps with that of the plain method, plain_p3.py."""

    model: str = MODEL
    """Stable Diffusion: a folder, a file, or random-v1."""
    init: str = INITIAL["object"]
    """The token's initial word: a single token of the model's vocabulary."""
    steps: int = 20
    """Steps per repeat."""
    batch: int = 8
    repeats: int = 5
    device: Device = "auto"
    precisions: tuple[Precision, ...] = ("auto",)
    """Precisions of our way, one after another. auto = bf16 where the hardware has it, else fp16 on CUDA, else fp32."""
    compile: AutoOnOff = "auto"
    """torch.compile of our way. auto = on CUDA. The first step, which compiles, is timed apart."""
    seed: int = 0
    record: Path = BENCH / "p3_textual_inversion_speed.json"


@dataclass(frozen=True)
class Concepts(SamplerFlags):
    """Learn held-out objects and styles, and grade images of them."""

    model: str = MODEL
    names: tuple[str, ...] = CONCEPTS
    """Held-out objects and styles."""
    seeds: int = 3
    """Trainings of each concept: one vector for an object, two for a style."""
    more_vectors: tuple[int, ...] = (2, 4)
    """Further numbers of vectors with which each object is learned once."""
    ablation: bool = False
    """Learn the objects with parts of the recipe on and off instead."""
    count: int = 25
    """Images per question."""
    steps: int = 0
    """Steps of a training. 0 = 60 for an object, 800 for a style."""
    batch: int = 0
    """Images per step. 0 = 8 for an object, 24 for a style."""
    seed: int = 0
    """Seed of the first training."""
    device: Device = "auto"
    method: Literal["ours", "plain"] = "ours"
    """plain = textual inversion as widely copied (plain_p3.py), with one vector and learning rate 5e-3."""
    seconds: float = 0
    """Stop the plain method after so many seconds of training. 0 = after the steps."""
    captions: bool = True
    """Give each image sentences about what else it shows. --no-captions = bare images, as a user has them."""
    parts: Path = PARTS
    """Folder that holds vae/, the autoencoder: its copies of renders set the bar for shapes."""
    folder: Path = BENCH / "p3_concepts"
    """Folder for vectors and outcomes, from which a stopped run continues."""
    record: Path = BENCH / "p3_textual_inversion.json"


@dataclass(frozen=True)
class Graded:
    """Grade the vectors of `concepts` as the course does."""

    model: str = MODEL
    clip: str = "runs/miniature/clip"
    names: tuple[str, ...] = CONCEPTS
    """Held-out objects and styles."""
    repeats: int = 6
    """Seeds of the ordinary words' images, 2 or more. With few, the standard deviation between them is a matter of chance."""
    seed: int = 0
    device: Device = "auto"
    concepts: Path = BENCH / "p3_concepts"
    """--folder of `concepts`, which holds the learned vectors."""
    folder: Path = BENCH / "p3_course"
    """Folder for input.json, images and grades."""
    record: Path = BENCH / "p3_course.json"


def main(settings: Speed | Concepts | Graded) -> None:
    """Run one of the three measurements, print its numbers and write its record."""
    check_model(settings.model)
    machine = detect(settings.device)
    record = Record(settings, machine)
    if isinstance(settings, Speed):
        check_positive(settings, "steps", "batch", "repeats")
        compare_speed(settings, record)
    else:
        if unknown := set(settings.names) - set(CONCEPTS):
            raise BadInput(f"--names {', '.join(sorted(unknown))}: known are {', '.join(CONCEPTS)}")
        if not settings.names:
            raise BadInput("--names: give at least one")
        measure_concepts(settings, record) if isinstance(settings, Concepts) else grade_course(settings, record)
    report(record, settings.record)


# ---------------------------------------------------------------- speed


def compare_speed(settings: Speed, record: Record) -> None:
    """Add seconds per step, ratios, the difference of the gradients, and on a GPU the peak memory of each way to the record.

    The ways take turns, so that a busy machine slows both alike.
    """
    machine, device = record.machine, record.machine.device
    kinds = resolved(settings.precisions, machine)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = save_random_v1(folder / "v1") if settings.model == "random-v1" else settings.model
        settings = replace(settings, model=model)
        concept = ConceptSet(TOKEN, write_images("fish", folder, False), settings.init)
        set_up("fp32", machine)  # without TF32, which would round both
        record.add_repeats({"gradient, relative difference": [gradient_difference(settings, concept, device)]})
        samples = samples_of(settings, concept, device)
        plain = first_steps(record, "plain", partial(plain_step, settings, concept, samples))

        for kind in kinds:
            only = "" if len(kinds) == 1 else f", {kind}"
            build = partial(our_step, settings, concept, machine, kind, folder / kind)
            steps = {"plain": plain, "ours": first_steps(record, f"ours{only}", build)}
            wall: dict[str, list[float]] = {name: [] for name in steps}
            cpu: dict[str, list[float]] = {name: [] for name in steps}  # which other programs don't affect
            for _ in range(settings.repeats):
                for name, step in steps.items():
                    start = time.process_time()
                    wall[name].append(seconds(step, device, settings.steps) / settings.steps)
                    cpu[name].append((time.process_time() - start) / settings.steps)
            record.add_repeats({"plain, s per step, fp32": wall["plain"], f"ours, s per step, {kind}": wall["ours"]})
            record.add_repeats({f"times faster{only}": ratios(wall["plain"], wall["ours"])})
            record.add_repeats({f"times faster, by processor time{only}": ratios(cpu["plain"], cpu["ours"])})
            record.save(settings.record)  # for one that is stopped at its limit
            del steps, step  # before the next one is loaded
            gc.collect()


def prepare(
    settings: Speed, concept: ConceptSet, device: torch.device, dtype: torch.dtype
) -> tuple[TextualInversion, ConceptData]:
    """Return the frozen model with the concept's token, and the concept's encoded images."""
    pipe = load_pipeline(settings.model, device, dtype)
    inversion = TextualInversion(pipe, [concept], settings.seed)
    data = ConceptData(pipe, concept, settings.seed, Augmentation())
    pipe.vae.to("cpu")
    return inversion, data


def samples_of(settings: Speed, concept: ConceptSet, device: torch.device) -> list[InversionBatch]:
    """Return the training samples of our first `steps` steps, a batch each."""
    _, data = prepare(settings, concept, device, torch.float32)
    return [data.batch(step, slice(settings.batch), settings.batch) for step in range(settings.steps)]


def plain_step(settings: Speed, concept: ConceptSet, samples: Sequence[InversionBatch]) -> Callable[[], None]:
    """Return a function that takes a training step of plain_p3.py on the next batch of `samples`, which repeat."""
    method, batches = Plain(settings.model, concept, samples[0].t.device, LR), cycle(samples)
    return lambda: method.step(next(batches))


def our_step(
    settings: Speed, concept: ConceptSet, machine: Machine, precision: Precision, folder: Path
) -> Callable[[], None]:
    """Return a function that takes a step of P3_textual_inversion.py with the learning rate, norm limit and loss of recipe v1."""
    device, batch = machine.device, settings.batch
    set_up(precision, machine)
    inversion, data = prepare(settings, concept, device, DTYPES[precision])
    worthwhile = settings.compile == "on" or device.type == "cuda"
    prepare_frozen(inversion.pipe, precision, worthwhile and should_compile(settings.compile, machine))
    embeddings = inversion.embeddings.learned
    optimizer = torch.optim.AdamW(embeddings.parameters(), weight_decay=0.0, fused=device.type in ("cuda", "cpu"))
    config = LoopConfig("benchmark", folder, 10**9, batch, LearningRate(LR, 25, 0.5), save_every=0, precision=precision)
    run = TrainingRun(config, {}, Trained(embeddings, optimizer), Record(settings, machine), resume=False)
    steps = iter(run)

    def step() -> None:
        samples = data.batch(next(steps), slice(batch), batch)
        run.update(inversion.loss(samples), after_step=partial(inversion.cap_norms, 1.0))

    return step


def gradient_difference(settings: Speed, concept: ConceptSet, device: torch.device) -> float:
    """Return |ours - plain| / |plain| for the gradient of the new token's embedding, in fp32 on the same samples."""
    inversion, data = prepare(settings, concept, device, torch.float32)
    samples = data.batch(0, slice(settings.batch), settings.batch)
    inversion.loss(samples).backward()
    ours = inversion.embeddings.learned.weight.grad
    theirs = Plain(settings.model, concept, device, LR).gradient(samples)
    assert ours is not None
    return float((ours[0] - theirs).norm() / theirs.norm())


# ---------------------------------------------------------------- concepts


def measure_concepts(settings: Concepts, record: Record) -> None:
    """Learn every concept with every seed, ask all questions, and add shares and seconds to the record."""
    check_positive(settings, "seeds", "count", "sampling_steps")
    check_not_negative(settings, "steps", "batch", "seconds")
    if settings.seconds and settings.method == "ours":
        raise BadInput(f"--seconds {settings.seconds}: goes with --method plain")
    if settings.ablation and settings.method == "plain":
        raise BadInput("--ablation: changes our recipe, leave --method plain out")
    set_up("fp32", record.machine)
    device = record.machine.device
    measure = PartMeasure(load_scene_classifier(device), open_autoencoder(settings.parts, device))
    weights = weights_fingerprint(Path(settings.model))
    outcomes: list[dict[str, Any]] = []
    results: dict[str, list[float]] = {}
    for name, seed, label, change in trials_of(settings):
        kind = kind_of(name)
        recipe = asdict(RECIPE[kind]) | change
        facts = recipe | {
            "name": name,
            "change": change,
            "seed": settings.seed + seed,
            "steps": settings.steps or recipe["steps"],
            "batch": settings.batch or recipe["batch"],
            "count": settings.count,
            "initial": not label and seed == 0,  # ask about the initial word too
            "weights": weights,
            "method": settings.method,
            "limit": settings.seconds,
            "captions": settings.captions,
            "sampler": [settings.solver, settings.sampling_steps, settings.guidance],
        }
        outcomes.append(outcome(facts, settings, measure))
        vectors = recipe["vectors"]
        for question, words in outcomes[-1]["shares"].items():
            for word, shares in words.items():
                learned = label or f"{vectors} vector{'s' * (vectors > 1)}"
                who = learned if word == "learned" else "initial word"
                for name_of_measure, share in shares.items():
                    results.setdefault(f"{question}, {name_of_measure}: {who}", []).append(share)
        results.setdefault(f"training of one {kind}, s", []).append(outcomes[-1]["seconds"])
    record.metrics["outcomes"] = outcomes
    record.add_repeats(results)


def trials_of(settings: Concepts) -> list[tuple[str, int, str, dict[str, Any]]]:
    """Return (concept, offset of the seed, label, changes of the recipe) for every training. Label "" = the recipe itself."""
    objects = [name for name in settings.names if kind_of(name) == "object"]
    seeds = range(settings.seeds)
    if settings.ablation:
        return [(name, seed, label, change) for label, change in ABLATION.items() for name in objects for seed in seeds]
    own = [(name, seed, "", dict[str, Any]()) for name in settings.names for seed in seeds]
    more = [(name, 0, f"{n} vectors", {"vectors": n}) for n in settings.more_vectors for name in objects]
    return own + more


def outcome(facts: dict[str, Any], settings: Concepts, measure: PartMeasure) -> dict[str, Any]:
    """Return {"facts", "seconds", "shares"} of one training.

    They are read from its folder if the facts are the same. Else learn, sample every question's prompts and grade the images.
    """
    name, vectors, seed = facts["name"], facts["vectors"], facts["seed"]
    way = ["plain"] * (facts["method"] == "plain") + ["bare"] * (not facts["captions"])
    way += [f"{flag}_{value}" for flag, value in facts["change"].items() if flag != "vectors"]
    folder = settings.folder / "-".join([name, str(vectors), str(seed), *way])
    file = folder / "outcome.json"
    if file.is_file() and (earlier := read_json(file))["facts"] == facts:
        log(f"{folder}: kept from before")
        return dict(earlier)

    kind = kind_of(name)
    concept = ConceptSet(TOKEN, write_images(name, folder, facts["captions"]), INITIAL[kind], kind, vectors)
    if facts["method"] == "plain":
        taken = learn_plainly(settings.model, concept, folder, facts, measure.classifier.device)
    else:
        flags = {flag: facts[flag] for flag in {"steps", "batch", "seed", *facts["change"]} - {"vectors"}}
        timings = learn([concept], folder, model=settings.model, device=settings.device, **flags)["timings_s"]
        taken = timings["training"] - timings["validation"]

    pipe = load_pipeline(settings.model, measure.classifier.device, torch.float32)
    install(pipe, read_vectors(file_of(folder, TOKEN)))
    sampler = StableDiffusionSampler(pipe, settings.sampler_config())
    originals = torch.stack([open_image(path) for path in image_files(concept.images)])
    shares: dict[str, dict[str, dict[str, float]]] = {}
    sheet: list[Tensor] = []
    words = {"learned": TOKEN} | ({"initial": INITIAL[kind]} if facts["initial"] else {})
    for question, (prompts, answers) in questions_of(name, facts["count"], seed).items():
        shares[question] = {}
        for who, word in words.items():
            requests = [Request(text.format(word), derived_seed(seed, index)) for index, text in enumerate(prompts)]
            images = sample(sampler.sample_images, requests, f"{question}, {who}")
            rows = [dict(zip(answers, values, strict=True)) for values in zip(*answers.values(), strict=True)]
            verdicts = measure.verdicts(images, rows) | {"copies": is_copy(images, originals)}
            shares[question][who] = {name: float(values.float().mean()) for name, values in verdicts.items()}
            if who == "learned":
                sheet.append(images[:SHOWN])
        log(f"{folder.name}, {question}: {shares[question]}")
    labels = [question.replace(", ", ",\n").replace(" and ", "\nand ") for question in shares]
    labelled_grid(folder / "images.png", torch.cat(sheet), labels, [""] * len(sheet[0]), folder.name, 1.0)
    result = {"facts": facts, "seconds": round(taken, 1), "shares": shares}
    write_json(file, result)
    return result


def learn_plainly(model: str, concept: ConceptSet, folder: Path, facts: dict[str, Any], device: torch.device) -> float:
    """Learn by the plain method for the facts' `steps`, or for `limit` seconds unless that is 0. Save the vector, return the seconds."""
    pipe = load_pipeline(model, device, torch.float32)
    TextualInversion(pipe, [concept], facts["seed"])  # its tokenizer knows the token
    data = ConceptData(pipe, concept, facts["seed"], Augmentation(flip=facts["flip"]))
    method, batch, start = Plain(model, concept, device, LR), facts["batch"], time.perf_counter()
    for step in count():
        taken = time.perf_counter() - start
        if taken >= facts["limit"] if facts["limit"] else step == facts["steps"]:
            break
        method.step(data.batch(step, slice(batch), batch))
    save_vectors(
        file_of(folder, TOKEN), TOKEN, method.table[-1:].detach().cpu(), f"{model}, plain method, {step} steps"
    )
    return taken


def is_copy(images: Tensor, originals: Tensor) -> Tensor:
    """Return [N] bool: whether the PSNR of an image [N,3,H,W] uint8 to an original exceeds 20 dB. The autoencoder's copies have 24."""
    errors = (images.cpu().float()[:, None] - originals.float()).square().mean((2, 3, 4)).amin(1)
    return errors < 255**2 * 10 ** (-COPY / 10)


def questions_of(name: str, count: int, seed: int) -> dict[str, tuple[list[str], dict[str, list[str]]]]:
    """Return {question: (`count` prompts with {} for the token, answers that the scene classifier should give)}."""
    random = Random(derived_seed(seed, 17))
    if kind_of(name) == "style":
        kinds = [random.choice(KINDS) for _ in range(count)]
        prompts = [f"a photo of {with_article(kind)} in the style of {{}}" for kind in kinds]
        return {"style and object": (prompts, {"style": [name] * count, "kind": kinds})}
    grounds = [random.choice(list(BACKGROUNDS)) for _ in range(count)]
    colours = [random.choice(list(COLOURS)) for _ in range(count)]
    fitting = [random.choice([ground for ground in BACKGROUNDS if fits(colour, ground)]) for colour in colours]
    coloured = [with_article(f"{colour} {{}}") for colour in colours]
    behind = {ground: f" on {with_article(ground)} background" for ground in BACKGROUNDS}
    both = [text + behind[ground] for text, ground in zip(coloured, fitting, strict=True)]
    kind = {"kind": [name] * count}
    return {
        "object": (["a photo of a {}"] * count, kind),
        "object and colour": ([f"a photo of {text}" for text in coloured], kind | {"colour": colours}),
        "object and background": ([f"a {{}}{behind[ground]}" for ground in grounds], kind | {"background": grounds}),
        "object, colour and background": (both, kind | {"colour": colours, "background": fitting}),
        "object, colour, background and style": (
            [f"{text} in the style of {STYLE}" for text in both],
            kind | {"colour": colours, "background": fitting, "style": [STYLE] * count},
        ),
    }


# ---------------------------------------------------------------- the course's grades


def grade_course(settings: Graded, record: Record) -> None:
    """Sample and grade the ordinary words, set the baselines, grade the learned vectors, and add the shares to the record."""
    if settings.repeats < 2:
        raise BadInput(f"--repeats {settings.repeats}: a deviation takes two or more")
    folder, names = settings.folder, settings.names
    vectors = {}
    for name in names:
        file = file_of(settings.concepts / f"{name}-{RECIPE[kind_of(name)].vectors}-{settings.seed}", TOKEN)
        if not file.is_file():
            raise BadInput(f"{file} does not exist: `p3_textual_inversion.py concepts` makes it")
        vectors[name] = read_vectors(file)[TOKEN]

    # a concept's token stands for its vectors in one folder, for its ordinary word in the other
    pipe = load_pipeline(settings.model, torch.device("cpu"), torch.float32)
    table = pipe.text_encoder.get_input_embeddings().weight
    for name in names:
        write_images(name, folder / "references", False)
        token, word = token_of(name), ordinary_word(name)
        (index,) = pipe.tokenizer(word, add_special_tokens=False).input_ids
        save_vectors(file_of(folder / "learned", token), token, vectors[name], f"{settings.concepts}")
        save_vectors(file_of(folder / "ordinary", token), token, table[index][None], word)

    write_input(folder / "input.json", names, {}, {})
    seeds = range(settings.seed + 1, settings.seed + 1 + settings.repeats)
    rounds: list[Scores] = []
    for seed in seeds:
        rounds.append({})
        for case in grade(settings, "ordinary", seed):
            rounds[-1].setdefault(case["key"], []).append([case["image_score"], case["text_score"]])
    baselines, margins = baselines_of(rounds)
    write_input(folder / "input.json", names, baselines, margins)
    record.metrics |= {"cases": grade(settings, "learned", settings.seed), "margins": margins}
    record.add_repeats({"share of cases passed": [float(case["passed"]) for case in record.metrics["cases"]]})
    print(f"margins {margins}; input.json, images and grades: {folder}")


def grade(settings: Graded, vectors: str, seed: int) -> list[dict[str, Any]]:
    """Sample 25 images per prompt of input.json with the vectors of folder `vectors`; return P3_evaluate.py's grades per prompt."""
    folder = settings.folder
    images, grades = folder / "images" / f"{vectors}-{seed}", folder / "grades" / f"{vectors}-{seed}"
    common = ["--input", folder / "input.json", "--device", settings.device]
    sample = ["P3_inference.py", "--model", settings.model, "--embeddings", folder / vectors]
    sample += [
        "--sampler",
        SAMPLER.solver,
        "--guidance",
        SAMPLER.guidance.scale,
        "--output",
        images,
        "--seed",
        seed,
        "--record",
        grades / "inference.json",
    ]
    score = ["P3_evaluate.py", "--images", images, "--references", folder / "references"]
    score += ["--clip", settings.clip, "--output", grades]
    for script, *flags in (sample, score):
        command = [sys.executable, str(ROOT / str(script)), *map(str, flags + common)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return list(read_json(grades / "record.json")["metrics"]["cases"])


def write_input(path: Path, names: Sequence[str], baselines: Scores, margins: Margins) -> None:
    """Write the course's input.json; a concept without baselines has zeros."""
    entries = {}
    for name in names:
        kind, token = kind_of(name), token_of(name)
        entries[name] = {
            "src_image": "object",
            "token_name": token,
            "prompt": [text.format(token) for text, _ in PROMPTS[kind]],
            "prompt_4_clip_eval": [plain for _, plain in PROMPTS[kind]],
            "baseline": baselines.get(name, [[0, 0]] * len(PROMPTS[kind])),
            "baseline word": ordinary_word(name),
            "margin over the baseline word": margins.get(kind, [0, 0]),
        }
    write_json(path, entries)


def baselines_of(rounds: Sequence[Scores]) -> tuple[Scores, Margins]:
    """Return the mean over `rounds`, one per seed, of every score with its margin added, and the margins.

    A margin is twice the standard deviation between seeds, pooled over all prompts of a kind: up for image, down for text.
    """
    baselines: Scores = {}
    margins: Margins = {}
    for kind in PROMPTS:
        names = [name for name in rounds[0] if kind_of(name) == kind]
        if not names:
            continue
        scores = torch.tensor([[values for name in names for values in scores[name]] for scores in rounds])
        margin = 2 * scores.var(0).mean(0).sqrt() * torch.tensor([1.0, -1.0])
        margins[kind] = rounded(margin)
        means = iter(scores.mean(0) + margin)
        baselines |= {name: [rounded(next(means)) for _ in rounds[0][name]] for name in names}
    return baselines, margins


def rounded(values: Tensor) -> list[float]:
    """Return numbers as input.json has them: two decimals."""
    return [round(x, 2) for x in values.tolist()]


def ordinary_word(name: str) -> str:
    """Return the kind or style, known by name, that shares most describing words with a held-out one; of several, the first."""
    traits, named = (STYLE_TRAITS, STYLES) if kind_of(name) == "style" else (TRAITS, KINDS)
    return max(named, key=lambda other: sum({name, other} <= set(holders) for holders in traits.values()))


def token_of(name: str) -> str:
    """Return <fish> for fish."""
    return f"<{name}>"


if __name__ == "__main__":
    command: Any = Speed | Concepts | Graded  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
