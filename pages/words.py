"""Learned words on the page: what was learned, what it is worth, and several concepts in one picture; of the course's pictures and
Stable Diffusion where they are given, of the miniature where not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pages.content import Figure, Gallery, Part, Score, Shown, Table, facts_table
from pages.sources import CLIP, DIFFUSION, Sources
from pages.steps import Step
from runtime.cli import BadInput
from runtime.files import read_json, write_json

LEVELS = {
    "joint": "all words in one prompt",
    "regional": "every word is heard in its own region only",
    "conductor": "besides, a branch of the network for each concept",
}
LEARN = ("steps", "batch", "lr", "keep_norm", "precision", "seed")
DRAW = ("solver", "steps", "guidance", "seed", "precision")
HINT = "Stable Diffusion: MODEL=sd-v1-4.ckpt DATA=hw2_data with textual_inversion/ in it."


@dataclass(frozen=True)
class Case:
    """What words are learned from and drawn with. Folders of concepts may come from a step before, so `concepts` (token, images, init,
    kind) and `graded` (an input.json) are written when they are needed."""

    prefix: str
    source: str
    real: bool
    model: str
    clip: str
    reads: tuple[Path, ...]
    first: tuple[Step, ...]
    concepts: list[dict[str, str]]
    graded: Path
    references: Path
    prompts: tuple[str, ...]
    placed: str
    words: tuple[str, ...]
    steps: int
    plain: dict[str, Any] | None = None
    """An input.json in which ordinary words stand for the learned ones, where that is what they have to beat."""


def parts(sources: Sources) -> list[Part]:
    """Learning, grading, several concepts."""
    case = course_case(sources) if sources.model and not sources.quick else miniature_case(sources)
    found = [learning_part(sources, case), grading_part(sources, case), together_part(sources, case)]
    return [*found, layout_part(sources, case)] if len(case.words) > 1 else found


# ---------------------------------------------------------------- the course's concepts


def course_case(sources: Sources) -> Case:
    """Tokens, pictures and prompts of the course's input.json; the cat as a third concept where its pictures are there.
    Raises BadInput where there is no such file."""
    if not sources.concepts:
        raise BadInput(
            f"--model needs {sources.data / 'textual_inversion' / 'input.json'}, which does not exist: give --data"
        )
    folder, entries = sources.concepts.parent, read_json(sources.concepts)
    concepts = [course_concept(folder, key, entry) for key, entry in entries.items()]
    if (folder / "cat").is_dir() and "cat" not in entries:
        concepts.append({"token": "<cat>", "images": f"{folder / 'cat'}", "init": "cat", "kind": "object"})
    things = [one for one in concepts if one["kind"] == "object"]
    styles = [one["token"] for one in concepts if one["kind"] == "style"]
    style = f" in the style of {styles[0]}" if styles else ""
    first, last = things[0]["token"], things[-1]["token"]
    prompts = [f"a photo of a {first}{style}", f"A {first} perched on a park bench with the Taipei 101 behind{style}"]
    together = f"a {first} next to a {last}" if len(things) > 1 else prompts[0]
    return Case(
        prefix="p3", source=f"{sources.model}, {sources.label(folder)}", real=True, model=str(sources.model),
        clip=sources.clip, reads=(folder, *([Path(str(sources.model))] if Path(str(sources.model)).exists() else [])),
        first=(), concepts=concepts, graded=sources.concepts, references=folder, prompts=(*prompts, together),
        placed=together, words=tuple(one["init"] for one in things), steps=500,
    )  # fmt: skip


def course_concept(folder: Path, key: str, entry: dict[str, Any]) -> dict[str, str]:
    """A style is told by its prompts; an object starts from the last word of its name."""
    token = entry["token_name"]
    if any(f"style of {token}" in prompt for prompt in entry["prompt"]):
        return {"token": token, "images": f"{folder / key}", "init": "painting", "kind": "style"}
    return {
        "token": token,
        "images": f"{folder / key}",
        "init": entry["src_image"].split()[-1].lower(),
        "kind": "object",
    }


# ---------------------------------------------------------------- the miniature's


INITIAL = {
    "fish": ("<new1>", "heart", "object"),
    "cup": ("<new2>", "house", "object"),
    "ripple": ("<new3>", "watercolour", "style"),
}
ASKED = {
    "fish": ("a photo of a {} on a blue background", "a photo of a red {} on a white background"),
    "cup": ("a photo of a {} on a yellow background", "a photo of a green {} on a black background"),
    "ripple": ("a photo of a star in the style of {}", "a photo of a blue ring in the style of {}"),
}


def miniature_case(sources: Sources) -> Case:
    """Two objects and a style that the model was shown and that no caption ever named."""
    names = ("fish", "cup") if sources.quick else tuple(INITIAL)
    pictures, parts = sources.place("miniature_concepts"), sources.place("miniature_model")
    render = tuple(("miniature/world.py", "concept", name, "--output", f"{pictures / name}") for name in names)
    clip, model = parts / "clip", parts / "stable_diffusion"
    assemble = (
        ("miniature/train_clip.py", "convert", "--output", f"{clip}"),
        ("miniature/train_diffusion.py", "assemble", "--clip", f"{clip}", "--output", f"{model}"),
    )
    first = (
        Step("miniature_concepts", "P3: rendering pictures of the concepts", render),
        Step("miniature_model", "P3: putting the miniature's parts together", assemble, (CLIP, DIFFUSION)),
    )
    style = (
        ()
        if sources.quick
        else ("a photo of a <new1> in the style of <new3>", "a red star on a black background in the style of <new3>")
    )
    return Case(
        prefix="miniature", source=f"shipped weights {sources.label(DIFFUSION)}, rendered pictures", real=False, model=f"{model}",
        clip=f"{clip}", reads=(), first=first, concepts=[concept_of(name, pictures / name) for name in names],
        graded=sources.place("miniature_graded") / "input.json", references=pictures,
        prompts=("a photo of a <new1>", "a photo of a <new2>", *style, "a photo of a <new1> next to a <new2>"),
        placed="a photo of a <new1> next to a <new2>", words=("heart", "house"), steps=150 if sources.quick else 400,
        plain={name: plain_entry(name, 1 if sources.quick else 2) for name in (names[:1] if sources.quick else names)},
    )  # fmt: skip


def concept_of(name: str, folder: Path) -> dict[str, str]:
    """For --concepts."""
    token, init, kind = INITIAL[name]
    return {"token": token, "images": f"{folder}", "init": init, "kind": kind}


def plain_entry(name: str, count: int) -> dict[str, Any]:
    """An entry of input.json that draws with the nearest ordinary word; no caption names the thing, so text is graded without it."""
    _, init, kind = INITIAL[name]
    asked, unnamed = ASKED[name][:count], "object" if kind == "object" else "something unusual"
    return {
        "src_image": name,
        "token_name": init,
        "prompt": [text.format(init) for text in asked],
        "prompt_4_clip_eval": [text.format(unnamed).replace("a object", "an object") for text in asked],
        "baseline": [[0.0, 0.0] for _ in asked],
    }


def learned_entries(plain: dict[str, Any], record: Path) -> dict[str, Any]:
    """The same with the tokens in place; what the ordinary words reached is what they have to beat."""
    reached: dict[str, list[list[float]]] = {}
    for case in read_json(record)["metrics"]["cases"]:
        reached.setdefault(case["key"], []).append([case["image_score"], case["text_score"]])
    found = {}
    for name, entry in plain.items():
        token = INITIAL[name][0]
        prompts = [text.format(token) for text in ASKED[name][: len(entry["prompt"])]]
        found[name] = entry | {"token_name": token, "prompt": prompts, "baseline": reached[name]}
    return found


# ---------------------------------------------------------------- learning


def learning_part(sources: Sources, case: Case) -> Part:
    """The words."""
    name = f"{case.prefix}_words"
    place = sources.place(name)
    command = ["P3_textual_inversion.py", "--model", case.model, "--concepts", f"{place / 'concepts.json'}"]
    command += ["--steps", str(case.steps), "--validate-every", str(case.steps // 4), "--device", sources.device]
    command += ["--output", f"{place / 'vectors'}", "--run", f"{place}"]
    learn = Step(
        name, "P3: learning new words (textual inversion)", (tuple(command),), case.reads,
        tuple(step.name for step in case.first), ((place / "concepts.json", case.concepts),),
    )  # fmt: skip
    return Part(
        name=f"{case.prefix}-words",
        problem="P3",
        title="New words from a few pictures",
        text="Textual inversion teaches a frozen model a new word: a vector for it is sought with which the model draws what the pictures "
        "show. Nothing but that vector changes."
        + (
            ""
            if case.real
            else " The miniature world has objects and styles that its model saw but that no caption named; these are learned here."
        ),
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
    if (folder / "loss.png").is_file():
        shown.figures.append(
            Figure(
                folder / "loss.png", "Loss over the steps; most of its ups and downs are those of noise and timestep."
            )
        )
    shown.tables.append(facts_table("Settings", {name: record["settings"][name] for name in LEARN}))
    return shown


def pictures_in(folder: Path) -> tuple[Path, ...]:
    """PNG and JPEG files by name."""
    return tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg")))


# ---------------------------------------------------------------- grading


def grading_part(sources: Sources, case: Case) -> Part:
    """25 pictures per prompt and the course's scores."""
    plain = plain_steps(sources, case)
    drawn, scored = f"{case.prefix}_graded", f"{case.prefix}_scores"
    prepare = None
    if case.plain:
        entries, record = case.plain, sources.place(f"{case.prefix}_plain_scores") / "record.json"
        prepare = lambda: write_json(case.graded, learned_entries(entries, record))  # noqa: E731
    steps = draw_and_grade(sources, case, (drawn, scored), case.graded, "the learned words", prepare)
    return Part(
        name=f"{case.prefix}-scores",
        problem="P3",
        title="How good are the words?",
        text="25 pictures per prompt. CLIP scores each for likeness to the concept's pictures (image) and to the prompt (text); the best "
        "five by image + 2.5 x text count, and both averages must reach a baseline. "
        + ("" if case.real else "The course's baselines mean nothing here, so the baseline is what the nearest ordinary word reaches in "
        "the learned word's place, scored by the small CLIP in the same way. No caption names the concept: the text score is for the rest of the prompt."),
        source=case.source,
        real=case.real,
        steps=(*plain, *steps),
        show=lambda folder: show_grading(folder, scored, case),
        hint="" if case.real else HINT,
    )  # fmt: skip


