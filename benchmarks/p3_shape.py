"""Shape fidelity of the miniature's objects: in renders, in images of kinds drawn by name, and between two learned words.

  python benchmarks/p3_shape.py calibrate            renders, renders through the autoencoder, malformed ones, other kinds
  python benchmarks/p3_shape.py calibrate --style relief     .. all of them in another style
  python benchmarks/p3_shape.py named --count 20     strict success of the kinds that the model can name: the ceiling of learned words
  python benchmarks/p3_shape.py named --solver dpm --guidance 5      .. by another sampler
  python benchmarks/p3_shape.py between --embeddings DIR    from one learned object to another: which one is seen, and how well formed

Fidelity, 0..1, compares an object's silhouette with its kind's (miniature/silhouettes.py). An image passes if it has at least 0.9 of the
mean fidelity of renders of that kind that passed through the autoencoder. Strict success requires that the scene classifier reads kind,
colour, background and style as in the prompt, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import repository_root  # noqa: F401  # isort: split
import torch
from torch import Tensor

from benchmarks.p3_learning import MODEL, SAMPLER, SamplerFlags
from benchmarks.timing import BENCH
from concepts.embeddings import find_vectors, install
from concepts.jobs import between_tokens, between_vectors
from concepts.sampling import Request, StableDiffusionSampler
from concepts.stable_diffusion import load_pipeline
from miniature.diffusion_parts import PARTS, load_vae
from miniature.judge_model import load_scene_classifier
from miniature.scenery.captions import with_article
from miniature.scenery.malformed import MALFORMED, drawn_as
from miniature.scenery.render import render_scenes
from miniature.scenery.scenes import (
    ALL_KINDS,
    ALL_STYLES,
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_KINDS,
    KINDS,
    SceneSpec,
    allowed,
    fits,
    sample_scene,
)
from miniature.silhouettes import PASSING, shape_fidelity
from miniature.train_autoencoder import reconstruct
from runtime.cli import BadInput, check_positive, log, run_script
from runtime.device import Device, detect, set_up, to_training_device
from runtime.images import labelled_grid, to_float
from runtime.record import Record
from runtime.seeds import derived_seed

RENDERS, MALFORMED_RENDERS, PROMPTS = range(3)  # domains of seeds
SHOWN = 10  # images per kind on the sheet
STYLE = "flat"
CHUNK = 50  # images through the autoencoder at a time
Through = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Calibrate:
    """Measure renders of the held-out kinds, malformed ones and other kinds, all through the autoencoder."""

    parts: Path = PARTS
    """Folder that holds vae/."""
    count: int = 40
    """Images per kind and group. The group of other kinds has four of each."""
    style: str = STYLE
    """Style of all renders."""
    seed: int = 0
    device: Device = "auto"
    record: Path = BENCH / "p3_shape_calibration.json"


@dataclass(frozen=True)
class Named(SamplerFlags):
    """Draw the kinds that the training captions name, and measure strict success."""

    model: str = MODEL
    parts: Path = PARTS
    """Folder that holds vae/, the autoencoder: its copies of renders set the bar for shapes."""
    count: int = 20
    """Images per kind."""
    seed: int = 0
    device: Device = "auto"
    sheet: Path = BENCH / "p3_shape_named.png"
    """PNG file with the first images of each kind."""
    record: Path = BENCH / "p3_shape_named.json"


@dataclass(frozen=True)
class Between:
    """Draw with embeddings between those of two held-out objects, for every two, and count which object the scene classifier reads."""

    embeddings: Path
    """Folder of the learned tokens, two or more of <key>, <fish>, <mushroom>, <cup>; benchmarks/p3_composition.py learns all."""
    model: str = MODEL
    steps: int = 7
    """Embeddings from one token's to the other's, both included."""
    count: int = 20
    """Images per pair and embedding, each with its seed and colours."""
    seed: int = 0
    device: Device = "auto"
    sheet: Path = BENCH / "p3_shape_between.png"
    """PNG file with one image of each pair per embedding."""
    record: Path = BENCH / "p3_shape_between.json"


def renders(kind: str, count: int, seed: int, style: str = STYLE) -> Tensor:
    """Render [count,3,64,64] uint8: one object each in a style, in a random colour that stands out from its background."""
    random, pairs = Random(seed), [(c, b) for c in COLOURS for b in BACKGROUNDS if fits(c, b)]
    specs = [
        SceneSpec(kinds=(kind,), colours=(c,), background=b, style=style) for c, b in random.choices(pairs, k=count)
    ]
    scenes = [sample_scene(derived_seed(seed, index), spec) for index, spec in enumerate(specs)]
    return render_scenes(scenes)


def open_autoencoder(parts: Path, device: torch.device) -> Through:
    """Return a function that encodes and decodes images [N,3,64,64] uint8; its result, of the same form, is on the CPU."""
    vae = to_training_device(load_vae(parts / "vae"), device)

    def through(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([reconstruct(vae, to_float(x.to(device))).cpu() for x in images.split(CHUNK)]).clone()

    return through


def passing_fidelity(images: Tensor, kind: str) -> float:
    """Return the least fidelity that passes: 0.9 of the mean of `images` [N,3,64,64] uint8, renders through the autoencoder."""
    return PASSING * float(shape_fidelity(images, [kind] * len(images)).mean())


def calibrate(settings: Calibrate, record: Record) -> None:
    """Measure the shape fidelity of each held-out kind's renders, plain and through the autoencoder.

    As negatives, measure malformed outlines and renders of other kinds, through the autoencoder.
    Record a row per kind and group: mean fidelity, and the share of images that passes.
    """
    if (style := settings.style) not in ALL_STYLES:
        raise BadInput(f"--style {style}: the miniature has {', '.join(ALL_STYLES)}")
    through = open_autoencoder(settings.parts, record.machine.device)

    rows: list[dict[str, Any]] = []
    for kind in HELD_OUT_KINDS:
        clean = renders(kind, settings.count, derived_seed(settings.seed, RENDERS), style)
        groups = {"rendered": clean, "through the autoencoder": through(clean)}
        for outline in MALFORMED[kind]:
            with drawn_as(kind, outline):
                images = renders(kind, settings.count, derived_seed(settings.seed, MALFORMED_RENDERS), style)
            groups[outline.__name__.replace("_", " ")] = through(images)
        others = [
            renders(other, 4, derived_seed(settings.seed, RENDERS), style) for other in ALL_KINDS if other != kind
        ]
        groups["the other kinds"] = through(torch.cat(others))
        fidelity = {name: shape_fidelity(images, [kind] * len(images)) for name, images in groups.items()}
        least = PASSING * float(fidelity["through the autoencoder"].mean())
        for name, values in fidelity.items():
            rows.append(
                {
                    "kind": kind,
                    "images": name,
                    "fidelity": float(values.mean()),
                    "passing": float((values >= least).float().mean()),
                }
            )
            print(f"{kind:10s}{name:28s}{rows[-1]['fidelity']:8.3f}{rows[-1]['passing']:8.2f}")
    record.metrics["rows"] = rows


def coloured_prompts(kind: str, count: int, seed: int) -> list[tuple[str, str, str]]:
    """Draw `count` tuples (prompt, colour, background): "a photo of a red heart on a white background in the style of flat".

    The style is flat because outlines are compared, and other styles bend them.
    """
    random = Random(seed)
    pairs = [(c, b) for c in COLOURS for b in BACKGROUNDS if fits(c, b) and allowed(c, kind, "trained")]
    chosen = random.choices(pairs, k=count)
    texts = [f"a photo of {with_article(f'{c} {kind}')} on {with_article(b)} background" for c, b in chosen]
    return [(f"{text} in the style of {STYLE}", c, b) for text, (c, b) in zip(texts, chosen, strict=True)]


def named(settings: Named, record: Record) -> None:
    """Add fidelity and shares per kind to the record: shape, scene classifier, both (strict); write the sheet."""
    check_positive(settings, "sampling_steps")
    device = record.machine.device
    set_up("fp32", record.machine)
    pipe, classifier = load_pipeline(settings.model, device, torch.float32), load_scene_classifier(device)
    through = open_autoencoder(settings.parts, device)
    sampler = StableDiffusionSampler(pipe, settings.sampler_config())
    shown: list[Tensor] = []
    results: dict[str, list[float]] = {}
    for index, kind in enumerate(KINDS):
        prompts, colours, grounds = zip(
            *coloured_prompts(kind, settings.count, derived_seed(settings.seed, PROMPTS, index)), strict=True
        )
        requests = [Request(prompt, derived_seed(settings.seed, PROMPTS, index, k)) for k, prompt in enumerate(prompts)]
        images = sampler.sample_images(requests)
        decoded = through(renders(kind, settings.count, derived_seed(settings.seed, RENDERS)))
        least = passing_fidelity(decoded, kind)
        fidelity = shape_fidelity(images, [kind] * len(images))
        same = {"kind": [kind] * len(images), "style": [STYLE] * len(images)}
        agrees = classifier.agrees(images, **same, colour=colours, background=grounds).cpu()
        passing = fidelity >= least
        shares = {"fidelity": fidelity, "shape": passing, "scene classifier": agrees, "strict": passing & agrees}
        for name, values in shares.items():
            results.setdefault(name, []).append(float(values.float().mean()))
        print(f"{kind:10s}" + "".join(f"{name} {values[-1]:.2f}   " for name, values in results.items()), flush=True)
        shown.append(images[:SHOWN])
    record.add_repeats({f"{name}, mean of a kind": values for name, values in results.items()})
    labelled_grid(settings.sheet, torch.cat(shown), KINDS, ["" for _ in range(SHOWN)], "Kinds drawn by name")


def between(settings: Between, record: Record) -> None:
    """Add a row per pair and embedding: shares read as the first object, the second, another; mean fidelity to both. Write the sheet."""
    device, steps = record.machine.device, settings.steps
    if steps < 2:
        raise BadInput(f"--steps {steps}: give 2 or more")
    vectors = find_vectors([f"<{kind}>" for kind in HELD_OUT_KINDS], [settings.embeddings]).vectors
    pairs = list(combinations([kind for kind in HELD_OUT_KINDS if f"<{kind}>" in vectors], 2))
    if not pairs:
        objects = ", ".join(f"<{kind}>" for kind in HELD_OUT_KINDS)
        raise BadInput(f"--embeddings {settings.embeddings}: holds fewer than two of {objects}")
    for first, second in pairs:
        vectors |= between_vectors(vectors, (f"<{first}>", f"<{second}>"), steps)
    set_up("fp32", record.machine)
    pipe, classifier = load_pipeline(settings.model, device, torch.float32), load_scene_classifier(device)
    install(pipe, vectors)
    sampler = StableDiffusionSampler(pipe, SAMPLER)

    fractions = [f"{step / (steps - 1):.2f}" for step in range(steps)]
    shown: list[Tensor] = []
    rows: list[dict[str, Any]] = []
    for index, (first, second) in enumerate(pairs):
        key = derived_seed(settings.seed, PROMPTS, index)
        tokens, images = between_tokens((f"<{first}>", f"<{second}>"), steps), []
        for k, (prompt, _, _) in enumerate(coloured_prompts("{}", settings.count, key)):
            requests = [Request(prompt.replace("{}", token), derived_seed(key, k)) for token in tokens]
            images.append(sampler.sample_images(requests))
        shown.append(images[0])
        for fraction, column in zip(fractions, torch.stack(images, 1), strict=True):  # [count,3,H,W]
            kinds = [ALL_KINDS[answer] for answer in classifier.whole(column)["kind"].argmax(1)]
            shares = {kind: kinds.count(kind) / len(kinds) for kind in (first, second)}
            shares["another"] = sum(kind not in shares for kind in kinds) / len(kinds)
            fidelity = {kind: float(shape_fidelity(column, [kind] * len(kinds)).mean()) for kind in (first, second)}
            rows.append({"pair": [first, second], "fraction": fraction, "seen": shares, "fidelity": fidelity})
            seen = "".join(f"{name} {share:.2f}   " for name, share in shares.items())
            print(fraction, seen, "fidelity", *(f"{value:.2f}" for value in fidelity.values()), flush=True)
    record.metrics["rows"] = rows
    names = [f"{first} to {second}" for first, second in pairs]
    labelled_grid(settings.sheet, torch.cat(shown), names, fractions, "Between two learned words")


def main(command: Calibrate | Named | Between) -> None:
    """Run the chosen measurement, and write its record."""
    check_positive(command, "count")
    record = Record(command, detect(command.device))
    if isinstance(command, Calibrate):
        calibrate(command, record)
    elif isinstance(command, Named):
        named(command, record)
    else:
        between(command, record)
    record.save(command.record)
    log(f"record: {command.record}")


if __name__ == "__main__":
    command: Any = Calibrate | Named | Between  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
