"""input.json, which says what to draw and how it is graded: a concept for each key, with its token, prompts and baselines.

  {"0": {"src_image": "dog", "token_name": "<new1>", "prompt": ["A <new1> on a bench."],
         "prompt_4_clip_eval": ["A dog on a bench."], "baseline": [[79, 34]]}}

Keys, tokens and the number of prompts are whatever the file says. Drawing needs no prompt_4_clip_eval and no baseline; grading does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from runtime.cli import BadInput
from runtime.files import check_writable_folder, read_json
from runtime.images import SUFFIXES

IMAGES_PER_PROMPT = 25  # of each prompt, no more and no fewer


@dataclass(frozen=True)
class CourseConcept:
    """One entry of the file; `clip_prompts` and `baselines` (image score, text score) have one item per prompt, or none at all."""

    key: str
    source: str
    token: str
    prompts: tuple[str, ...]
    clip_prompts: tuple[str, ...] = ()
    baselines: tuple[tuple[float, float], ...] = ()


def image_path(output: Path, key: str, prompt: int, n: int) -> Path:
    """Where picture n (0 .. 24) of a prompt lies, as the course names it."""
    return output / key / str(prompt) / f"source{key}_prompt{prompt}_{n}.png"


def find_images(folder: Path) -> tuple[Path, ...]:
    """A concept's reference pictures, by name; raises BadInput where there is none."""
    if not folder.is_dir():
        raise BadInput(
            f"--references {folder.parent}: no folder {folder.name} with pictures of concept {folder.name!r}"
        )
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not paths:
        raise BadInput(
            f"--references {folder.parent}: folder {folder.name} holds no picture ({', '.join(sorted(SUFFIXES))})"
        )
    return tuple(paths)


def read_input(path: Path, graded: bool = False) -> list[CourseConcept]:
    """The concepts in the file's order; `graded` requires what grading needs. Raises BadInput with the file, key, field and value."""
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise BadInput(f"{path}: wanted an object with an entry for each concept, it is {shown(content)}")
    return [Entry(path, key, fields).concept(graded) for key, fields in content.items()]


def shown(value: Any) -> str:
    """A value in one short line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Entry:
    """One key of the file, not checked yet; every method raises BadInput that names file, key, field and value."""

    path: Path
    key: str
    fields: Any

    def concept(self, graded: bool) -> CourseConcept:
        """The entry, checked."""
        if self.key in ("", ".", "..") or set(self.key) & set("/\\\0"):
            raise BadInput(f"{self.path}: key {self.key!r} can't name a folder; take letters and digits")
        if not isinstance(self.fields, dict):
            raise BadInput(f"{self.path}, {self.key!r}: wanted an object, it is {shown(self.fields)}")
        found = CourseConcept(self.key, self.text("src_image"), self.token(), self.prompts(), *self.grading(graded))
        for name, items in (("prompt_4_clip_eval", found.clip_prompts), ("baseline", found.baselines)):
            if (graded or name in self.fields) and len(items) != len(found.prompts):
                self.refuse(
                    name, f"must have one item for each of the {len(found.prompts)} prompts, it has {len(items)}"
                )
        return found

    def refuse(self, name: str, reason: str) -> NoReturn:
        """The error, with its place."""
        raise BadInput(f"{self.path}, {self.key!r}: {name} {reason}")

    def value(self, name: str) -> Any:
        """What the field holds."""
        if name not in self.fields:
            self.refuse(name, "is missing")
        return self.fields[name]

    def text(self, name: str) -> str:
        """A text that isn't blank."""
        value = self.value(name)
        if not isinstance(value, str) or not value.strip():
            self.refuse(name, f"must be a text, it is {shown(value)}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, none of them blank."""
        values = self.value(name)
        if not isinstance(values, list):
            self.refuse(name, f"must be a list of texts, it is {shown(values)}")
        for index, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                self.refuse(f"{name}[{index}]", f"must be a text, it is {shown(value)}")
        return tuple(values)

    def token(self) -> str:
        """The concept's word, such as <new1>."""
        token = self.text("token_name")
        if token.split() != [token]:
            self.refuse("token_name", f"must be one word without spaces, it is {token!r}")
        return token

    def prompts(self) -> tuple[str, ...]:
        """At least one, each with the concept's token; it may hold tokens of other concepts too."""
        prompts, token = self.texts("prompt"), self.token()
        if not prompts:
            self.refuse("prompt", "is empty")
        for index, prompt in enumerate(prompts):
            if token not in prompt:
                self.refuse(f"prompt[{index}]", f"doesn't hold the token {token}: {shown(prompt)}")
        return prompts

    def grading(self, required: bool) -> tuple[tuple[str, ...], tuple[tuple[float, float], ...]]:
        """Prompts in plain words and baselines; without `required` each may be absent, then it is empty."""
        texts = self.texts("prompt_4_clip_eval") if required or "prompt_4_clip_eval" in self.fields else ()
        return texts, self.baselines() if required or "baseline" in self.fields else ()

    def baselines(self) -> tuple[tuple[float, float], ...]:
        """Image and text score of each prompt."""
        values = self.value("baseline")
        if not isinstance(values, list):
            self.refuse("baseline", f"must be a list of [image score, text score], it is {shown(values)}")
        for index, pair in enumerate(values):
            if not (isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair))):
                self.refuse(f"baseline[{index}]", f"must be [image score, text score], it is {shown(pair)}")
        return tuple((float(image), float(text)) for image, text in values)


def is_number(value: Any) -> bool:
    """True for finite numbers; JSON's true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---------------------------------------------------------------- the folder of images


GRADED = re.compile(r"([^/]+)/(\d+)/source\1_prompt\2_\d+\.png")


def stale_files(output: Path, files: Sequence[Path], graded: bool) -> list[Path]:
    """Pictures of an earlier run: those of `files` that are there; in a graded folder all that have such names, and BadInput for any
    other file, since the grader takes none."""
    check_writable_folder(output)
    if not graded or not output.is_dir():
        return [path for path in files if path.is_file()]
    found = sorted(path for path in output.rglob("*") if not path.is_dir())
    for path in found:
        if not GRADED.fullmatch(path.relative_to(output).as_posix()):
            raise BadInput(f"{path} does not belong in a graded folder: move it, or name another --output")
    return found


def remove(files: Sequence[Path], output: Path) -> None:
    """Deletes them, and folders in `output` that this leaves empty."""
    for path in files:
        path.unlink()
    folders = {folder for path in files for folder in path.parents if output in folder.parents}
    for folder in sorted(folders, reverse=True):  # the inner ones first
        if not any(folder.iterdir()):
            folder.rmdir()
