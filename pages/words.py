"""Learned words on the page: what was learned, what it is worth, and several concepts in one picture."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pages.cases import MARGIN, Case, course_case, miniature_case, write_baselines
from pages.content import Figure, Gallery, Part, Score, Shown, Table, facts_table
from pages.sources import Sources
from runtime.files import read_json
from runtime.steps import Step

LEVELS = (
    "Left to right: where each concept belongs; joint, all words in one prompt; regional, every word heard in its own region only; "
    "conductor, that and a branch of the network for each concept."
)
COMPOSING = (
    "A layout says where each concept belongs, and the network is made to listen to each word in its own region only, with a branch of "
    "its own for each in the strongest form (after Concept Conductor, arXiv 2408.03632)."
)
LEARN = ("steps", "batch", "lr", "max_norm", "precision", "seed")
DRAW = ("solver", "steps", "guidance", "seed", "precision")
HINT = "Stable Diffusion: MODEL=sd-v1-4.ckpt DATA=hw2_data with textual_inversion/ in it."
GRADED = "P3: grading them as the course does"
LEARNING = (
    "Textual inversion teaches a frozen model a new word: a vector for it is sought with which the model draws what the pictures show. "
    "Nothing but that vector changes."
)
HELD_OUT = (
    " The miniature world has objects and styles that its model saw but that no caption named; these are learned here."
)
GRADING = (
    "25 pictures per prompt. CLIP scores each for likeness to the concept's pictures (image) and to the prompt (text); the best five by "
    "image + 2.5 x text count, and both averages must reach a baseline."
)
ORDINARY = (
    " The course's baselines mean nothing here, so the baseline is what its initial word reaches in the learned word's place, scored by "
    f"the small CLIP in the same way, and {MARGIN[0]:.0f} more in likeness. No caption names the concept, so the text that is scored has "
    f"the initial word itself; {-MARGIN[1]:.0f} less is enough there."
)


def parts(sources: Sources) -> list[Part]:
    """Learning, grading, several concepts."""
    case = course_case(sources) if sources.model and not sources.quick else miniature_case(sources)
    found = [learning_part(sources, case), grading_part(sources, case), together_part(sources, case)]
    return [*found, layout_part(sources, case)] if len(case.words) > 1 else found


# ---------------------------------------------------------------- learning


def learning_part(sources: Sources, case: Case) -> Part:
    """The words."""
    name = f"{case.prefix}_words"
    place = sources.place(name)
    command = ["P3_textual_inversion.py", "--model", case.model, "--concepts", f"{place / 'concepts.json'}"]
    command += ["--steps", str(case.steps), *case.recipe, "--validate-every", str(case.steps // 4)]
    command += ["--device", sources.device]
    command += ["--output", f"{place / 'vectors'}", "--run", f"{place}"]
    learn = Step(
        name, "P3: learning new words (textual inversion)", (tuple(command),), case.reads,
        tuple(step.name for step in case.first), ((place / "concepts.json", case.concepts),),
    )  # fmt: skip
    return Part(
        name=f"{case.prefix}-words",
        problem="P3",
        title="New words from a few pictures",
        text=LEARNING + ("" if case.real else HELD_OUT),
        source=case.source,
        real=case.real,
        steps=(*case.first, learn),
        show=lambda folder: show_learning(folder / name, case),
        hint="" if case.real else HINT,
    )


def show_learning(folder: Path, case: Case) -> Shown:
    """The pictures it learned from, and how the drawings came nearer."""
    record = read_json(folder / "record.json")
    shown = Shown(scores=[Score("words learned", f"{len(case.concepts)} in {record['timings_s']['training']:.0f} s")])
    for concept in case.concepts:
        token, images = concept["token"], Path(concept["images"])
        shown.figures.append(
            Gallery(pictures_in(images), f"{token}: all that it is learned from, starting at “{concept['init']}”.")
        )
        progress = folder / f"progress_{token.strip('<>')}.png"
        shown.figures.append(Figure(progress, f"{token}: the same four noises after more and more steps."))
    loss = folder / "loss.png"
    if loss.is_file():
        shown.figures.append(
            Figure(loss, "Loss over the steps; most of its ups and downs are those of noise and timestep.")
        )
    shown.tables.append(facts_table("Settings", {name: record["settings"][name] for name in LEARN}))
    return shown


def pictures_in(folder: Path) -> tuple[Path, ...]:
    """PNG and JPEG files by name."""
    return tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg")))


# ---------------------------------------------------------------- grading


def grading_part(sources: Sources, case: Case) -> Part:
    """25 pictures per prompt and the course's scores."""
    drawn, scored = f"{case.prefix}_graded", f"{case.prefix}_scores"
    words, plain = f"{case.prefix}_words", plain_steps(sources, case)
    after = (words, *(step.name for step in plain))
    prepare = partial(write_baselines, case, sources.place(plain[-1].name) / "record.json") if plain else None
    draw = draw_command(sources, case, drawn, case.graded, sources.place(words) / "vectors")
    steps = (
        Step(drawn, "P3: 25 pictures per prompt with the learned words", (draw,), case.reads, after, prepare=prepare),
        Step(scored, GRADED, (grade_command(sources, case, drawn, scored, case.graded),), case.reads, (drawn,)),
    )
    return Part(
        name=f"{case.prefix}-scores",
        problem="P3",
        title="How good are the words?",
        text=GRADING + ("" if case.real else ORDINARY),
        source=case.source,
        real=case.real,
        steps=(*plain, *steps),
        show=lambda folder: show_grading(folder, scored, case),
        hint="" if case.real else HINT,
    )


