"""Grades pictures of learned concepts as the course does: CLIP image and text score of each prompt's best five of 25, PASS or FAIL.

  python P3_evaluate.py --images out                                 pictures of hw2_3.sh; OpenAI's ViT-B/32, downloaded once
  python P3_evaluate.py --images out --clip FOLDER                   any CLIP as a transformers folder: nothing is downloaded
  python P3_evaluate.py --images out --input other.json --references pictures

Pictures are {images}/{key}/{prompt}/source{key}_prompt{prompt}_{n}.png, n = 0 .. 24, references {references}/{key}/*.jpg, as many as
there are. PASS needs both averages to reach the baseline of input.json. concepts/clip_scores.py says how the scores are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from concepts.clip_scores import Resizing, Scorer, open_pictures, rank
from concepts.course_format import IMAGES_PER_PROMPT, CourseConcept, find_images, image_path, read_input
from runtime.cli import BadInput, log, run_script
from runtime.device import Device, detect, set_up
from runtime.files import ROOT, atomic, output_folder
from runtime.record import Record

DATA = ROOT / "hw2_data" / "textual_inversion"
BEST = 5
SHOWN = 256  # pixels of a picture's side in the figure


@dataclass(frozen=True)
class Settings:
    """Flags."""

    images: Path
    """Folder that hw2_3.sh wrote: {key}/{prompt}/ with exactly 25 pictures each."""
    input: Path = DATA / "input.json"
    """Concepts, prompts in plain words, baselines."""
    references: Path = DATA
    """Folder with a folder of pictures for each key."""
    clip: str = "openai/clip-vit-base-patch32"
    """A transformers folder or a hub name; the baselines are meant for this one."""
    resizing: Resizing = "torchvision"
    """As transformers 5 does; pillow: as it did when the course was graded (0.3 % of the pixels differ by one grey level)."""
    batch: int = 0
    """Pictures at once; 0: 32 on a CPU, 256 on a GPU."""
    device: Device = "auto"
    output: Path = ROOT / "runs" / "p3_evaluate"
    """Folder for record.json and best.png."""


@dataclass(frozen=True)
class GradedPrompt:
    """One prompt with its 25 pictures."""

    concept: CourseConcept
    prompt: int
    paths: list[Path]

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.concept.key}/{self.prompt}"

    @property
    def text(self) -> str:
        """The prompt that its pictures are graded with."""
        return self.concept.clip_prompts[self.prompt]

    @property
    def baseline(self) -> tuple[float, float]:
        """Image and text score that pass."""
        return self.concept.baselines[self.prompt]


@dataclass(frozen=True)
class Graded:
    """A case's scores [25], and its best pictures [3,H,W] uint8, small."""

    case: GradedPrompt
    image: Tensor
    text: Tensor
    pictures: list[Tensor]

    @cached_property
    def order(self) -> list[int]:
        """The pictures, best first."""
        return rank(self.image, self.text).tolist()

    @cached_property
    def means(self) -> tuple[float, float]:
        """Image and text score, averaged over the best five."""
        best = self.order[:BEST]
        return float(self.image[best].double().mean()), float(self.text[best].double().mean())

    @property
    def passed(self) -> bool:
        """Both reach the baseline."""
        return all(mean >= wanted for mean, wanted in zip(self.means, self.case.baseline, strict=True))

    @property
    def verdict(self) -> str:
        """The grader's word."""
        return "PASS" if self.passed else "FAIL"


# ---------------------------------------------------------------- files


def find_case(images: Path, concept: CourseConcept, prompt: int) -> GradedPrompt:
    """The 25 pictures of a prompt; raises BadInput where one is missing or anything else is there."""
    paths = [image_path(images, concept.key, prompt, n) for n in range(IMAGES_PER_PROMPT)]
    folder = paths[0].parent
    if not folder.is_dir():
        raise BadInput(
            f"{folder} is not a folder; prompt {prompt} of concept {concept.key!r} needs its {IMAGES_PER_PROMPT} pictures there"
        )
    found = {path.name for path in folder.iterdir()}
    wanted = [path.name for path in paths]
    missing, strange = [name for name in wanted if name not in found], sorted(found.difference(wanted))
    if missing or strange:
        parts = [
            f"{what} {listed(names)}" for what, names in (("missing:", missing), ("not wanted:", strange)) if names
        ]
        raise BadInput(
            f"{folder} holds {len(found)} files, wanted exactly {IMAGES_PER_PROMPT} pictures; {', '.join(parts)}"
        )
    return GradedPrompt(concept, prompt, paths)


