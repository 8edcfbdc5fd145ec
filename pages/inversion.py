"""Personalization on the page: learned tokens, their grades, and several concepts in one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pages.elements import Element, Figure, Score, Section, Strip, Table, percent
from pages.inputs import DIFFUSION, Inputs
from pages.personalization import WORLD, Personalization, course_concepts, miniature_concepts
from pages.results import quoted_percent
from runtime.files import read_json
from runtime.steps import Command, Step

MARGIN = (5.0, -1.0)  # added to the initial word's image and text score; the word itself is part of the scored text
HINT = "Stable Diffusion: MODEL=sd-v1-4.ckpt DATA=hw2_data with textual_inversion/ in it."
LEARNING = (
    "Textual inversion adds a new token to a frozen model: its embedding is optimised until the model draws what the images show. "
    "Nothing but that embedding changes."
)
HELD_OUT = (
    " The miniature world has objects and styles in its training images that no caption named; these are learned here."
)
UNSEEN = "The prompts name colours, textures, styles and neighbours that none of the given images shows. No image is chosen by hand."
STRICTLY = (
    " 25 images of one such prompt are judged strictly: an image is right if the colours are right and the silhouette is within 0.9 of "
    "what the autoencoder leaves of true renders. A missing tail or a second handle fails."
)
GRADING = (
    " The course's grader takes 25 images per prompt. CLIP scores each for similarity to the concept's images (image) and to the prompt "
    "(text). The best five by image + 2.5 x text count, and both averages must reach a baseline."
)
ORDINARY = (
    " The course's baselines do not apply here. The baseline is the score of the initial word in the token's place, by the small CLIP in "
    f"the same way, plus {MARGIN[0]:.0f} in image similarity. No caption names the concept, so the scored text has the initial word "
    f"itself, and {-MARGIN[1]:.0f} less is enough there."
)
COMPOSING = (
    "In one prompt, learned tokens disturb each other: features leak, or one concept is left out. "
    "A layout says where each concept belongs. Inside a region the network attends to that concept's prompt only; the strongest form has "
    "a branch of the network for each concept (after Concept Conductor, arXiv 2408.03632)."
)
LEVELS = (
    "Layout: where each concept belongs. Joint: all tokens in one prompt. Regional: every prompt in its own region only. "
    "Conductor: that, and a branch of the network for each concept."
)
BEST = 5  # images of a prompt that the course's grader counts
STRICT_ROW, STRICT_ORDER = "words-strict", ("key", "fish", "mushroom", "cup")  # of docs/results.md
BY_CLIP = "P3: grading them as the course does"
QUESTION = "textual inversion: what a learned token draws"
TOGETHER = "two learned tokens in one prompt"


@dataclass(frozen=True)
class Commands:
    """The commands for the concepts of `case`. A step's folder lies below `steps`.

    The methods take short names of steps: "drawn" for "miniature_drawn".
    """

    case: Personalization
    steps: Path
    device: str

    def name(self, step: str) -> str:
        """Return the full name of a step."""
        return f"{self.case.prefix}_{step}"

    def folder(self, step: str) -> Path:
        """Return the folder of a step."""
        return self.steps / self.name(step)

    def learn(self, step: str, run: Path, *flags: str) -> Command:
        """Return the command that learns the concepts of the step's concepts.json, with `run` as the training's folder."""
        folder = self.folder(step)
        concepts = ("--model", self.case.model, "--concepts", folder / "concepts.json")
        return (
            *("P3_textual_inversion.py", *concepts, *flags),
            *("--output", folder / "vectors", "--run", run, "--device", self.device),
        )

    def sample(self, step: str, learned: Sequence[str], *flags: str | Path) -> Command:
        """Return the command that draws with the vectors of the steps `learned`, which are full names."""
        model = ("--model", self.case.model, "--embeddings", *(self.steps / name / "vectors" for name in learned))
        place = ("--output", self.folder(step) / "images", "--record", self.folder(step) / "record.json")
        return ("P3_inference.py", *flags, *model, *self.case.sampling, *place, "--device", self.device)

    def grade(self, step: str, images: str, file: Path) -> Command:
        """Return the command that grades the images of step `images` as the course does; `file` is the input.json."""
        graded = ("--images", self.folder(images) / "images", "--input", file, "--references", self.case.references)
        place = ("--output", self.folder(step), "--device", self.device)
        return ("P3_evaluate.py", *graded, "--clip", self.case.clip, *place)


def sections(inputs: Inputs) -> list[Section]:
    """Return the sections: learning, what the learned tokens draw, and, with two layout words, two concepts in one image."""
    case = course_concepts(inputs) if inputs.model else miniature_concepts(inputs)
    commands = Commands(case, inputs.steps, inputs.device)
    learning = learning_steps(commands)
    words = tuple(step.name for step in learning.values())
    baselines = baseline_steps(commands) if case.ungraded and case.by_clip else ()
    judged = (STRICTLY if case.strict else "") + (GRADING if case.by_clip else "") + (ORDINARY if baselines else "")
    hint = "" if inputs.model else HINT
    section = partial(Section, problem="P3", inputs=case.inputs, shipped=not inputs.model, hint=hint)
    result = [
        section(
            name=f"{case.prefix}-words",
            title="New words from a few images",
            question=QUESTION,
            text=LEARNING + ("" if inputs.model else HELD_OUT),
            steps=(*case.setup, *learning.values()),
            elements=lambda: learning_elements(inputs.steps, case, learning),
        ),
        section(
            name=f"{case.prefix}-drawn",
            title="What the new words draw",
            question=QUESTION,
            text=UNSEEN + judged,
            steps=drawing_steps(commands, words, baselines),
            elements=lambda: drawn_elements(commands, course=bool(inputs.model)),
        ),
    ]
    if len(case.layout_words) > 1:
        folder = commands.folder("layout")
        concepts = ("--layout", "auto", "--prompt", case.together, "--words", *case.layout_words)
        figure = ("--count", str(case.count), "--figure", folder / "levels.png")
        compose = commands.sample("layout", words, *concepts, *figure)
        result.append(
            section(
                name=f"{case.prefix}-layout",
                title="Several concepts in one image",
                question=TOGETHER,
                text=COMPOSING,
                steps=(Step(folder.name, "P3: each concept in its place", (compose,), case.files, words),),
                elements=lambda: layout_elements(folder),
            )
        )
    return result


# ---------------------------------------------------------------- steps


def learning_steps(commands: Commands) -> dict[str, Step]:
    """Return {kind: step that learns its concepts}. Objects and styles have different recipes."""
    case, steps = commands.case, {}
    for kind in ("object", "style"):
        folder = commands.folder(f"{kind}s")
        if own := [concept for concept in case.concepts if concept["kind"] == kind]:
            command = commands.learn(f"{kind}s", folder, "--validate-every", str(case.validate_every))
            title, ready = f"P3: learning new words for {kind}s", tuple(step.name for step in case.setup)
            files = {folder / "concepts.json": own}
            steps[kind] = Step(folder.name, title, (command,), case.files, ready, files)
    return steps


def baseline_steps(commands: Commands) -> tuple[Step, Step]:
    """Return the step that draws with the initial words in the tokens' places, and the step that grades the images.

    The vectors come from a training at learning rate 1e-12, which changes nothing.
    """
    case, folder, ready = commands.case, commands.folder("plain"), tuple(step.name for step in commands.case.setup)
    unchanged = ("--steps", "1", "--lr", "1e-12", "--max-norm", "0", "--validate-every", "0")
    keep = commands.learn("plain", folder / "run", *unchanged)
    draw = commands.sample("plain", (folder.name,), "--input", folder / "input.json")
    single = [concept | {"vectors": 1} for concept in case.concepts]
    files = {folder / "input.json": case.ungraded, folder / "concepts.json": single}
    measure = commands.grade("plain_scores", "plain", folder / "input.json")
    title = "P3: 25 images per prompt with ordinary words, as baselines"
    return (
        Step(folder.name, title, (keep, draw), case.files, ready, files),
        Step(commands.name("plain_scores"), BY_CLIP, (measure,), case.files, (folder.name,)),
    )


def drawing_steps(commands: Commands, words: tuple[str, ...], baselines: tuple[Step, ...]) -> tuple[Step, ...]:
    """Return the steps that draw with the vectors of the steps `words` and grade the images, with `baselines` in between."""
    case, graded = commands.case, commands.name("graded")
    prompts = [prompt for own in case.prompts.values() for prompt in own]
    draw = commands.sample("drawn", words, "--prompt", *prompts, "--count", str(case.count))
    draw_graded = commands.sample("graded", words, "--input", case.graded)
    files: dict[Path, Any] = {case.graded: case.ungraded} if case.ungraded else {}
    if case.ungraded and baselines:
        record = commands.folder("plain_scores") / "record.json"
        files[case.graded] = partial(with_baselines, case.ungraded, record)
    after = (*words, *(step.name for step in baselines))
    steps = [
        Step(commands.name("drawn"), "P3: images of prompts with the learned words", (draw,), case.files, words),
        *baselines,
        Step(graded, "P3: 25 images per prompt with the learned words", (draw_graded,), case.files, after, files),
    ]
    if case.strict:
        folders = [commands.folder("graded") / "images" / key / "0" for key in case.strict]
        kinds, colours, grounds = zip(*case.strict.values(), strict=True)
        answers = ("--kind", *kinds, "--colour", *colours, "--background", *grounds)
        place = ("--record", commands.folder("strict") / "record.json", "--device", commands.device)
        measure = ("benchmarks/p3_strict.py", "images", *folders, *answers, *place)
        title = "P3: judging them strictly, by shape"
        steps.append(Step(commands.name("strict"), title, (measure,), (DIFFUSION,), (graded,)))
    if case.by_clip:
        grade = commands.grade("scores", "graded", case.graded)
        steps.append(Step(commands.name("scores"), BY_CLIP, (grade,), case.files, (graded,)))
    return tuple(steps)


def with_baselines(entries: dict[str, Any], record: Path) -> dict[str, Any]:
    """Return the entries of an input.json with new baselines: the scores in a record of P3_evaluate.py, plus MARGIN."""
    scores: dict[str, list[list[float]]] = {}
    for case in read_json(record)["metrics"]["cases"]:
        scores.setdefault(case["key"], []).append([case["image_score"] + MARGIN[0], case["text_score"] + MARGIN[1]])
    return {name: entry | {"baseline": scores[name]} for name, entry in entries.items()}


# ---------------------------------------------------------------- what the steps left


def given_images(case: Personalization) -> dict[str, tuple[Path, ...]]:
    """Return {token: image files that it is learned from}."""
    suffixes = (".png", ".jpg", ".jpeg")
    folders = {concept["token"]: Path(concept["images"]) for concept in case.concepts}
    return {
        token: tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes))
        for token, folder in folders.items()
    }


def learning_elements(steps: Path, case: Personalization, learning: dict[str, Step]) -> list[Element]:
    """Return the seconds of learning and, for each concept, two figures: its given images, and samples during training."""
    seconds = sum(read_json(steps / step.name / "record.json")["timings_s"]["training"] for step in learning.values())
    elements: list[Element] = [Score("words learned", f"{len(case.concepts)} in {seconds:.0f} s")]
    for concept, images in zip(case.concepts, given_images(case).values(), strict=True):
        token = concept["token"]
        progress = steps / learning[concept["kind"]].name / f"progress_{token.strip('<>')}.png"
        given = f"{token}: all images that it is learned from, starting at “{concept['init']}”."
        elements += [
            Figure(given, images, columns=3, half=True),
            Figure(f"{token}: the same four noises after more and more steps.", (progress,), half=True),
        ]
    return elements


def drawn_elements(commands: Commands, course: bool) -> list[Element]:
    """Return the training images next to the generated ones, the strict measure's results, and the scores of the course's grader.

    `course`: the baselines are the course's, too.
    """
    case, images = commands.case, commands.folder("drawn") / "images"
    given = given_images(case)
    elements: list[Element] = []
    first = 0  # of the token's prompts
    for token, prompts in case.prompts.items():
        pairs = [(first + k, n) for n in range(case.count) for k in range(len(prompts))]
        paths = tuple(images / f"{prompt}_{n}.png" for prompt, n in pairs)
        labels = tuple(prompts[prompt - first] for prompt, _ in pairs)
        if not first:
            elements.append(Strip("a learned word: given, and drawn", paths[: len(prompts)], before=given[token][:2]))
        elements += [
            Figure(f"{token}: the given images.", given[token], columns=3, half=True),
            Figure(f"{token}: what prompts draw, in {case.count} seeds.", paths, labels, len(prompts), half=True),
        ]
        first += len(prompts)
    if case.strict:
        elements += strict_elements(commands)
    if case.by_clip:
        graded, whose = commands.folder("graded") / "images", "the course's" if course else "the"
        elements += grading_elements(commands.folder("scores"), graded, whose)
    return elements


def strict_elements(commands: Commands) -> list[Element]:
    """Return, per object, the share of strictly right images and a figure of all images of its first graded prompt; then a table."""
    elements: list[Element] = []
    rows = []
    strict_of = commands.case.strict
    entries = read_json(commands.folder("strict") / "record.json")["metrics"]["folders"]
    for (key, (kind, *_)), entry in zip(strict_of.items(), entries, strict=True):
        folder, one = commands.folder("graded") / "images" / key / "0", WORLD[key]
        strict, named = entry["strict"], entry["scene classifier"]
        paths = sorted(folder.glob("*.png"), key=lambda path: int(path.stem.rpartition("_")[2]))
        prompt, reference = one.graded[0].format(one.token), STRICT_ORDER.index(key)
        shares = (f"{sum(strict)} of {len(strict)}", f"{sum(named)} of {len(named)}")
        rows.append((f"{one.token}, a {kind}", prompt, *shares, quoted_percent(STRICT_ROW, reference)))
        score = f"new word for a {kind}: images that are strictly right"
        elements += [
            Score(
                score,
                f"{percent(sum(strict) / len(strict))} of {len(strict)}",
                row=STRICT_ROW,
                quoted=quoted_percent(STRICT_ROW, reference),
            ),
            Figure(f"“{prompt}”: all {len(paths)} images. Right ones are marked.", tuple(paths), marks(strict)),
        ]
    head = ("word", "prompt", "strictly", "classifier", "in any colours")
    caption = f"Right images: strictly, by the scene classifier, which does not see shape, and row {STRICT_ROW} of docs/results.md"
    return [*elements, Table(caption, head, tuple(rows))]


def marks(verdicts: Sequence[bool]) -> tuple[str, ...]:
    """Return a label per image: a check mark or a dash."""
    return tuple("✓" if right else "–" for right in verdicts)


def grading_elements(folder: Path, images: Path, whose: str) -> list[Element]:
    """Return the number of prompts that pass, a table of scores, and the best five images of each prompt."""
    metrics = read_json(folder / "record.json")["metrics"]
    rows: list[tuple[str, ...]] = []
    figures = []
    for case in metrics["cases"]:
        image, text = case["baseline"]
        scores = (f"{value:.2f}" for value in (case["image_score"], image, case["text_score"], text))
        rows.append((case["key"], case["text"], *scores, "PASS" if case["passed"] else "FAIL"))
        best = sorted(case["pictures"], key=lambda one: int(one["rank"]))[:BEST]
        paths = tuple(images / case["key"] / str(case["prompt"]) / one["file"] for one in best)
        labels = tuple(f"image {one['image_score']:.1f}, text {one['text_score']:.1f}" for one in best)
        figures.append(
            Figure(f"“{case['text']}”: the best five of {len(case['pictures'])} images.", paths, labels, BEST)
        )
    head = ("concept", "graded text", "image", "baseline", "text", "baseline", "")
    return [
        Score(f"prompts whose scores reach {whose} baselines", f"{metrics['passed']} of {len(rows)}", "all"),
        Table("Mean scores of the best five images", head, tuple(rows)),
        *figures,
    ]


def layout_elements(folder: Path) -> list[Element]:
    """Return the number of images with the seconds for each, and one figure that compares the levels of composition."""
    metrics = read_json(folder / "record.json")["metrics"]
    return [
        Score(
            "images with a concept in each place", f"{metrics['pictures']}, {metrics['seconds_per_picture']:.2f} s each"
        ),
        Figure(LEVELS, (folder / "levels.png",)),
    ]
