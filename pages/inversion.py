"""Personalization on the page: learned tokens, their grades, and several concepts in one image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pages.elements import Element, Figure, Score, Section, Table
from pages.inputs import CLIP, DIFFUSION, Inputs
from runtime.cli import BadInput
from runtime.files import read_json
from runtime.steps import Command, Step, relative

MARGIN = (5.0, -1.0)  # added to the image and text score of the ordinary word, which is part of the scored text itself
HINT = "Stable Diffusion: MODEL=sd-v1-4.ckpt DATA=hw2_data with textual_inversion/ in it."
LEARNING = (
    "Textual inversion adds a new token to a frozen model: its embedding is optimised until the model draws what the images show. "
    "Nothing but that embedding changes."
)
HELD_OUT = (
    " The miniature world has objects and styles in its training images that no caption named; these are learned here."
)
GRADING = (
    "25 images per prompt. CLIP scores each for similarity to the concept's images (image) and to the prompt (text). The best five by "
    "image + 2.5 x text count, and both averages must reach a baseline."
)
ORDINARY = (
    " The course's baselines do not apply here. The baseline is the score of the initial word in the token's place, by the small CLIP in "
    f"the same way, plus {MARGIN[0]:.0f} in image similarity. No caption names the concept, so the scored text has the initial word "
    f"itself, and {-MARGIN[1]:.0f} less is enough there."
)
TOGETHER = "In one prompt, learned tokens disturb each other: features leak, or one concept is left out."
COMPOSING = (
    "A layout says where each concept belongs. Inside a region the network attends to that concept's prompt only; the strongest form has "
    "a branch of the network for each concept (after Concept Conductor, arXiv 2408.03632)."
)
LEVELS = (
    "Left to right: where each concept belongs; joint, all tokens in one prompt; regional, every prompt in its own region only; conductor, "
    "that and a branch of the network for each concept."
)

WORLD = {  # held-out concepts of the miniature: token, initial word, prompts
    "fish": ("<new1>", "object", "a photo of a {} on a blue background", "a photo of a red {} on a white background"),
    "cup": ("<new2>", "object", "a photo of a {} on a yellow background", "a photo of a green {} on a white background"),
    "ripple": ("<new3>", "unusual", "a photo of a star in the style of {}", "a photo of a blue ring in the style of {}"),
}  # fmt: skip
STYLED = ("a photo of a <new1> in the style of <new3>", "a red star on a white background in the style of <new3>")


@dataclass(frozen=True)
class Personalization:
    """A model and the concepts that it learns: the course's, or the miniature's."""

    prefix: str
    """First part of the names of steps."""
    inputs: str
    model: str | Path
    clip: str | Path
    concepts: list[dict[str, Any]]
    """As `P3_textual_inversion.py --concepts` takes them."""
    graded: Path
    """The input.json, with the concepts' images in `references`."""
    references: Path
    prompts: tuple[str, ...]
    """Prompts with several tokens; the last one gets the layout, with `layout_words` for its tokens."""
    layout_words: tuple[str, ...]
    learn_flags: tuple[str, ...]
    sampling: tuple[str, ...]
    """Flags of P3_inference.py."""
    files: tuple[Path, ...] = ()
    """Files whose change runs every step again."""
    setup: tuple[Step, ...] = ()
    """Steps before learning."""
    ungraded: dict[str, Any] | None = None
    """The input.json without baselines, if these are to be measured."""


