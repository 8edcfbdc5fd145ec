"""The course's formats: input.json, which says what to draw and how it is graded, and the folder of images.

  {"0": {"src_image": "dog", "token_name": "<new1>", "prompt": ["A <new1> on a bench."],
         "prompt_4_clip_eval": ["A dog on a bench."], "baseline": [[79, 34]]}}

Keys, tokens and the number of prompts are free. Sampling needs no prompt_4_clip_eval and no baseline; grading does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from runtime.cli import BadInput
from runtime.files import check_writable_folder, list_files, read_json
from runtime.images import SUFFIXES
from runtime.validation import validate

IMAGES_PER_PROMPT = 25  # of each prompt, no more and no fewer
GRADED = re.compile(r"([^/]+)/(\d+)/source\1_prompt\2_\d+\.png")

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
Score = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Baselines = list[tuple[Score, Score]]  # image score, text score


# ---------------------------------------------------------------- input.json


class CourseConcept(BaseModel):
    """One entry of input.json; `clip_prompts` and `baselines` have one item per prompt, or none at all."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)
    key: str
    source: Text = Field(alias="src_image")
    token: Text = Field(alias="token_name")
    prompts: Texts = Field(alias="prompt")
    clip_prompts: Texts = Field([], alias="prompt_4_clip_eval")
    baselines: Baselines = Field([], alias="baseline")

    @field_validator("token")
    @classmethod
    def check_token(cls, token: str) -> str:
        """Refuse a token of several words."""
        if token.split() != [token]:
            raise ValueError(f"must be one word without spaces, it is {token!r}")
        return token

    @model_validator(mode="after")
    def check(self) -> CourseConcept:
        """Refuse a prompt without the token, and clip_prompts or baselines whose number differs from the prompts'."""
        for index, prompt in enumerate(self.prompts):
            if self.token not in prompt:
                raise ValueError(f"prompt[{index}] doesn't hold the token {self.token}: {prompt!r}")
        for name, alias in (("clip_prompts", "prompt_4_clip_eval"), ("baselines", "baseline")):
            items, count = getattr(self, name), len(self.prompts)
            if name in self.model_fields_set and len(items) != count:
                raise ValueError(f"{alias} must have one item for each of the {count} prompts, it has {len(items)}")
        return self


class GradedConcept(CourseConcept):
    """An entry that must have the fields for grading."""

    clip_prompts: Texts = Field(alias="prompt_4_clip_eval")
    baselines: Baselines = Field(alias="baseline")


def read_input(path: Path, graded: bool = False) -> Sequence[CourseConcept]:
    """Return the concepts in the file's order; `graded` requires the fields for grading.

    Raise BadInput with the file, the key, the field and the value.
    """
    if not path.exists():
        raise BadInput(f"{path} does not exist; the course's own is in ntudlcv/DLCV-Fall-2024-HW2 at github.com")
    entries = validate(dict[str, dict[str, Any]], read_json(path), str(path))
    if not entries:
        raise BadInput(f"{path}: wanted an object with an entry for each concept, it is empty")
    for key in entries:
        if key in ("", ".", "..") or set(key) & set("/\\\0"):
            raise BadInput(f"{path}: key {key!r} can't name a folder; take letters and digits")
    kind = GradedConcept if graded else CourseConcept
    return [validate(kind, fields | {"key": key}, f"{path}, {key!r}") for key, fields in entries.items()]


# ---------------------------------------------------------------- the folder of images


def image_path(output: Path, key: str, prompt: int, n: int) -> Path:
    """Return the path of image n (0 .. 24) of a prompt, as the course names it."""
    return output / key / str(prompt) / f"source{key}_prompt{prompt}_{n}.png"


def find_images(folder: Path) -> tuple[Path, ...]:
    """Return a concept's reference images, sorted by name; raise BadInput if there is none."""
    if not folder.is_dir():
        raise BadInput(
            f"--references {folder.parent}: no folder {folder.name} with pictures of concept {folder.name!r}"
        )
    paths = list_files(folder, SUFFIXES)
    if not paths:
        raise BadInput(
            f"--references {folder.parent}: folder {folder.name} holds no picture ({', '.join(sorted(SUFFIXES))})"
        )
    return tuple(paths)


def stale_files(output: Path, files: Sequence[Path], graded: bool) -> list[Path]:
    """Return images of an earlier run: those of `files` that exist, or with `graded` all in `output` that have the course's names.

    Raise BadInput if `output` can't be written, and with `graded` for any other file there, since the grader accepts none.
    """
    check_writable_folder(output)
    if not graded or not output.is_dir():
        return [path for path in files if path.is_file()]
    existing = sorted(path for path in output.rglob("*") if not path.is_dir())
    for path in existing:
        if not GRADED.fullmatch(path.relative_to(output).as_posix()):
            raise BadInput(f"{path} does not belong in a graded folder: move it, or name another --output")
    return existing


def remove(files: Sequence[Path], output: Path) -> None:
    """Delete these files, and the folders in `output` that become empty."""
    for path in files:
        path.unlink()
    folders = {folder for path in files for folder in path.parents if output in folder.parents}
    for folder in sorted(folders, reverse=True):  # the inner ones first
        if not any(folder.iterdir()):
            folder.rmdir()
