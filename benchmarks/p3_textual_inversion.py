"""Textual inversion on the miniature: speed against the plain method, and what the judge sees in pictures of what was learned.

  python benchmarks/p3_textual_inversion.py speed                    steps/s and gradient, side by side
  python benchmarks/p3_textual_inversion.py speed --model sd-v1-4.ckpt --init dog --device cuda
  python benchmarks/p3_textual_inversion.py concepts                 held-out objects and styles, several seeds
  python benchmarks/p3_textual_inversion.py concepts --names key fish --seeds 1 --vectors 1 2 4

Plain is the method as widely copied: the text encoder's whole table is the parameter of AdamW, its old rows are put back after every step,
each step's pictures go through the autoencoder; fp32, eager.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accelerate import Accelerator

from diffusion.guidance import Guidance
from miniature.judge_model import Judge, load_judge
from miniature.scenes import BACKGROUNDS, COLOURS, HELD_OUT_KINDS, HELD_OUT_STYLES, KINDS, fits
from miniature.world import concept_scenes, write_pictures
from P3_concepts import Concept, read_pictures, square
from P3_drawing import Manner, Order, Painter
from P3_embeddings import install
from P3_inversion import Learner, Sample
from P3_inversion_run import Recipe, Run
from P3_model import load_pipeline
from runtime.cli import BadInput, note, require_positive, run_script
from runtime.device import Precision, detect, set_up
from runtime.generation import derived_seed
from runtime.record import Record

ROOT = Path(__file__).resolve().parents[1]
MODEL = "runs/miniature/stable_diffusion"
INITIAL = {
    "key": "cross",
    "fish": "heart",
    "mushroom": "tree",
    "cup": "house",
    "relief": "flat",
    "ripple": "watercolour",
}  # the nearest ordinary words
CASES = 40  # pictures of every question


@dataclass(frozen=True)
class Speed:
    """Ours against the plain method."""

    model: str = MODEL
    init: str = INITIAL["fish"]
    """An ordinary word of the model."""
    steps: int = 60
    plain_steps: int = 30
    batch: int = 8
    repeats: int = 3
    device: str = "auto"
    precision: Precision = "auto"
    """Of our way."""
    seed: int = 0
    output: Path = ROOT / "runs" / "bench" / "p3_textual_inversion_speed.json"


@dataclass(frozen=True)
class Concepts:
    """What is learned of every held-out object and style."""

    model: str = MODEL
    names: tuple[str, ...] = HELD_OUT_KINDS + HELD_OUT_STYLES
    seeds: int = 3
    vectors: tuple[int, ...] = (1,)
    steps: int = 500
    batch: int = 8
    lr: float = 5e-3
    keep_norm: float = 1.0
    device: str = "auto"
    seed: int = 0
    output: Path = ROOT / "runs" / "bench" / "p3_textual_inversion.json"


def main(settings: Speed | Concepts) -> None:
    """The comparison that was asked for."""
    require_positive(settings, "steps", "batch")
    compare_speed(settings) if isinstance(settings, Speed) else compare_concepts(settings)


def pictures_of(name: str, folder: Path) -> Path:
    """The five pictures of a concept, as `world.py concept` writes them."""
    write_pictures(folder / name, [f"{index:02d}.png" for index in range(5)], concept_scenes(name, 5, 0))
    return folder / name


# ---------------------------------------------------------------- speed


class Plain:
    """The method as widely copied."""

    def __init__(self, model: str, concept: Concept, device: torch.device, lr: float):
        self.pipe = load_pipeline(model, device, torch.float32)
        word = self.pipe.tokenizer(concept.init, add_special_tokens=False).input_ids[0]
        table = self.pipe.text_encoder.get_input_embeddings().weight
        install(self.pipe, {concept.token: table[word : word + 1].float().cpu()})
        self.table = self.pipe.text_encoder.get_input_embeddings().weight.requires_grad_(True)
        self.before = self.table.detach().clone()
        self.optimizer = torch.optim.AdamW([self.table], lr)
        side = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        self.x = square(read_pictures(concept.images), side).to(device)

    def step(self, sample: Sample) -> None:
        """One step on this sample's noise, timesteps and sentences; the pictures are encoded anew."""
        rows = torch.arange(len(sample.t), device=self.x.device) % len(self.x)
        with torch.no_grad():
            x0 = self.pipe.vae.encode(self.x[rows]).latent_dist.sample() * self.pipe.vae.config.scaling_factor
        self.gradient(replace(sample, x0=x0))
        self.optimizer.step()
        with torch.no_grad():
            self.table[:-1] = self.before[:-1]

    def gradient(self, sample: Sample) -> Tensor:
        """Of the new row."""
        self.optimizer.zero_grad()
        text = self.pipe.text_encoder(sample.tokens)[0]
        noisy = self.pipe.scheduler.add_noise(sample.x0, sample.eps, sample.t)
        out = self.pipe.unet(noisy, sample.t, encoder_hidden_states=text).sample
        torch.nn.functional.mse_loss(out, sample.eps).backward()
        assert self.table.grad is not None
        return self.table.grad[-1]