def plain_steps(sources: Sources, case: Case) -> tuple[Step, ...]:
    """Drawing and grading with the initial words, where these are the baseline: a training that learns nothing."""
    if not case.without_baseline:
        return ()
    drawn, scored = f"{case.prefix}_plain", f"{case.prefix}_plain_scores"
    place = sources.place(drawn)
    file, concepts = place / "input.json", place / "concepts.json"
    keep = ("--steps", "1", "--lr", "1e-12", "--max-norm", "0", "--validate-every", "0")
    initial: tuple[str, ...] = ("P3_textual_inversion.py", "--model", case.model, "--concepts", f"{concepts}", *keep)
    initial += ("--device", sources.device, "--output", f"{place / 'vectors'}", "--run", f"{place / 'run'}")
    draw = draw_command(sources, case, drawn, file, place / "vectors")
    files = ((file, case.without_baseline), (concepts, case.concepts))
    title, after = "P3: 25 pictures per prompt with ordinary words, to be beaten", tuple(x.name for x in case.first)
    grade = grade_command(sources, case, drawn, scored, file)
    return (
        Step(drawn, title, (initial, draw), case.reads, after, files),
        Step(scored, GRADED, (grade,), case.reads, (drawn,)),
    )


def draw_command(sources: Sources, case: Case, drawn: str, file: Path, vectors: Path) -> tuple[str, ...]:
    """25 pictures for each prompt of an input.json."""
    place = sources.place(drawn)
    command: tuple[str, ...] = (
        "P3_inference.py",
        "--input",
        f"{file}",
        "--model",
        case.model,
        "--output",
        f"{place / 'pictures'}",
    )
    command += ("--embeddings", f"{vectors}", "--guidance", case.guidance, "--device", sources.device)
    return (*command, "--record", f"{place / 'record.json'}")


def grade_command(sources: Sources, case: Case, drawn: str, scored: str, file: Path) -> tuple[str, ...]:
    """The course's scores of these."""
    pictures, device = f"{sources.place(drawn) / 'pictures'}", sources.device
    command = ("P3_evaluate.py", "--images", pictures, "--input", f"{file}", "--references", f"{case.references}")
    return (*command, "--clip", case.clip, "--output", f"{sources.place(scored)}", "--device", device)


