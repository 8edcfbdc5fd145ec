"""Figures of learned words: given images and what prompts draw with the word, in full and short; images that fail. None is chosen by hand.

  python benchmarks/p3_words.py --embeddings DIR        docs/p3_words.png, docs/p3_words_short.png and docs/p3_failures.png

Every prompt has one seed, the same for all words. Failures are the first that are not strictly right (benchmarks/p3_strict.py) of `--count`
images of "a photo of a {colour} <word> on a {colour} background in the style of flat". An empty place means that there are no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import repository_root  # noqa: F401  # isort: split
import torch

from benchmarks.p3_learning import MODEL, SAMPLER, check_model, sample
from benchmarks.p3_shape import SHOWN, STYLE, coloured_prompts, open_autoencoder
from benchmarks.p3_strict import PartMeasure
from concepts.embeddings import find_vectors, install
from concepts.sampling import Request, StableDiffusionSampler
from concepts.stable_diffusion import load_pipeline
from miniature.diffusion_parts import PARTS
from miniature.judge_model import load_scene_classifier
from miniature.scenery.concepts import concept_scenes
from miniature.scenery.render import render_scenes
from miniature.scenery.scenes import HELD_OUT_KINDS
from runtime.cli import BadInput, check_positive, log, run_script
from runtime.device import Device, detect, set_up
from runtime.files import ROOT, check_writable_file
from runtime.images import labelled_grid, pixel_grid
from runtime.seeds import derived_seed

PROMPTS = {
    "a photo of a {}": "alone",
    "a photo of a red {} on a white background": "red,\non white",
    "a blue {} on a textured yellow background": "blue, on\ntextured yellow",
    "a green {} on the left": "green,\non the left",
    "a pink {} in the style of mosaic": "pink,\nmosaic",
    "a white {} next to an orange star": "white, next\nto a star",
}
GIVEN = 5
SHORT = {
    0: "given",
    1: "given",
    GIVEN: "alone",
    GIVEN + 1: "red",
    GIVEN + 2: "blue",
}  # {column: label} of the short figure


@dataclass(frozen=True)
class Settings:
    """Settings of the image sheets."""

    embeddings: Path
    """Folder of the learned tokens <key>, <fish>, <mushroom>, <cup>; benchmarks/p3_composition.py learns them."""
    model: str = MODEL
    parts: Path = PARTS
    """Folder that holds vae/, the autoencoder: its copies of renders set the bar for shapes."""
    count: int = 40
    """Images per word among which failures are sought."""
    seed: int = 0
    device: Device = "auto"
    output: Path = ROOT / "docs" / "p3_words.png"
    short: Path = ROOT / "docs" / "p3_words_short.png"
    """PNG file for two given and three drawn images of each word, legible at a third of a page."""
    failures: Path = ROOT / "docs" / "p3_failures.png"


def main(settings: Settings) -> None:
    """Draw the three figures."""
    check_positive(settings, "count")
    check_model(settings.model)
    files = {"--output": settings.output, "--short": settings.short, "--failures": settings.failures}
    for flag, path in files.items():
        check_writable_file(path, flag, [".png"])
    tokens = {kind: f"<{kind}>" for kind in HELD_OUT_KINDS}
    vectors = find_vectors(tokens.values(), [settings.embeddings]).vectors
    if missing := [token for token in tokens.values() if token not in vectors]:
        raise BadInput(f"--embeddings {settings.embeddings}: holds no {', '.join(missing)}")
    machine = detect(settings.device)
    set_up("fp32", machine)
    pipe = load_pipeline(settings.model, machine.device, torch.float32)
    install(pipe, vectors)
    sampler = StableDiffusionSampler(pipe, SAMPLER)
    measure = PartMeasure(load_scene_classifier(machine.device), open_autoencoder(settings.parts, machine.device))

    def draw(prompts: list[str], domain: int) -> torch.Tensor:
        requests = [Request(text, derived_seed(settings.seed, domain, k)) for k, text in enumerate(prompts)]
        return sample(sampler.sample_images, requests, "drawing")

    rows, failures, rates = [], [], []
    for kind, token in tokens.items():
        given = render_scenes(concept_scenes(kind, GIVEN, 0))
        rows.append(torch.cat([given, draw([text.format(token) for text in PROMPTS], 0)]))

        asked = coloured_prompts(token, settings.count, derived_seed(settings.seed, 1))
        images = draw([text for text, _, _ in asked], 1)
        answers = [
            {"kind": kind, "colour": colour, "background": ground, "style": STYLE} for _, colour, ground in asked
        ]
        right = measure.verdicts(images, answers)["strict"]
        rates.append(f"{kind}\n{int(right.sum())} of {len(right)}")
        wrong = images[~right][:SHOWN]
        blank = torch.full((SHOWN - len(wrong), *images.shape[1:]), 255, dtype=torch.uint8)
        failures.append(torch.cat([wrong, blank]))
        log(rates[-1].replace("\n", " "))

    columns = [f"given {k + 1}" for k in range(GIVEN)] + list(PROMPTS.values())
    labelled_grid(
        settings.output, torch.cat(rows), list(tokens), columns, "Five given images, and the learned word", 1.0
    )
    short = torch.cat([row[list(SHORT)] for row in rows])
    pixel_grid(settings.short, short, list(tokens), list(SHORT.values()), "Given images, and the learned word")
    title = f"The first images that fail, and how many of {settings.count} are right"
    labelled_grid(settings.failures, torch.cat(failures), rates, [""] * SHOWN, title, 0.9)
    log(f"figures: {', '.join(map(str, files.values()))}")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
