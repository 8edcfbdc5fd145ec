"""Prompts of the zero-shot classifier: sets of templates, sentences per class, and the two forms of class names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from runtime.cli import BadInput
from runtime.files import read_object, read_text
from runtime.validation import validate
from zeroshot.dataset import plain_name

Names = Literal["raw", "clean"]
Sentence = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Sentences = Annotated[list[Sentence], Field(min_length=1)]
Texts = tuple[str, ...] | dict[str, list[str]]
"""Templates for all classes, or class name -> sentences, in the order of the classes."""

REPORT = ("A photo of {}",)
"""The report's one prompt, 58.64 %. It has neither article nor full stop; the stop alone costs 2 points on the same images."""

SINGLE = ("a photo of a {}.",)
"""The one prompt of the CLIP paper (Radford et al. 2021, arXiv 2103.00020)."""

# What images of 32 pixels look like when enlarged: blurred, colourless, flat or harsh, badly or well taken, of a small or a large object.
_LOOKS = (
    "a photo of ARTICLE {}.",
    "a blurry photo of ARTICLE {}.",
    "a black and white photo of ARTICLE {}.",
    "a low contrast photo of ARTICLE {}.",
    "a high contrast photo of ARTICLE {}.",
    "a bad photo of ARTICLE {}.",
    "a good photo of ARTICLE {}.",
    "a photo of ARTICLE small {}.",
    "a photo of ARTICLE big {}.",
)
CIFAR = tuple(look.replace("ARTICLE", article) for article in ("a", "the") for look in _LOOKS)
"""The 18 that OpenAI published for CIFAR-10 and -100 with the CLIP paper: nine looks, each with "a" and with "the"."""

SETS = ("report", "single", "cifar", "imagenet")
_VOWEL_SOUND = re.compile(r"(?!eu|uni|use|usu|ute|one\b|once)[aeiou]|hour|honest|heir", re.IGNORECASE)
_AFTER_ARTICLE = re.compile(r"\b([Aa])n? \{\}")
_BARE = re.compile(r"(^|\b(?:of|with|in|on|at|from|for|by|and|or|showing|is|like|about) )\{\}", re.IGNORECASE)


def texts_of(prompts: str, classes: Sequence[str]) -> Texts:
    """Return the sentences of every class (`read_sentences`) if `prompts` is a .json file, else templates (`templates_of`)."""
    return read_sentences(Path(prompts), classes) if prompts.lower().endswith(".json") else templates_of(prompts)


def templates_of(prompts: str) -> tuple[str, ...]:
    """Return the templates of a named set or of a text file; {} stands for the class name. Raise BadInput if `prompts` is neither."""
    if prompts == "imagenet":
        from open_clip import OPENAI_IMAGENET_TEMPLATES  # slow to import, and functions of a name there

        return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    if prompts in SETS:
        return {"report": REPORT, "single": SINGLE, "cifar": CIFAR}[prompts]
    if not Path(prompts).is_file():
        near = difflib.get_close_matches(prompts, SETS, 1, 0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise BadInput(f"--prompts {prompts} is neither a file nor a set; {hint}sets: {', '.join(SETS)}")
    return read_templates(Path(prompts))


def read_templates(path: Path) -> tuple[str, ...]:
    """Return the templates of a file, one a line; lines that start with # are comments.

    {} or any {word} stands for the class name, and is returned as {}. Raise BadInput for a line without it.
    """
    templates = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        text = re.sub(r"\{\w*\}", "{}", line.strip())
        if not text or text.startswith("#"):
            continue
        if "{}" not in text:
            hint = f"no placeholder, write {{}} where the class goes: {text[:60]!r}"
            raise BadInput(f"--prompts {path}, line {number}: {hint}")
        templates.append(text)
    if not templates:
        raise BadInput(f"--prompts {path} holds no template; one a line, such as: a photo of a {{}}.")
    return tuple(templates)


def read_sentences(path: Path, classes: Sequence[str]) -> dict[str, list[str]]:
    """Return {class: sentences} in the order of `classes` from {"class": ["sentence", ..]}, the form of CuPL.

    CuPL: Pratt et al. 2023, arXiv 2209.03320. Class names are compared by `plain_name`.
    Raise BadInput for an unknown class, and for a class without sentences.
    """
    sentences = validate(dict[str, Sentences], read_object(path), str(path))
    by_name = {plain_name(name): name for name in classes}
    texts: dict[str, list[str]] = {}
    for key, lines in sentences.items():
        if plain_name(key) not in by_name:
            near = difflib.get_close_matches(plain_name(key), by_name, 1)
            hint = f", the closest is {by_name[near[0]]}" if near else ""
            raise BadInput(f"--prompts {path}: {key!r} is none of the {len(classes)} classes{hint}")
        name = by_name[plain_name(key)]
        if name in texts:
            raise BadInput(f"--prompts {path} has sentences of {name} twice, as {key!r} too: put them into one list")
        texts[name] = lines
    if missing := [name for name in classes if name not in texts]:
        raise BadInput(f"--prompts {path} has no sentence for {missing[0]}, give every class one or more")
    return {name: texts[name] for name in classes}


def article(phrase: str) -> str:
    """Return "a" or "an", by the sound of the first word."""
    return "an" if _VOWEL_SOUND.match(phrase) else "a"


def fill(template: str, names: Names, name: str) -> str:
    """Return the template with the class name in the place of {}.

    `names` raw: the name is unchanged. clean: its underscores become spaces, and an "a" before a vowel sound becomes "an".
    With clean, a name at the start or after a preposition gets an article ("A photo of {}" -> "A photo of an oak tree").
    """
    if names == "raw":
        return template.replace("{}", name)
    phrase = name.replace("_", " ")
    a_or_an = article(phrase)
    text = _AFTER_ARTICLE.sub(lambda match: f"{match[1]}{a_or_an[1:]} {{}}", template)
    return _BARE.sub(rf"\1{a_or_an} {{}}", text).replace("{}", phrase)


def fillers(templates: Sequence[str], names: Names) -> list[Callable[[str], str]]:
    """Return for each template a function from class name to prompt, which open_clip's `build_zero_shot_classifier` expects."""
    return [partial(fill, template, names) for template in templates]
