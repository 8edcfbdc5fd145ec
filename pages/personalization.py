"""The concepts that the page learns and the prompts that it draws: the course's if there is a model, else the miniature's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pages.inputs import CLIP, DIFFUSION, Inputs
from runtime.cli import BadInput
from runtime.steps import Command, Step, relative


@dataclass(frozen=True)
class HeldOut:
    """A concept of the miniature that no caption names.

    `graded` are the prompts whose images are graded, `prompts` those with things that the given images don't show.
    """

    token: str
    init: str
    kind: str
    graded: tuple[str, ...]
    prompts: tuple[str, ...]
    colours: tuple[str, str] = ("", "")
    """Colours of object and background in the first graded prompt, which the strict measure reads. Empty for a style."""


OBJECT_PROMPTS = (
    "a green {} on the left",
    "a pink {} in the style of mosaic",
    "a purple {} on a textured white background",
    "a white {} next to an orange star",
)
WORLD = {
    "fish": HeldOut(
        "<new1>", "object", "object",
        ("a photo of a green {} on a white background", "a photo of a pink {} on a purple background"),
        OBJECT_PROMPTS, ("green", "white"),
    ),
    "cup": HeldOut(
        "<new2>", "object", "object",
        ("a photo of a purple {} on a white background", "a photo of a green {} on a grey background"),
        OBJECT_PROMPTS, ("purple", "white"),
    ),
    "ripple": HeldOut(
        "<new3>", "unusual", "style",
        ("a photo of a star in the style of {}", "a photo of a pink house in the style of {}"),
        ("a red star on a white background in the style of {}", "a photo of a <new1> in the style of {}"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Personalization:
    """A model, the concepts that it learns, and how these are drawn and graded."""

    prefix: str
    """Start of the names of steps and sections."""
    inputs: str
    model: str | Path
    clip: str | Path
    concepts: list[dict[str, Any]]
    """Entries of the concepts.json that `P3_textual_inversion.py --concepts` reads."""
    graded: Path
    """The input.json with the graded prompts. The concepts' images lie in the folder `references`."""
    references: Path
    prompts: dict[str, tuple[str, ...]]
    """{token: prompts that are drawn with it}."""
    count: int
    """Images of each prompt in `prompts` and of the layout."""
    together: str
    """Prompt with two tokens, drawn with a layout. `layout_words` are ordinary words for its tokens."""
    layout_words: tuple[str, ...]
    validate_every: int
    sampling: tuple[str, ...]
    """Flags of P3_inference.py."""
    files: tuple[Path, ...] = ()
    """Files on which every step depends: it runs again when one changes."""
    setup: tuple[Step, ...] = ()
    """Steps before learning."""
    ungraded: dict[str, Any] | None = None
    """Content of `graded` before baselines are measured; a step writes the file. None = it exists, with baselines."""
    strict: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    """{key: (object, its colour, the background's colour)} of the first graded prompts, for the strict measure."""
    by_clip: bool = True
    """Grade by CLIP, as the course does."""


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
    bench = f"A {first} perched on a park bench with the Taipei 101 behind{styled}"
    return Personalization(
        prefix="p3",
        inputs=f"{relative(model)}, {relative(folder)}",
        model=model,
        clip=inputs.clip,
        concepts=concepts,
        graded=file,
        references=folder,
        prompts={first: (f"a photo of a {first}{styled}", bench)},
        count=4,
        together=f"a {first} next to a {last}",
        layout_words=tuple(dict.fromkeys((objects[0]["init"], objects[-1]["init"]))),
        validate_every=125,
        sampling=("--guidance", "7.5"),
        files=(folder, Path(model)),
    )


def miniature_concepts(inputs: Inputs) -> Personalization:
    """Return two objects and a style that no caption of the miniature names. The demo has the objects only."""
    concepts = {key: one for key, one in WORLD.items() if one.kind == "object" or not inputs.quick}
    images, parts = inputs.steps / "miniature_concepts", inputs.steps / "miniature_model"
    clip, model = parts / "clip", parts / "stable_diffusion"
    render: tuple[Command, ...] = tuple(
        ("miniature/world.py", "concept", key, "--captions", "--output", images / key) for key in concepts
    )
    assemble: tuple[Command, ...] = (
        ("miniature/train_clip.py", "convert", "--output", clip),
        ("miniature/train_diffusion.py", "assemble", "--clip", clip, "--output", model),
    )
    ungraded = {}
    for key, one in concepts.items():
        texts = one.graded[:1] if inputs.quick else one.graded
        unnamed = "something unusual" if one.kind == "style" else one.init
        # no caption names the concept, so text is graded without its name
        ungraded[key] = {
            "src_image": key,
            "token_name": one.token,
            "prompt": [text.format(one.token) for text in texts],
            "prompt_4_clip_eval": [text.format(unnamed).replace("a object", "an object") for text in texts],
            "baseline": [[0.0, 0.0] for _ in texts],
        }
    return Personalization(
        prefix="miniature",
        inputs=f"weights {relative(DIFFUSION)}, rendered images",
        model=model,
        clip=clip,
        concepts=[
            {"token": one.token, "images": f"{images / key}", "init": one.init, "kind": one.kind}
            for key, one in concepts.items()
        ],
        graded=inputs.steps / "miniature_graded" / "input.json",
        references=images,
        prompts={one.token: tuple(text.format(one.token) for text in one.prompts) for one in concepts.values()},
        count=2 if inputs.quick else 4,
        together="a photo of a <new1> next to a <new2>",
        layout_words=("object", "object"),
        validate_every=20,
        sampling=("--sampler", "sde", "--guidance", "3"),
        setup=(
            Step("miniature_concepts", "P3: rendering images of the concepts", render),
            Step("miniature_model", "P3: assembling the miniature's parts", assemble, (CLIP, DIFFUSION)),
        ),
        ungraded=ungraded,
        strict={key: (key, *one.colours) for key, one in concepts.items() if one.kind == "object"},
        by_clip=not inputs.quick,
    )