def sections(inputs: Inputs) -> list[Section]:
    """Return the sections of learning, of grading, and of several concepts in one image."""
    case = course_concepts(inputs) if inputs.model else miniature_concepts(inputs)
    words, graded, scores, together, layout = (
        f"{case.prefix}_{name}" for name in ("words", "graded", "scores", "together", "layout")
    )
    vectors, ready = inputs.steps / words / "vectors", tuple(step.name for step in case.setup)
    hint, device = "" if inputs.model else HINT, ("--device", inputs.device)
    section = partial(Section, problem="P3", inputs=case.inputs, shipped=not inputs.model, hint=hint)

    def sample(step: str, embeddings: Path, *flags: str | Path) -> Command:
        place = ("--output", inputs.steps / step / "images", "--record", inputs.steps / step / "record.json")
        model = ("--model", case.model, "--embeddings", embeddings, *case.sampling)
        return ("P3_inference.py", *flags, *model, *place, *device)

    def learn(folder: Path, run: Path, *flags: str) -> Command:
        concepts = ("--model", case.model, "--concepts", folder / "concepts.json")
        place = ("--output", folder / "vectors", "--run", run)
        return ("P3_textual_inversion.py", *concepts, *flags, *place, *device)

    def grade(step: str, images: str, file: Path) -> Command:
        references = ("--images", inputs.steps / images / "images", "--input", file, "--references", case.references)
        return ("P3_evaluate.py", *references, "--clip", case.clip, "--output", inputs.steps / step, *device)

    learning = Step(
        words,
        "P3: learning new tokens (textual inversion)",
        (learn(inputs.steps / words, inputs.steps / words, *case.learn_flags),),
        case.files,
        ready,
        {inputs.steps / words / "concepts.json": case.concepts},
    )
    grading = "P3: grading them as the course does"

    # Baselines of the miniature: images and grades with the initial words, from a training that changes nothing
    baselines: tuple[Step, ...] = ()
    files: dict[Path, Callable[[], Any]] = {}
    if case.ungraded:
        ordinary, ordinary_scores = f"{case.prefix}_plain", f"{case.prefix}_plain_scores"
        place = inputs.steps / ordinary
        keep = learn(place, place / "run", "--steps", "1", "--lr", "1e-12", "--max-norm", "0", "--validate-every", "0")
        draw = sample(ordinary, place / "vectors", "--input", place / "input.json")
        written = {place / "input.json": case.ungraded, place / "concepts.json": case.concepts}
        title = "P3: 25 images per prompt with ordinary words, as baselines"
        measure = grade(ordinary_scores, ordinary, place / "input.json")
        baselines = (
            Step(ordinary, title, (keep, draw), case.files, ready, written),
            Step(ordinary_scores, grading, (measure,), case.files, (ordinary,)),
        )
        files[case.graded] = partial(with_baselines, case.ungraded, inputs.steps / ordinary_scores / "record.json")

    draw = sample(graded, vectors, "--input", case.graded)
    title, after = "P3: 25 images per prompt with the learned tokens", (words, *(step.name for step in baselines))
    all_in_one = sample(together, vectors, "--prompt", *case.prompts)
    result = [
        section(
            name=f"{case.prefix}-words",
            title="New tokens from a few images",
            text=LEARNING + ("" if inputs.model else HELD_OUT),
            steps=(*case.setup, learning),
            elements=lambda: learning_elements(inputs.steps / words, case),
        ),
        section(
            name=f"{case.prefix}-scores",
            title="How good are the tokens?",
            text=GRADING + ("" if inputs.model else ORDINARY),
            steps=(
                *baselines,
                Step(graded, title, (draw,), case.files, after, files),
                Step(scores, grading, (grade(scores, graded, case.graded),), case.files, (graded,)),
            ),
            elements=lambda: grading_elements(inputs.steps / scores, "the course's" if inputs.model else "the"),
        ),
        section(
            name=f"{case.prefix}-together",
            title="Several concepts in one prompt",
            text=TOGETHER,
            steps=(Step(together, "P3: several concepts in one prompt", (all_in_one,), case.files, (words,)),),
            elements=lambda: [
                Figure(f"“{prompt}”", tuple(sorted((inputs.steps / together / "images").glob(f"{index}_*.png"))))
                for index, prompt in enumerate(case.prompts)
            ],
        ),
    ]
    if len(case.layout_words) > 1:
        flags = ("--layout", "auto", "--prompt", case.prompts[-1], "--words", *case.layout_words)
        compose = sample(layout, vectors, *flags, "--figure", inputs.steps / layout / "levels.png")
        result.append(
            section(
                name=f"{case.prefix}-layout",
                title="Each concept in its place",
                text=COMPOSING,
                steps=(Step(layout, "P3: each concept in its place", (compose,), case.files, (words,)),),
                elements=lambda: layout_elements(inputs.steps / layout, case.prompts[-1]),
            )
        )
    return result


