"""What words are learned from and drawn with: the course's pictures and Stable Diffusion, or the miniature, which ships."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concepts.course_format import CourseConcept, read_input
from pages.sources import CLIP, DIFFUSION, Sources
from runtime.cli import BadInput
from runtime.files import read_json, write_json
from runtime.steps import Step


@dataclass(frozen=True)
class Case:
    """`concepts`: what P3_textual_inversion.py --concepts takes; `graded`: the input.json, with the concepts' pictures in `references`;
    `prompts`: with several tokens; `placed`: the one that gets a layout, with ordinary `words` for its tokens."""

    prefix: str
    source: str
    real: bool
    model: str
    clip: str
    concepts: list[dict[str, str]]
    graded: Path
    references: Path
    prompts: tuple[str, ...]
    placed: str
    words: tuple[str, ...]
    steps: int
    recipe: tuple[str, ...]
    """More flags of P3_textual_inversion.py."""
    guidance: str
    """As the model is graded."""
    reads: tuple[Path, ...] = ()
    """Files whose change has everything made anew."""
    first: tuple[Step, ...] = ()
    """What comes before learning."""
    without_baseline: dict[str, Any] | None = None
    """The input.json where it has no baselines; what the concepts' initial words reach is taken."""


# ---------------------------------------------------------------- the course's concepts


def course_case(sources: Sources) -> Case:
    """Tokens, pictures and prompts of the course's input.json; the cat as one more concept where its pictures are there.
    Raises BadInput where there is no such file, or it is not what it should be."""
    file = sources.data / "textual_inversion" / "input.json"
    if not file.is_file():
        raise BadInput(f"--model needs {file}, which does not exist: give --data")
    folder, model = file.parent, str(sources.model)
    concepts = [course_concept(folder, entry) for entry in read_input(file)]
    if (folder / "cat").is_dir() and all(Path(one["images"]).name != "cat" for one in concepts):
        concepts.append({"token": "<cat>", "images": f"{folder / 'cat'}", "init": "cat", "kind": "object"})
    things = [one for one in concepts if one["kind"] == "object"] or concepts
    style = "".join([f" in the style of {one['token']}" for one in concepts if one["kind"] == "style"][:1])
    first, last = things[0]["token"], things[-1]["token"]
    together = f"a {first} next to a {last}" if first != last else f"a photo of a {first}"
    bench = f"A {first} perched on a park bench with the Taipei 101 behind{style}"
    return Case(
        prefix="p3",
        source=f"{sources.label(model)}, {sources.label(folder)}",
        real=True,
        model=model,
        clip=sources.clip,
        reads=(folder, Path(model)),
        concepts=concepts,
        graded=file,
        references=folder,
        prompts=(f"a photo of a {first}{style}", bench, together),
        placed=together,
        words=tuple(dict.fromkeys((things[0]["init"], things[-1]["init"]))),
        steps=500,
        recipe=(),
        guidance="7.5",
    )


def course_concept(folder: Path, entry: CourseConcept) -> dict[str, str]:
    """A style is told by its prompts; an object starts from the last word of its name."""
    style = any(f"style of {entry.token}" in prompt for prompt in entry.prompts)
    init = "painting" if style else entry.source.split()[-1].lower()
    images = f"{folder / entry.key}"
    return {"token": entry.token, "images": images, "init": init, "kind": "style" if style else "object"}


# ---------------------------------------------------------------- the miniature's


INITIAL = {
    "fish": ("<new1>", "object", "object"),
    "cup": ("<new2>", "object", "object"),
    "ripple": ("<new3>", "unusual", "style"),
}
ASKED = {
    "fish": ("a photo of a {} on a blue background", "a photo of a red {} on a white background"),
    "cup": ("a photo of a {} on a yellow background", "a photo of a green {} on a white background"),
    "ripple": ("a photo of a star in the style of {}", "a photo of a blue ring in the style of {}"),
}


MARGIN = (5.0, -1.0)  # image and text score above the ordinary word's, which is itself in the text that is scored
STYLED = ("a photo of a <new1> in the style of <new3>", "a red star on a white background in the style of <new3>")


def miniature_case(sources: Sources) -> Case:
    """Two objects and a style that the model was shown and that no caption ever named; the demo learns the objects and grades one."""
    names = ("fish", "cup") if sources.quick else tuple(INITIAL)
    asked = {"fish": 1} if sources.quick else dict.fromkeys(names, 2)
    pictures, model = sources.place("miniature_concepts"), sources.place("miniature_model")
    placed = "a photo of a <new1> next to a <new2>"
    alone = ("a photo of a <new1>", "a photo of a <new2>")
    return Case(
        prefix="miniature",
        source=f"shipped weights {sources.label(DIFFUSION)}, rendered pictures",
        real=False,
        model=f"{model / 'stable_diffusion'}",
        clip=f"{model / 'clip'}",
        first=miniature_steps(pictures, model, names),
        concepts=[concept_of(name, pictures / name) for name in names],
        graded=sources.place("miniature_graded") / "input.json",
        references=pictures,
        prompts=(*alone, *(() if sources.quick else STYLED), placed),
        placed=placed,
        words=("object", "object"),
        steps=400,
        recipe=("--lr", "1e-2", "--max-loss-weight", "30", "--embedding-noise", "1", "--zoom-out", "0.5"),
        guidance="5",
        without_baseline={name: entry_of(name, count) for name, count in asked.items()},
    )


def miniature_steps(pictures: Path, model: Path, names: tuple[str, ...]) -> tuple[Step, Step]:
    """The concepts' pictures, and the model from its parts."""
    render = tuple(
        ("miniature/world.py", "concept", name, "--captions", "--output", f"{pictures / name}") for name in names
    )
    clip, whole = f"{model / 'clip'}", f"{model / 'stable_diffusion'}"
    assemble = (
        ("miniature/train_clip.py", "convert", "--output", clip),
        ("miniature/train_diffusion.py", "assemble", "--clip", clip, "--output", whole),
    )
    return (
        Step("miniature_concepts", "P3: rendering pictures of the concepts", render),
        Step("miniature_model", "P3: putting the miniature's parts together", assemble, (CLIP, DIFFUSION)),
    )


def concept_of(name: str, folder: Path) -> dict[str, str]:
    """For --concepts."""
    token, init, kind = INITIAL[name]
    return {"token": token, "images": f"{folder}", "init": init, "kind": kind}


def entry_of(name: str, count: int) -> dict[str, Any]:
    """An entry of input.json without a baseline yet; no caption names the thing, so text is graded without it."""
    token, _, kind = INITIAL[name]
    asked, unnamed = ASKED[name][:count], "object" if kind == "object" else "something unusual"
    return {
        "src_image": name,
        "token_name": token,
        "prompt": [text.format(token) for text in asked],
        "prompt_4_clip_eval": [text.format(unnamed).replace("a object", "an object") for text in asked],
        "baseline": [[0.0, 0.0] for _ in asked],
    }


def write_baselines(case: Case, record: Path) -> None:
    """The input.json, in which what the ordinary words reached, by the record, and MARGIN are what the learned ones have to reach."""
    reached: dict[str, list[list[float]]] = {}
    for one in read_json(record)["metrics"]["cases"]:
        reached.setdefault(one["key"], []).append([one["image_score"] + MARGIN[0], one["text_score"] + MARGIN[1]])
    entries = case.without_baseline or {}
    write_json(case.graded, {name: entry | {"baseline": reached[name]} for name, entry in entries.items()})
