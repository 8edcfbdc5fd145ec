"""How well the miniature learned a concept: questions, and the share of images that its scene classifier finds right.

Outcomes stay on disk, so that a long measurement continues where it stopped.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from concepts.dataset import ConceptSet, Kind
from concepts.embeddings import file_of, install, read_vectors
from concepts.inversion import weights_fingerprint
from concepts.sampling import Request, SamplerConfig, StableDiffusionSampler
from concepts.stable_diffusion import load_pipeline
from diffusion.guidance import Guidance
from miniature.judge_model import SceneClassifier
from miniature.scenery.concepts import write_concept_pictures
from miniature.scenery.scenes import BACKGROUNDS, COLOURS, HELD_OUT_KINDS, HELD_OUT_STYLES, KINDS, fits
from runtime.cli import log
from runtime.device import detect
from runtime.files import ROOT, read_json, write_json
from runtime.seeds import derived_seed
from zeroshot.prompts import article

INITIAL = dict.fromkeys(HELD_OUT_KINDS, "object") | dict.fromkeys(HELD_OUT_STYLES, "unusual")  # what captions call them
LR = 1e-2  # twice the default, which is made for Stable Diffusion: the rows of the miniature's words are three times as long
MAX_LOSS_WEIGHT = 30.0  # a style, like a shape, is decided where the noise is strong
EMBEDDING_NOISE = 1.0  # without it pictures of an object hardly hear of another style after 150 steps
ZOOM_OUT = 0.5  # of an object's samples, so that it can be as small as it is among others
STEPS: dict[Kind, int] = {"object": 200, "style": 800}
VECTORS: dict[Kind, int] = {"object": 1, "style": 2}
BATCHES: dict[Kind, int] = {"object": 8, "style": 24}  # images of a concept in a step
MANNER = SamplerConfig("dpm", 25, Guidance(5.0))
TOKEN = "<new>"


def pictures_of(name: str, folder: Path, captions: bool) -> Path:
    """Write the five images of a concept, as `world.py concept` does; `captions`: with sentences about the rest of each image."""
    write_concept_pictures(folder / name, name, 5, 0, captions)
    return folder / name


def kind_of(name: str) -> Kind:
    """Return object or style."""
    return "style" if name in HELD_OUT_STYLES else "object"


# ---------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """Prompts with TOKEN in them, and the labels that the classifier must give each image."""

    name: str
    prompts: tuple[str, ...]
    wanted: dict[str, tuple[str, ...]]


def questions_of(name: str, count: int, seed: int) -> list[Question]:
    """Return the questions about an object or a style, `count` images each."""
    random = Random(derived_seed(seed, 17))
    if name in HELD_OUT_STYLES:
        kinds = tuple(random.choice(KINDS) for _ in range(count))
        prompts = tuple(f"a photo of {article(kind)} {kind} in the style of TOKEN" for kind in kinds)
        return [Question("style and object", prompts, {"style": (name,) * count, "kind": kinds})]
    grounds = tuple(random.choice(list(BACKGROUNDS)) for _ in range(count))
    colours = tuple(random.choice(list(COLOURS)) for _ in range(count))
    both = [(c, random.choice([g for g in BACKGROUNDS if fits(c, g)])) for c in colours]
    kind = {"kind": (name,) * count}
    coloured = tuple(f"a photo of {article(c)} {c} TOKEN" for c in colours)
    scenes = tuple(f"{article(c)} {c} TOKEN on {article(g)} {g} background" for c, g in both)
    return [
        Question("object", ("a photo of a TOKEN",) * count, kind),
        Question("object and colour", coloured, kind | {"colour": colours}),
        Question(
            "object and background",
            tuple(f"a TOKEN on {article(g)} {g} background" for g in grounds),
            kind | {"background": grounds},
        ),
        Question(
            "object, colour and background",
            scenes,
            kind | {"colour": colours, "background": tuple(g for _, g in both)},
        ),
    ]


def rate(painter: StableDiffusionSampler, judge: SceneClassifier, question: Question, word: str, seed: int) -> float:
    """Return the share of images with the right labels, `word` replacing the token."""
    orders = [
        Request(text.replace("TOKEN", word), derived_seed(seed, index)) for index, text in enumerate(question.prompts)
    ]
    images = torch.cat([painter.sample_images(orders[start : start + 20]) for start in range(0, len(orders), 20)])
    return float(judge.agrees(images, **question.wanted).float().mean())


# ---------------------------------------------------------------- one concept


def learn(concepts: Sequence[ConceptSet], folder: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """Run P3_textual_inversion.py with these flags, leave the vectors in `folder` and return the record."""
    with tempfile.TemporaryDirectory() as temporary:
        entries = [asdict(concept) | {"images": f"{concept.images.absolute()}"} for concept in concepts]
        write_json(Path(temporary) / "concepts.json", entries)
        command = [sys.executable, f"{ROOT / 'P3_textual_inversion.py'}", "--concepts", f"{temporary}/concepts.json"]
        command += ["--output", f"{folder}", "--run", f"{temporary}/run", "--validate-every", "0"]
        command += [str(x) for name, value in flags.items() for x in (f"--{name.replace('_', '-')}", value)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return dict(read_json(Path(temporary) / "run" / "record.json"))


@dataclass(frozen=True)
class Trial:
    """A concept to learn with a number of vectors, and how many images each question takes."""

    name: str
    vectors: int
    flags: dict[str, Any]
    """Flags of P3_textual_inversion.py, by field name; model, seed and device among them."""
    count: int
    captions: bool
    """Learn from sentences about the rest of each image."""
    initial: bool
    """Also ask the same questions with the initial word."""

    @property
    def kind(self) -> Kind:
        """Object or style."""
        return kind_of(self.name)

    def facts(self) -> dict[str, Any]:
        """Return everything that the outcome depends on; the model by its weights."""
        return {
            "name": self.name,
            "vectors": self.vectors,
            "count": self.count,
            "captions": self.captions,
            "initial": self.initial,
            "flags": {name: value for name, value in self.flags.items() if name not in ("device", "model")},
            "weights": weights_fingerprint(Path(self.flags["model"])),
        }


def outcome(trial: Trial, judge: SceneClassifier, folder: Path) -> dict[str, Any]:
    """Learn the concept and ask the questions, unless `folder` holds the outcome of the same trial.

    Vectors and outcome.json stay there.
    """
    seed = trial.flags["seed"]
    place = folder / f"{trial.name}-{trial.vectors}-{seed}"
    file, facts = place / "outcome.json", trial.facts()
    if file.is_file() and (kept := read_json(file))["facts"] == facts:
        log(f"{place}: as before")
        return dict(kept)

    images = pictures_of(trial.name, place, trial.captions)
    concept = ConceptSet(TOKEN, images, INITIAL[trial.name], trial.kind, trial.vectors)
    timings = learn([concept], place, trial.flags)["timings_s"]

    pipe = load_pipeline(trial.flags["model"], detect(trial.flags["device"]).device, torch.float32)
    install(pipe, read_vectors(file_of(place, TOKEN)))
    painter, rates = StableDiffusionSampler(pipe, MANNER), {}
    for question in questions_of(trial.name, trial.count, seed):
        words = {"learned": TOKEN} | ({"initial": INITIAL[trial.name]} if trial.initial else {})
        rates[question.name] = {how: rate(painter, judge, question, word, seed) for how, word in words.items()}
        log(f"{place.name}, {question.name}: {rates[question.name]}")
    result = {"facts": facts, "seconds": round(timings["training"] - timings["validation"], 1), "rates": rates}
    write_json(file, result)
    return result


def mean_rates(outcomes: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return question -> column ("1 vector", "initial word") -> the shares of all concepts and seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for made in outcomes:
        vectors = made["facts"]["vectors"]
        for question, rates in made["rates"].items():
            names = {"learned": f"{vectors} vector{'s' * (vectors > 1)}", "initial": "initial word"}
            for how, share in rates.items():
                found.setdefault(question, {}).setdefault(names[how], []).append(share)
    return found