def plain_steps(sources: Sources, case: Case) -> tuple[Step, ...]:
    """Drawing and grading with ordinary words, where these are the baseline."""
    if not case.plain:
        return ()
    names = (f"{case.prefix}_plain", f"{case.prefix}_plain_scores")
    file = sources.place(names[0]) / "input.json"
    return draw_and_grade(sources, case, names, file, "ordinary words, to be beaten", None, ((file, case.plain),))


def draw_and_grade(
    sources: Sources, case: Case, names: tuple[str, str], file: Path, what: str,
    prepare: Callable[[], None] | None, files: tuple[tuple[Path, Any], ...] = (),
) -> tuple[Step, Step]:  # fmt: skip
    """P3_inference.py and P3_evaluate.py on one input.json."""
    drawn, scored = (sources.place(name) for name in names)
    draw = ["P3_inference.py", "--input", f"{file}", "--model", case.model, "--output", f"{drawn / 'pictures'}"]
    draw += ["--embeddings", f"{sources.place(case.prefix + '_words') / 'vectors'}", "--device", sources.device]
    draw += ["--record", f"{drawn / 'record.json'}"]
    grade = ["P3_evaluate.py", "--images", f"{drawn / 'pictures'}", "--input", f"{file}", "--clip", case.clip]
    grade += ["--references", f"{case.references}", "--output", f"{scored}", "--device", sources.device]
    after = [f"{case.prefix}_words"] + ([f"{case.prefix}_plain_scores"] if prepare else [])
    return (
        Step(
            names[0],
            f"P3: 25 pictures per prompt with {what}",
            (tuple(draw),),
            case.reads,
            tuple(after),
            files,
            prepare,
        ),
        Step(names[1], "P3: grading them as the course does", (tuple(grade),), case.reads, (names[0],)),
    )


