"""Grades images of learned concepts as the course does: CLIP image and text score of each prompt's best five of 25, PASS or FAIL.

  python P3_evaluate.py --images out                                 images of hw2_3.sh; OpenAI's ViT-B/32, downloaded once
  python P3_evaluate.py --images out --clip FOLDER                   any CLIP as a transformers folder: nothing is downloaded
  python P3_evaluate.py --images out --input other.json --references pictures

Images are {images}/{key}/{prompt}/source{key}_prompt{prompt}_{n}.png, n = 0 .. 24. References are all images in {references}/{key}.
PASS needs the averages of both scores to reach the prompt's baseline in input.json. concepts/clip_scores.py defines the scores.
"""

from __future__ import annotations

import runtime.interrupts  # noqa: F401

# isort: split
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from concepts.clip_scores import Resizing, Scorer, open_images, rank
from concepts.course_format import IMAGES_PER_PROMPT, CourseConcept, find_images, image_path, read_input
from runtime.cli import BadInput, log, run_script
from runtime.device import Device, detect, set_up
from runtime.files import ROOT, check_writable_folder, output_folder, visible
from runtime.images import decoration, plain_text, save_figure
from runtime.record import Record

DATA = ROOT / "hw2_data" / "textual_inversion"
BEST = 5
SHOWN = 256  # pixels of an image's side in the figure


@dataclass(frozen=True)
class Settings:
    """Flags of grading."""

    images: Path
    """Folder that hw2_3.sh wrote: {key}/{prompt}/ with exactly 25 images each."""
    input: Path = DATA / "input.json"
    """The course's input.json: concepts, prompts in ordinary words, baselines."""
    references: Path = DATA
    """Folder with a folder of reference images per key."""
    clip: str = "openai/clip-vit-base-patch32"
    """A transformers folder or a hub name; the baselines are meant for the default."""
    resizing: Resizing = "torchvision"
    """Library that resizes images for CLIP. torchvision = as transformers 5 does.
    pillow = as when the course was graded; 0.3 % of the pixels differ by one grey level."""
    batch: int = 0
    """Images at once. 0 = 32 on a CPU, 256 on a GPU."""
    device: Device = "auto"
    output: Path = ROOT / "runs" / "p3_evaluate"
    """Folder for record.json and best.png."""


@dataclass(frozen=True)
class GradedPrompt:
    """A prompt, by its concept and index, and its 25 images."""

    concept: CourseConcept
    prompt: int
    paths: list[Path]

    @property
    def name(self) -> str:
        """Its folder, {key}/{prompt}."""
        return f"{self.concept.key}/{self.prompt}"

    @property
    def text(self) -> str:
        """The prompt in ordinary words, with which its images are graded."""
        return self.concept.clip_prompts[self.prompt]

    @property
    def baseline(self) -> tuple[float, float]:
        """Image and text score needed to pass."""
        return self.concept.baselines[self.prompt]


@dataclass(frozen=True)
class PromptGrade:
    """The image and text scores [25] of a prompt's images, and its best five images [3,H,W] uint8, small."""

    graded: GradedPrompt
    image: Tensor
    text: Tensor
    best_images: list[Tensor]

    @cached_property
    def order(self) -> list[int]:
        """Indices of the images, best first."""
        return rank(self.image, self.text).tolist()

    @cached_property
    def means(self) -> tuple[float, float]:
        """Image and text score, averaged over the best five."""
        best = self.order[:BEST]
        return float(self.image[best].double().mean()), float(self.text[best].double().mean())

    @property
    def passed(self) -> bool:
        """Whether both means reach the baseline."""
        return all(mean >= limit for mean, limit in zip(self.means, self.graded.baseline, strict=True))

    @property
    def verdict(self) -> str:
        return "PASS" if self.passed else "FAIL"


def main(settings: Settings) -> None:
    """Find every file before any work, then grade prompt by prompt."""
    if settings.batch < 0:
        raise BadInput(f"--batch {settings.batch}: must be above zero, or 0 for automatic")
    if settings.output.resolve().is_relative_to(settings.images.resolve()):
        raise BadInput(f"--output {settings.output} lies in --images, where only graded pictures may be; name another")

    # every file, then the model
    concepts = read_input(settings.input, graded=True)
    prompts = [find_images_of(settings.images, one, index) for one in concepts for index in range(len(one.prompts))]
    references = {concept.key: find_images(settings.references / concept.key) for concept in concepts}
    keeps = can_keep_results(settings.output)
    machine = detect(settings.device)
    set_up("fp32", machine)
    record = Record(settings, machine)
    with record.timed("model"):
        scorer = Scorer.load(settings.clip, machine.device, settings.resizing)
    if abs(scorer.scale - 100) > 0.5:
        log(f"text scores are logits_per_image: {scorer.scale:.2f} x cosine with this CLIP, 100 with the course's")

    # each file is decoded and encoded once
    grades = []
    with record.timed("grading"):
        features = {
            key: scorer.encode(open_images(paths, as_graded=True), settings.batch) for key, paths in references.items()
        }
        for prompt in prompts:
            grades.append(grade(scorer, prompt, features[prompt.concept.key], settings.batch))
            image, text = grades[-1].means
            print(f"{prompt.name}: {prompt.text}")
            print(f"CLIP Image Score: {image:.2f}\nCLIP Text Score: {text:.2f}\n{grades[-1].verdict}", flush=True)

    # the table, the record, the figure
    lines = table(grades)
    print("", *lines, sep="\n", flush=True)
    if not keeps:
        return
    record.metrics = {
        "clip": settings.clip,
        "logit_scale": scorer.scale,
        "references": {key: [path.name for path in paths] for key, paths in references.items()},
        "passed": sum(result.passed for result in grades),
        "cases": [as_json(result) for result in grades],
    }
    record.save(output_folder(settings.output) / "record.json")
    with decoration(figure := settings.output / "best.png"):
        best_figure(figure, grades, f"{settings.clip}: {lines[-1]}; image / text score")
    log(f"best.png and record.json in {settings.output}")