def seconds_per_step(work: Callable[[int], object], steps: int, device: torch.device) -> float:
    """After one step that warms up."""
    work(0)
    start = time.perf_counter()
    for index in range(steps):
        work(index + 1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / steps


def compare_speed(settings: Speed) -> None:
    """Prints both, the ratio and the difference of the gradients; writes the record."""
    machine = detect(settings.device)
    record = Record(settings, machine)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        concept = Concept("<bench>", pictures_of("fish", folder), settings.init)
        recipe = Recipe(
            settings.model,
            batch=settings.batch,
            device=settings.device,
            run=folder / "run",
            precision=settings.precision,
            seed=settings.seed,
        )
        record.metrics["gradient_difference"] = gradient_difference(settings, concept, machine.device)
        run = Run(recipe, [concept])
        plain = Plain(settings.model, concept, machine.device, recipe.lr)
        ours, theirs = [], []
        whole = slice(settings.batch)
        samples = [run.learner.batch(step, whole, settings.batch) for step in range(settings.plain_steps + 1)]
        for _ in range(settings.repeats):
            theirs.append(
                seconds_per_step(lambda step: plain.step(samples[step]), settings.plain_steps, machine.device)
            )
            ours.append(seconds_per_step(lambda _: run.one_step(), settings.steps, machine.device))
    record.metrics |= {"ours_s": ours, "plain_s": theirs, "precision": run.precision, "ratio": min(theirs) / min(ours)}
    record.save(settings.output)
    print(
        f"ours   {1 / min(ours):8.2f} steps/s of {settings.batch}, {run.precision}\nplain  {1 / min(theirs):8.2f} steps/s, fp32"
    )
    print(f"ratio  {record.metrics['ratio']:8.2f}\ngradient differs by {record.metrics['gradient_difference']:.1e}")
    note(f"record: {settings.output}")


def gradient_difference(settings: Speed, concept: Concept, device: torch.device) -> float:
    """Relative, of the new row's gradient in fp32 on the same sample."""
    learner = Learner(load_pipeline(settings.model, device, torch.float32), [concept], settings.seed, False, True)
    sample = learner.batch(0, slice(settings.batch), settings.batch)
    learner.backward(Accelerator(cpu=device.type == "cpu"), learner.parameter, sample, 1)
    theirs = Plain(settings.model, concept, device, 1e-3).gradient(sample)
    assert learner.parameter.rows.grad is not None
    return float((learner.parameter.rows.grad[0] - theirs).norm() / theirs.norm())


# ---------------------------------------------------------------- concepts


@dataclass(frozen=True)
class Question:
    """Prompts with TOKEN in them, and what the judge has to say of each picture."""

    name: str
    prompts: tuple[str, ...]
    wanted: dict[str, tuple[str, ...]]


def questions_of(name: str, seed: int) -> list[Question]:
    """What is asked of an object or of a style."""
    random = Random(derived_seed(seed, 17))
    if name in HELD_OUT_STYLES:
        kinds = tuple(random.choice(KINDS) for _ in range(CASES))
        prompts = tuple(f"a photo of a {kind} in the style of TOKEN" for kind in kinds)
        return [Question("style and object", prompts, {"style": (name,) * CASES, "kind": kinds})]
    grounds = tuple(random.choice(list(BACKGROUNDS)) for _ in range(CASES))
    colours = tuple(random.choice(list(COLOURS)) for _ in range(CASES))
    both = [(c, next(g for g in random.sample(list(BACKGROUNDS), len(BACKGROUNDS)) if fits(c, g))) for c in colours]
    kind = {"kind": (name,) * CASES}
    return [
        Question("object", ("a photo of a TOKEN",) * CASES, kind),
        Question(
            "object on a background",
            tuple(f"a TOKEN on a {g} background" for g in grounds),
            kind | {"background": grounds},
        ),
        Question("object in a colour", tuple(f"a photo of a {c} TOKEN" for c in colours), kind | {"colour": colours}),
        Question(
            "object in a colour on a background",
            tuple(f"a {c} TOKEN on a {g} background" for c, g in both),
            kind | {"colour": colours, "background": tuple(g for _, g in both)},
        ),
    ]


def rate(painter: Painter, judge: Judge, question: Question, word: str, seed: int) -> float:
    """Share of pictures that are as wanted, with `word` in the token's place."""
    orders = [
        Order(text.replace("TOKEN", word), derived_seed(seed, index)) for index, text in enumerate(question.prompts)
    ]
    images = torch.cat([painter.paint(orders[start : start + 20]) for start in range(0, len(orders), 20)])
    return float(judge.agrees(images, **question.wanted).float().mean())


def compare_concepts(settings: Concepts) -> None:
    """Learns every concept with every seed, asks all questions, prints the table, writes the record."""
    if unknown := set(settings.names) - set(INITIAL):
        raise BadInput(f"--names {', '.join(sorted(unknown))}: known are {', '.join(INITIAL)}")
    machine = detect(settings.device)
    set_up("fp32", machine)
    record, judge = Record(settings, machine), load_judge(machine.device)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in settings.names:
            images = pictures_of(name, Path(temporary))
            rows += one_concept(settings, judge, name, images, record)
    record.metrics = {"rows": rows, "means": means(rows)}
    record.save(settings.output)
    print("\n".join(f"{key:<60}{value:6.3f}" for key, value in record.metrics["means"].items()))
    note(f"record: {settings.output}")


def one_concept(settings: Concepts, judge: Judge, name: str, images: Path, record: Record) -> list[dict[str, Any]]:
    """A row per number of vectors, seed and question."""
    rows, kind = [], "style" if name in HELD_OUT_STYLES else "object"
    for count in settings.vectors:
        for seed in range(settings.seed, settings.seed + settings.seeds):
            concept = Concept("<new>", images, INITIAL[name], kind, count)  # type: ignore[arg-type]
            run = Run(recipe_of(settings, seed, images), [concept])
            with record.timed(f"learning {name}"):
                while not run.done:
                    run.one_step()
            painter = Painter(run.learner.pipe, Manner("dpm", 25, Guidance(5.0)))
            for question in questions_of(name, seed):
                found = {"concept": name, "vectors": count, "seed": seed, "question": question.name}
                rates = {"learned": rate(painter, judge, question, "<new>", seed)}
                if seed == settings.seed and count == settings.vectors[0]:
                    rates["initial"] = rate(painter, judge, question, INITIAL[name], seed)
                rows.append(found | rates)
                note(f"{found} {rates}")
    return rows


def recipe_of(settings: Concepts, seed: int, images: Path) -> Recipe:
    """As P3_textual_inversion.py has it, but for what the flags say."""
    return Recipe(
        settings.model,
        steps=settings.steps,
        batch=settings.batch,
        lr=settings.lr,
        keep_norm=settings.keep_norm,
        seed=seed,
        device=settings.device,
        run=images.parent / f"run-{images.name}-{seed}",
    )


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Over concepts and seeds, per question and number of vectors; and of the initial words."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(f"{row['question']}, {row['vectors']} vectors", []).append(row["learned"])
        if "initial" in row:
            groups.setdefault(f"{row['question']}, initial word", []).append(row["initial"])
    return {key: sum(values) / len(values) for key, values in groups.items()}


if __name__ == "__main__":
    command: Any = Speed | Concepts  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
