"""The course's own routine on the miniature: input.json with baselines from ordinary words, pictures by P3_inference, grades by
P3_evaluate. The ordinary word's pictures are drawn by the same scripts: its row of the table stands in for the token's vectors.

The word is the one that a caption would have come closest with, as dog is for one's own dog: of the named kinds or styles the one that
shares most of the describing words with the concept. It can't be what the vectors start from: "object" and "unusual" are what captions
call these very concepts, so that the best five of their 25 pictures are often the concept itself.

A learned word has to look more like its pictures than that word does, and to leave the prompt as well heard, both beyond chance:
the baseline is the word's mean score over several seeds, plus (image) or minus (text) twice the deviation between seeds. Objects
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
from benchmarks.p3_learning import kind_of, pictures_of
from concepts.embeddings import file_of, save_vectors
from concepts.stable_diffusion import load_pipeline
from miniature.scenery.captions import STYLE_TRAITS, TRAITS
from miniature.scenery.scenes import KINDS, STYLES
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
"""Kind -> what is added to the ordinary word's image and text score."""


@dataclass(frozen=True)
class Course:
    """Where everything is, and how often the ordinary words are asked."""

    model: str
    clip: str
    folder: Path
    repeats: int
    """Seeds with which the ordinary words are drawn and graded, two or more."""
    seed: int
    device: str

    def graded(self, vectors: dict[str, Path]) -> dict[str, Any]:
        """`vectors`: a file per concept's name. Leaves input.json, pictures and grades in the folder; returns the grades' metrics."""
        names, learned, ordinary = list(vectors), self.folder / "learned", self.folder / "ordinary"
        for name in names:
            pictures_of(name, self.folder / "references", False)
        self._save_ordinary(names, ordinary)
        self._write_input(names, {}, {})
        seeds = range(self.seed + 1, self.seed + 1 + self.repeats)
        baselines, margins = baselines_of([self._run(f"ordinary-{seed}", (ordinary,), seed) for seed in seeds])
        self._write_input(names, baselines, margins)
        self._run("learned", tuple(vectors.values()), self.seed)
        return dict(read_json(learned / "grades" / "record.json")["metrics"]) | {"margins": margins}

    def _save_ordinary(self, names: Sequence[str], folder: Path) -> None:
        """The row of each ordinary word under the concept's token."""
        pipe = load_pipeline(self.model, torch.device("cpu"), torch.float32)
        table = pipe.text_encoder.get_input_embeddings().weight
        for name in names:
            word = ordinary_word(name)
            (index,) = pipe.tokenizer(word, add_special_tokens=False).input_ids
            save_vectors(file_of(folder, token_of(name)), token_of(name), table[index][None], word)

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
                "baseline word": ordinary_word(name),
                "margin over the baseline word": margins.get(kind_of(name), [0, 0]),
            }
        write_json(self.folder / "input.json", entries)

    def _run(self, which: str, places: tuple[Path, ...], seed: int) -> Scores:
        """Draws 25 pictures per prompt and grades them."""
        place, file = self.folder / which, self.folder / "input.json"
        images, grades = place / "pictures", place / "grades"
        P3_inference.main(
            P3_inference.Settings(
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


def ordinary_word(name: str) -> str:
    """Of the named kinds, or styles, the one that shares most of the describing words with a held-out one; of equals the first."""
    traits, named = (STYLE_TRAITS, STYLES) if kind_of(name) == "style" else (TRAITS, KINDS)
    return max(named, key=lambda other: sum({name, other} <= set(holders) for holders in traits.values()))


def token_of(name: str) -> str:
    """<fish> for fish."""
    return f"<{name}>"