def show_grading(folder: Path, scored: str, case: Case) -> Shown:
    """A row per prompt, and the best five pictures of each."""
    found = read_json(folder / scored / "record.json")["metrics"]
    cases = found["cases"]
    rows = tuple(score_row(one) for one in cases)
    whose = "the course's baselines" if case.real else "the baselines"
    head = ("concept", "graded text", "image", "baseline", "text", "baseline", "")
    shown = Shown(scores=[Score(f"prompts whose scores reach {whose}", f"{found['passed']} of {len(cases)}", "all")])
    shown.tables = [Table("Mean scores of the best five pictures", head, rows)]
    settings = read_json(folder / scored.replace("_scores", "_graded") / "record.json")["settings"]
    shown.tables.append(facts_table("Settings", {name: settings[name] for name in DRAW} | {"clip": found["clip"]}))
    shown.figures = [
        Figure(folder / scored / "best.png", "The best five pictures of every prompt, with image and text score.")
    ]
    return shown


def score_row(one: dict[str, Any]) -> tuple[str, ...]:
    """Image and text score of a prompt beside their baselines."""
    image, text = one["baseline"]
    numbers = (one["image_score"], image, one["text_score"], text)
    return (one["key"], one["text"], *(f"{value:.2f}" for value in numbers), "PASS" if one["passed"] else "FAIL")


# ---------------------------------------------------------------- several concepts


def common_flags(sources: Sources, case: Case) -> tuple[str, ...]:
    """Model, vectors, guidance, device."""
    vectors = sources.place(f"{case.prefix}_words") / "vectors"
    return (
        "--model",
        case.model,
        "--embeddings",
        f"{vectors}",
        "--guidance",
        case.guidance,
        "--device",
        sources.device,
    )


def together_part(sources: Sources, case: Case) -> Part:
    """Learned words alone and together in one prompt."""
    name = f"{case.prefix}_together"
    place = sources.place(name)
    command = ("P3_inference.py", "--prompt", *case.prompts, "--output", f"{place / 'pictures'}")
    command += ("--record", f"{place / 'record.json'}", *common_flags(sources, case))
    return Part(
        name=f"{case.prefix}-together",
        problem="P3",
        title="Several concepts in one prompt",
        text="Put into one prompt, learned words disturb each other: features leak, or one thing is left out.",
        source=case.source,
        real=case.real,
        steps=(Step(name, "P3: several concepts in one prompt", (command,), case.reads, (f"{case.prefix}_words",)),),
        show=lambda folder: show_together(folder / name, case),
        hint="" if case.real else HINT,
    )


def show_together(folder: Path, case: Case) -> Shown:
    """A row of pictures per prompt."""
    settings = read_json(folder / "record.json")["settings"]
    galleries = [
        Gallery(tuple(sorted((folder / "pictures").glob(f"{index}_*.png"))), f"“{prompt}”")
        for index, prompt in enumerate(case.prompts)
    ]
    return Shown(figures=[*galleries], tables=[facts_table("Settings", {name: settings[name] for name in DRAW})])


def layout_part(sources: Sources, case: Case) -> Part:
    """Each concept in its place, by every level that keeps them apart."""
    name = f"{case.prefix}_layout"
    place = sources.place(name)
    command = ("P3_inference.py", "--layout", "auto", "--prompt", case.placed, "--words", *case.words)
    command += ("--output", f"{place / 'pictures'}", "--figure", f"{place / 'levels.png'}")
    command += ("--record", f"{place / 'record.json'}", *common_flags(sources, case))
    return Part(
        name=f"{case.prefix}-layout",
        problem="P3",
        title="Each concept in its place",
        text=COMPOSING,
        source=case.source,
        real=case.real,
        steps=(Step(name, "P3: each concept in its place", (command,), case.reads, (f"{case.prefix}_words",)),),
        show=lambda folder: show_layout(folder / name, case),
        hint="" if case.real else HINT,
    )


def show_layout(folder: Path, case: Case) -> Shown:
    """The levels side by side, and the pictures of the strongest."""
    record = read_json(folder / "record.json")
    paths = tuple(sorted((folder / "pictures").glob("*.png")))
    return Shown(
        [
            Score(
                "composed pictures (conductor)", f"{len(paths)}, {record['metrics']['seconds_per_picture']:.2f} s each"
            )
        ],
        [
            Figure(folder / "levels.png", LEVELS),
            Gallery(paths, f"“{case.placed}”: conductor."),
        ],
        [facts_table("Settings", {name: record["settings"][name] for name in DRAW})],
    )