def listed(names: list[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---------------------------------------------------------------- grading


def grade(scorer: Scorer, case: GradedPrompt, references: Tensor, batch: int) -> Graded:
    """Every picture is decoded and encoded once, for both scores."""
    pictures = open_pictures(case.paths)
    features = scorer.encode(pictures, batch)
    image, text = scorer.image_scores(features, references), scorer.text_scores(features, case.text)
    best = rank(image, text)[:BEST].tolist()
    return Graded(case, image, text, [resize(pictures[index], [SHOWN, SHOWN]) for index in best])


def grade_all(
    scorer: Scorer, cases: list[GradedPrompt], references: dict[str, tuple[Path, ...]], batch: int
) -> Iterator[Graded]:
    """Case by case, each concept's references encoded once."""
    known = {key: scorer.encode(open_pictures(paths), batch) for key, paths in references.items()}
    for case in cases:
        yield grade(scorer, case, known[case.concept.key], batch)


# ---------------------------------------------------------------- results


def table(results: list[Graded]) -> list[str]:
    """A line per prompt, and how many passed."""
    width = max(7, *(len(result.case.name) for result in results))
    lines = [f"{'prompt':<{width}}  {'image':>7} {'wanted':>7}  {'text':>7} {'wanted':>7}"]
    for result in results:
        (image, text), (least_image, least_text) = result.means, result.case.baseline
        numbers = f"{image:7.2f} {least_image:7.2f}  {text:7.2f} {least_text:7.2f}"
        lines.append(f"{result.case.name:<{width}}  {numbers}  {result.verdict}")
    return [*lines, f"{sum(result.passed for result in results)} of {len(results)} cases passed"]


def print_scores(result: Graded) -> None:
    """The scores of one prompt, in the grader's lines."""
    image, text = result.means
    print(f"{result.case.name}: {result.case.text}")
    print(f"CLIP Image Score: {image:.2f}\nCLIP Text Score: {text:.2f}\n{result.verdict}", flush=True)


def as_json(result: Graded) -> dict[str, Any]:
    """A case with the scores of each of its pictures, in the order of their files."""
    case, places = result.case, {index: place for place, index in enumerate(result.order, 1)}
    scores = zip(case.paths, result.image.tolist(), result.text.tolist(), strict=True)
    return {
        "key": case.concept.key,
        "prompt": case.prompt,
        "text": case.text,
        "image_score": result.means[0],
        "text_score": result.means[1],
        "baseline": case.baseline,
        "passed": result.passed,
        "pictures": [
            {"file": path.name, "image_score": image, "text_score": text, "rank": places[n]}
            for n, (path, image, text) in enumerate(scores)
        ],
    }


def best_figure(path: Path, results: list[Graded], title: str) -> None:
    """A row per prompt with its best five pictures, the best on the left, and their scores."""
    inch = min(2.4, 400 / len(results))  # a figure can't be higher than 65,000 pixels
    height = inch * len(results) + 0.5
    figure = Figure(figsize=(9, height))
    figure.suptitle(title, fontsize=10, parse_math=False, y=1 - 0.1 / height, va="top")
    axes = figure.subplots(len(results), BEST, squeeze=False)
    for row, result in zip(axes, results, strict=True):
        draw_row(row, result)
    figure.subplots_adjust(0.01, 0.3 / height, 0.99, 1 - 0.85 / height, wspace=0.04, hspace=0.42)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def draw_row(row: Any, result: Graded) -> None:
    """One prompt: its text and verdict above, file number and scores under each picture."""
    for axis, picture, index in zip(row, result.pictures, result.order, strict=False):
        axis.imshow(picture.permute(1, 2, 0).numpy())
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(f"{index}: {result.image[index]:.2f} / {result.text[index]:.2f}", fontsize=8)
    image, text = result.means
    heading = f"{result.case.name}  image {image:.2f}, text {text:.2f}: {result.verdict}\n{result.case.text[:110]}"
    row[0].set_title(heading, loc="left", fontsize=8, parse_math=False)  # runs over its neighbours, which have none


# ---------------------------------------------------------------- the command


def check(settings: Settings) -> None:
    """Raises BadInput for flags that make no sense."""
    if settings.batch < 0:
        raise BadInput(f"--batch {settings.batch}: must be above zero, or 0 for automatic")
    if settings.output.resolve().is_relative_to(settings.images.resolve()):
        raise BadInput(f"--output {settings.output} lies in --images, where only graded pictures may be; name another")


def main(settings: Settings) -> None:
    """Finds every file before any work, then grades prompt by prompt."""
    check(settings)
    concepts = read_input(settings.input, graded=True)
    cases = [find_case(settings.images, one, prompt) for one in concepts for prompt in range(len(one.prompts))]
    references = {one.key: find_images(settings.references / one.key) for one in concepts}
    machine = detect(settings.device)
    set_up("fp32", machine)
    record, results = Record(settings, machine), []
    with record.timed("model"):
        scorer = Scorer.load(settings.clip, machine.device, settings.resizing)
    output_folder(settings.output)
    if abs(scorer.scale - 100) > 0.5:
        log(f"text scores are logits_per_image: {scorer.scale:.2f} x cosine with this CLIP, 100 with the course's")
    with record.timed("grading"):
        for result in grade_all(scorer, cases, references, settings.batch):
            print_scores(result)
            results.append(result)
    write_results(settings, scorer, references, results, record)


def write_results(
    settings: Settings, scorer: Scorer, references: dict[str, tuple[Path, ...]], results: list[Graded], record: Record
) -> None:
    """Table to stdout, figure and record to the folder."""
    lines = table(results)
    print("", *lines, sep="\n")
    record.metrics = {
        "clip": settings.clip,
        "logit_scale": scorer.scale,
        "references": {key: [path.name for path in paths] for key, paths in references.items()},
        "passed": sum(result.passed for result in results),
        "cases": [as_json(result) for result in results],
    }
    best_figure(settings.output / "best.png", results, f"{settings.clip}: {lines[-1]}; image / text score")
    record.save(settings.output / "record.json")
    log(f"best.png and record.json in {settings.output}")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