# ---------------------------------------------------------------- models and concepts


def course_concepts(inputs: Inputs) -> Personalization:
    """Return the concepts of the course's input.json, and the cat if its images are present.

    Raises BadInput if the file does not exist or is malformed.
    """
    from concepts.course_format import read_input

    folder, model = inputs.textual_inversion, str(inputs.model)
    file = folder / "input.json"
    if not file.is_file():
        raise BadInput(f"--model needs {file}, which does not exist: give --data")
    concepts = []
    for entry in read_input(file):  # a style if a prompt says so, else an object that starts from its name's last word
        style = any(f"style of {entry.token}" in prompt for prompt in entry.prompts)
        kind, init = ("style", "painting") if style else ("object", entry.source.split()[-1].lower())
        concepts.append({"token": entry.token, "images": f"{folder / entry.key}", "init": init, "kind": kind})
    if (folder / "cat").is_dir() and all(Path(concept["images"]).name != "cat" for concept in concepts):
        concepts.append({"token": "<cat>", "images": f"{folder / 'cat'}", "init": "cat", "kind": "object"})
    objects = [concept for concept in concepts if concept["kind"] == "object"] or concepts
    styles = [f" in the style of {concept['token']}" for concept in concepts if concept["kind"] == "style"]
    styled = styles[0] if styles else ""
    first, last = objects[0]["token"], objects[-1]["token"]
    together = f"a {first} next to a {last}" if first != last else f"a photo of a {first}"
    bench = f"A {first} perched on a park bench with the Taipei 101 behind{styled}"
    return Personalization(
        prefix="p3",
        inputs=f"{relative(model)}, {relative(folder)}",
        model=model,
        clip=inputs.clip,
        concepts=concepts,
        graded=file,
        references=folder,
        prompts=(f"a photo of a {first}{styled}", bench, together),
        layout_words=tuple(dict.fromkeys((objects[0]["init"], objects[-1]["init"]))),
        learn_flags=("--steps", "500", "--validate-every", "125"),
        sampling=("--guidance", "7.5"),
        files=(folder, Path(model)),
    )


def miniature_concepts(inputs: Inputs) -> Personalization:
    """Return two objects and a style that no caption of the miniature named. The demo learns the objects and grades one."""
    names = ("fish", "cup") if inputs.quick else tuple(WORLD)
    images, parts = inputs.steps / "miniature_concepts", inputs.steps / "miniature_model"
    clip, model = parts / "clip", parts / "stable_diffusion"
    render: tuple[Command, ...] = tuple(
        ("miniature/world.py", "concept", name, "--captions", "--output", images / name) for name in names
    )
    assemble: tuple[Command, ...] = (
        ("miniature/train_clip.py", "convert", "--output", clip),
        ("miniature/train_diffusion.py", "assemble", "--clip", clip, "--output", model),
    )
    concepts, ungraded = [], {}
    for name in names:
        token, init, *texts = WORLD[name]
        kind, unnamed = ("style", "something unusual") if init == "unusual" else ("object", "object")
        entry = {"token": token, "images": f"{images / name}", "init": init, "kind": kind, "vectors": 1}
        concepts.append(entry)
        if name == "fish" or not inputs.quick:
            texts = texts[:1] if inputs.quick else texts
            # no caption names the concept, so text is graded without its name
            ungraded[name] = {
                "src_image": name,
                "token_name": token,
                "prompt": [text.format(token) for text in texts],
                "prompt_4_clip_eval": [text.format(unnamed).replace("a object", "an object") for text in texts],
                "baseline": [[0.0, 0.0] for _ in texts],
            }
    return Personalization(
        prefix="miniature",
        inputs=f"shipped weights {relative(DIFFUSION)}, rendered images",
        model=model,
        clip=clip,
        concepts=concepts,
        graded=inputs.steps / "miniature_graded" / "input.json",
        references=images,
        prompts=(
            "a photo of a <new1>",
            "a photo of a <new2>",
            *(() if inputs.quick else STYLED),
            "a photo of a <new1> next to a <new2>",
        ),
        layout_words=("object", "object"),
        learn_flags=("--steps", "400", "--batch", "8", "--validate-every", "100"),
        sampling=("--sampler", "sde", "--guidance", "3"),
        setup=(
            Step("miniature_concepts", "P3: rendering images of the concepts", render),
            Step("miniature_model", "P3: assembling the miniature's parts", assemble, (CLIP, DIFFUSION)),
        ),
        ungraded=ungraded,
    )