# ---------------------------------------------------------------- files


def can_keep_results(output: Path) -> bool:
    """Return whether the folder can be written. If not, raise BadInput, but for the default folder only log it: scores are printed too."""
    try:
        check_writable_folder(output)
    except BadInput as error:
        if output != Settings.output:
            raise
        log(f"warning: no best.png and record.json, {error}")
        return False
    return True


def find_images_of(images: Path, concept: CourseConcept, prompt: int) -> GradedPrompt:
    """Return a prompt with the paths of its 25 images.

    Raise BadInput if one is missing, or if their folder holds any other visible entry. Hidden and junk files are only logged.
    """
    paths = [image_path(images, concept.key, prompt, n) for n in range(IMAGES_PER_PROMPT)]
    folder = paths[0].parent
    if not folder.is_dir():
        raise BadInput(
            f"{folder} is not a folder; prompt {prompt} of concept {concept.key!r} needs its {IMAGES_PER_PROMPT} pictures there"
        )
    for junk in set(folder.iterdir()) - set(visible(folder)):
        log(f"{junk} is skipped, but belongs in no graded folder: delete it")
    names = {path.name if path.is_file() else f"{path.name}/" for path in visible(folder)}
    expected = [path.name for path in paths]
    missing, strange = [name for name in expected if name not in names], sorted(names.difference(expected))
    if missing or strange:
        parts = [f"{what} {shorten(some)}" for what, some in (("missing:", missing), ("not wanted:", strange)) if some]
        raise BadInput(
            f"{folder} holds {len(names)} files, wanted exactly {IMAGES_PER_PROMPT} pictures; {', '.join(parts)}"
        )
    return GradedPrompt(concept, prompt, paths)


def shorten(names: list[str]) -> str:
    """Return the first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---------------------------------------------------------------- grading


def grade(scorer: Scorer, prompt: GradedPrompt, references: Tensor, batch: int) -> PromptGrade:
    """Return the scores of a prompt's images. `references` [R,D] are the features of its references."""
    from torchvision.transforms.v2.functional import resize

    images = open_images(prompt.paths, as_graded=True)
    features = scorer.encode(images, batch)
    image, text = scorer.image_scores(features, references), scorer.text_scores(features, prompt.text)
    best = rank(image, text)[:BEST].tolist()
    return PromptGrade(prompt, image, text, [resize(images[index], [SHOWN, SHOWN]) for index in best])


# ---------------------------------------------------------------- results


def table(grades: list[PromptGrade]) -> list[str]:
    """Return a heading, a line per prompt, and how many passed."""
    width = max(7, *(len(grade.graded.name) for grade in grades))
    lines = [f"{'prompt':<{width}}  {'image':>7} {'wanted':>7}  {'text':>7} {'wanted':>7}"]
    for grade in grades:
        (image, text), (image_limit, text_limit) = grade.means, grade.graded.baseline
        numbers = f"{image:7.2f} {image_limit:7.2f}  {text:7.2f} {text_limit:7.2f}"
        lines.append(f"{grade.graded.name:<{width}}  {numbers}  {grade.verdict}")
    return [*lines, f"{sum(grade.passed for grade in grades)} of {len(grades)} cases passed"]


def as_json(grade: PromptGrade) -> dict[str, Any]:
    """Return a prompt with the scores of each of its images, in the order of their files."""
    prompt, ranks = grade.graded, {index: rank for rank, index in enumerate(grade.order, 1)}
    scores = zip(prompt.paths, grade.image.tolist(), grade.text.tolist(), strict=True)
    return {
        "key": prompt.concept.key,
        "prompt": prompt.prompt,
        "text": prompt.text,
        "image_score": grade.means[0],
        "text_score": grade.means[1],
        "baseline": prompt.baseline,
        "passed": grade.passed,
        "pictures": [
            {"file": path.name, "image_score": image, "text_score": text, "rank": ranks[n]}
            for n, (path, image, text) in enumerate(scores)
        ],
    }


@plain_text()
def best_figure(path: Path, grades: list[PromptGrade], title: str) -> None:
    """Write a row per prompt with its best five images, the best on the left, and their scores."""
    from matplotlib.figure import Figure

    inch = min(2.4, 400 / len(grades))  # a figure can't be higher than 65,000 pixels
    height = inch * len(grades) + 0.5
    figure = Figure(figsize=(9, height))
    figure.suptitle(title, fontsize=10, y=1 - 0.1 / height)
    axes = figure.subplots(len(grades), BEST, squeeze=False)
    for row, grade in zip(axes, grades, strict=True):
        draw_row(row, grade)
    figure.subplots_adjust(0.01, 0.3 / height, 0.99, 1 - 0.85 / height, wspace=0.04, hspace=0.42)
    save_figure(path, figure, 130)


def draw_row(row: Any, grade: PromptGrade) -> None:
    """Draw one prompt: its text and verdict above, file number and scores under each image."""
    for axis, image, index in zip(row, grade.best_images, grade.order, strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(f"{index}: {grade.image[index]:.2f} / {grade.text[index]:.2f}", fontsize=8)
    image_mean, text_mean = grade.means
    scores = f"image {image_mean:.2f}, text {text_mean:.2f}: {grade.verdict}"
    heading = f"{grade.graded.name}  {scores}\n{grade.graded.text[:110]}"
    row[0].set_title(heading, loc="left", fontsize=8)  # runs over its neighbours, which have none


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
