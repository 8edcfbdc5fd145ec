"""The course's own routine on the miniature: input.json with baselines from the initial words, pictures by P3_inference, grades by
P3_evaluate. The initial word's pictures are drawn by the same scripts: its row of the table stands in for the token's vectors.

A learned word has to look more like its pictures than the initial word does, and to leave the prompt as well heard, both beyond chance:
the baseline is the initial word's mean score over several seeds, plus (image) or minus (text) twice the deviation between seeds. Objects
and styles have deviations of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import P3_evaluate
import P3_inference
from benchmarks.p3_learning import INITIAL, kind_of, pictures_of
from P3_embeddings import file_of, save_vectors
from P3_inference_jobs import Settings
from P3_model import load_pipeline
from runtime.files import read_json, write_json

PROMPTS = {  # the captions of what has no name: an object, an unusual style
    "object": (
        ("a photo of a {} on a blue background", "a photo of an object on a blue background"),
        ("a {} on the left, outline style", "an object on the left, outline style"),
    ),
    "style": (
        ("a photo of a red star in the style of {}", "a photo of a red star in the style of something unusual"),
        ("a yellow house in the style of {}", "a yellow house in the style of something unusual"),
    ),
}


Scores = dict[str, list[list[float]]]
"""Concept -> image and text score of each prompt."""
Margins = dict[str, list[float]]
"""Kind -> what is added to the initial word's image and text score."""


@dataclass(frozen=True)
class Course:
    """Where everything is, and how often the initial words are asked."""

    model: str
    clip: str
    folder: Path
    repeats: int
    """Seeds with which the initial words are drawn and graded, two or more."""
    seed: int
    device: str

    def graded(self, vectors: dict[str, Path]) -> dict[str, Any]:
        """`vectors`: a file per concept's name. Leaves input.json, pictures and grades in the folder; returns the grades' metrics."""
        names, learned, initial = list(vectors), self.folder / "learned", self.folder / "initial"
        for name in names:
            pictures_of(name, self.folder / "references", False)
        self._save_initial(names, initial)
        self._write_input(names, {}, {})
        seeds = range(self.seed + 1, self.seed + 1 + self.repeats)
        baselines, margins = baselines_of([self._run(f"initial-{seed}", (initial,), seed) for seed in seeds])
        self._write_input(names, baselines, margins)
        self._run("learned", tuple(vectors.values()), self.seed)
        return dict(read_json(learned / "grades" / "record.json")["metrics"]) | {"margins": margins}

    def _save_initial(self, names: Sequence[str], folder: Path) -> None:
        """The row of each initial word under the concept's token."""
        pipe = load_pipeline(self.model, torch.device("cpu"), torch.float32)
        table = pipe.text_encoder.get_input_embeddings().weight
        for name in names:
            (index,) = pipe.tokenizer(INITIAL[name], add_special_tokens=False).input_ids
            save_vectors(file_of(folder, token_of(name)), token_of(name), table[index][None], INITIAL[name])

    def _write_input(self, names: Sequence[str], baselines: Scores, margins: Margins) -> None:
        entries = {}
        for name in names:
            prompts = PROMPTS[kind_of(name)]
            entries[name] = {
                "src_image": "object",
                "token_name": token_of(name),
                "prompt": [text.format(token_of(name)) for text, _ in prompts],
                "prompt_4_clip_eval": [plain for _, plain in prompts],
                "baseline": baselines.get(name, [[0, 0]] * len(prompts)),
                "margin over the initial word": margins.get(kind_of(name), [0, 0]),
            }
        write_json(self.folder / "input.json", entries)

    def _run(self, which: str, places: tuple[Path, ...], seed: int) -> Scores:
        """Draws 25 pictures per prompt and grades them."""
        place, file = self.folder / which, self.folder / "input.json"
        images, grades = place / "pictures", place / "grades"
        P3_inference.main(
            Settings(
                self.model,
                images,
                file,
                embeddings=places,
                guidance=5.0,
                seed=seed,
                device=self.device,
                record=place / "record.json",
            )
        )
        P3_evaluate.main(
            P3_evaluate.Settings(images, file, self.folder / "references", self.clip, device=self.device, output=grades)
        )
        found: Scores = {}
        for case in read_json(grades / "record.json")["metrics"]["cases"]:
            found.setdefault(case["key"], []).append([case["image_score"], case["text_score"]])
        return found


def baselines_of(rounds: Sequence[Scores]) -> tuple[Scores, Margins]:
    """The mean of several seeds' scores with the margin added, and the margins: twice the standard deviation between seeds, pooled over
    all prompts of a kind, upwards for the image score and downwards for the text score."""
    baselines: Scores = {}
    margins: Margins = {}
    for kind in PROMPTS:
        names = [name for name in rounds[0] if kind_of(name) == kind]
        if not names:
            continue
        scores = torch.tensor([[values for name in names for values in scores[name]] for scores in rounds])
        margin = 2 * scores.var(0).mean(0).sqrt() * torch.tensor([1.0, -1.0])
        margins[kind] = rounded(margin)
        means = iter(scores.mean(0) + margin)
        baselines |= {name: [rounded(next(means)) for _ in rounds[0][name]] for name in names}
    return baselines, margins


def rounded(values: Tensor) -> list[float]:
    """As input.json has them."""
    return [round(x, 2) for x in values.tolist()]


def token_of(name: str) -> str:
    """<fish> for fish."""
    return f"<{name}>"