def with_baselines(entries: dict[str, Any], record: Path) -> dict[str, Any]:
    """Return an input.json whose baselines are the scores in a record of P3_evaluate.py, plus MARGIN."""
    scores: dict[str, list[list[float]]] = {}
    for case in read_json(record)["metrics"]["cases"]:
        scores.setdefault(case["key"], []).append([case["image_score"] + MARGIN[0], case["text_score"] + MARGIN[1]])
    return {name: entry | {"baseline": scores[name]} for name, entry in entries.items()}


# ---------------------------------------------------------------- what the steps left


def learning_elements(folder: Path, case: Personalization) -> list[Element]:
    """Return each concept's images, how samples came to resemble them, and the loss."""
    seconds = read_json(folder / "record.json")["timings_s"]["training"]
    elements: list[Element] = [Score("tokens learned", f"{len(case.concepts)} in {seconds:.0f} s")]
    for concept in case.concepts:
        token = concept["token"]
        images = sorted(p for p in Path(concept["images"]).iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
        start = f"{token}: all images that it is learned from, starting at “{concept['init']}”."
        progress = folder / f"progress_{token.strip('<>')}.png"
        elements += [
            Figure(start, tuple(images)),
            Figure(f"{token}: the same four noises after more and more steps.", (progress,)),
        ]
    loss = folder / "loss.png"
    if loss.is_file():
        text = "Loss over the steps; most of its ups and downs are those of noise and timestep."
        elements.append(Figure(text, (loss,)))
    return elements


def grading_elements(folder: Path, whose: str) -> list[Element]:
    """Return a row per prompt with its scores and baselines, and the best five images of each."""
    metrics = read_json(folder / "record.json")["metrics"]
    rows = []
    for case in metrics["cases"]:
        image, text = case["baseline"]
        scores = (f"{value:.2f}" for value in (case["image_score"], image, case["text_score"], text))
        rows.append((case["key"], case["text"], *scores, "PASS" if case["passed"] else "FAIL"))
    head = ("concept", "graded text", "image", "baseline", "text", "baseline", "")
    return [
        Score(f"prompts whose scores reach {whose} baselines", f"{metrics['passed']} of {len(rows)}", "all"),
        Figure("The best five images of every prompt, with image and text score.", (folder / "best.png",)),
        Table("Mean scores of the best five images", head, tuple(rows)),
    ]


def layout_elements(folder: Path, prompt: str) -> list[Element]:
    """Return the levels in one figure, and the images of the strongest."""
    images = tuple(sorted((folder / "images").glob("*.png")))
    seconds = read_json(folder / "record.json")["metrics"]["seconds_per_picture"]
    return [
        Score("composed images (conductor)", f"{len(images)}, {seconds:.2f} s each"),
        Figure(LEVELS, (folder / "levels.png",)),
        Figure(f"“{prompt}”: conductor.", images),
    ]