def show_grading(folder: Path, scored: str, case: Case) -> Shown:
    """A row per prompt, and the best five pictures of each."""
    found = read_json(folder / scored / "record.json")["metrics"]
    cases = found["cases"]
    rows = tuple(
        (one["key"], one["text"], *(f"{value:.2f}" for pair in zip((one["image_score"], one["text_score"]), one["baseline"], strict=True)
        for value in pair), "PASS" if one["passed"] else "FAIL") for one in cases
    )  # fmt: skip
    whose = "the course's" if case.real else "the ordinary word's"
    head = ("concept", "graded text", "image", "baseline", "text", "baseline", "")
    shown = Shown(scores=[Score(f"prompts whose scores reach {whose}", f"{found['passed']} of {len(cases)}", "all")])
    shown.tables = [Table(f"Mean scores of the best five pictures; baselines are {whose}", head, rows)]
    settings = read_json(folder / scored.replace("_scores", "_graded") / "record.json")["settings"]
    shown.tables.append(facts_table("Settings", {name: settings[name] for name in DRAW} | {"clip": found["clip"]}))
    shown.figures = [
        Figure(folder / scored / "best.png", "The best five pictures of every prompt, with image and text score.")
    ]
    return shown


# ---------------------------------------------------------------- several concepts


def common_flags(sources: Sources, case: Case) -> tuple[str, ...]:
    """Model, vectors, device."""
    vectors = sources.place(f"{case.prefix}_words") / "vectors"
    return ("--model", case.model, "--embeddings", f"{vectors}", "--device", sources.device)


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
    name, levels = f"{case.prefix}_layout", ["joint", "conductor"] if sources.quick else list(LEVELS)
    place = sources.place(name)
    start = ("P3_inference.py", "--layout", "auto", "--prompt", case.placed, "--words", *case.words)
    commands = tuple(
        (*start, "--level", level, "--output", f"{place / 'pictures'}", "--draw-layout", f"{place / 'layout.png'}",
         "--record", f"{place / f'record_{level}.json'}", *common_flags(sources, case)) for level in levels
    )  # fmt: skip
    return Part(
        name=f"{case.prefix}-layout",
        problem="P3",
        title="Each concept in its place",
        text="A layout says where each concept belongs, and the network is made to listen to each word in its own region only, with a "
        "branch of its own for each in the strongest form (after Concept Conductor, arXiv 2408.03632).",
        source=case.source,
        real=case.real,
        steps=(Step(name, "P3: each concept in its place", commands, case.reads, (f"{case.prefix}_words",)),),
        show=lambda folder: show_layout(folder / name, case, levels),
        hint="" if case.real else HINT,
    )


def show_layout(folder: Path, case: Case, levels: list[str]) -> Shown:
    """The layout, and a row of pictures per level."""
    shown = Shown(figures=[Figure(folder / "layout.png", f"“{case.placed}”: a region per concept.", small=True)])
    for level in levels:
        paths = tuple(sorted((folder / "pictures").glob(f"{level}_*.png")))
        shown.figures.append(Gallery(paths, f"{level}: {LEVELS[level]}."))
    seconds = read_json(folder / f"record_{levels[-1]}.json")["metrics"]["seconds_per_picture"]
    shown.scores.append(Score(f"composed pictures ({levels[-1]})", f"{len(paths)}, {seconds:.2f} s each"))
    return shown
