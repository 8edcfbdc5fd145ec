"""The course's own routine on the miniature: input.json with baselines from the initial words, pictures by P3_inference, grades by
P3_evaluate. The initial word's pictures are drawn by the same scripts: its row of the table stands in for the token's vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import P3_evaluate
import P3_inference
from benchmarks.p3_learning import INITIAL, pictures_of
from miniature.scenes import HELD_OUT_STYLES
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


@dataclass(frozen=True)
class Course:
    """Where everything is, and how much better than the initial word the learned one must be."""

    model: str
    clip: str
    folder: Path
    margin: tuple[float, float]
    """Image and text score above the initial word's, which make the baseline."""
    seed: int
    device: str

    def graded(self, vectors: dict[str, Path]) -> dict[str, Any]:
        """`vectors`: a file per concept's name. Leaves input.json, pictures and grades in the folder; returns the grades' metrics."""
        names, learned, initial = list(vectors), self.folder / "learned", self.folder / "initial"
        for name in names:
            pictures_of(name, self.folder / "references", False)
        self._save_initial(names, initial)
        self._write_input(names, {})
        baselines = self._run("initial", (initial,))
        self._write_input(names, baselines)
        self._run("learned", tuple(vectors.values()))
        return dict(read_json(learned / "grades" / "record.json")["metrics"])

    def _save_initial(self, names: Sequence[str], folder: Path) -> None:
        """The row of each initial word under the concept's token."""
        pipe = load_pipeline(self.model, torch.device("cpu"), torch.float32)
        table = pipe.text_encoder.get_input_embeddings().weight
        for name in names:
            (index,) = pipe.tokenizer(INITIAL[name], add_special_tokens=False).input_ids
            save_vectors(file_of(folder, token_of(name)), token_of(name), table[index][None], INITIAL[name])

    def _write_input(self, names: Sequence[str], baselines: dict[str, list[list[float]]]) -> None:
        entries = {}
        for name in names:
            prompts = PROMPTS["style" if name in HELD_OUT_STYLES else "object"]
            entries[name] = {
                "src_image": "object",
                "token_name": token_of(name),
                "prompt": [text.format(token_of(name)) for text, _ in prompts],
                "prompt_4_clip_eval": [plain for _, plain in prompts],
                "baseline": baselines.get(name, [[0, 0]] * len(prompts)),
                "margin over the initial word": self.margin,
            }
        write_json(self.folder / "input.json", entries)

    def _run(self, which: str, places: tuple[Path, ...]) -> dict[str, list[list[float]]]:
        """Draws 25 pictures per prompt and grades them; returns scores plus margin, per concept and prompt."""
        place, file = self.folder / which, self.folder / "input.json"
        images, grades = place / "pictures", place / "grades"
        P3_inference.main(
            Settings(
                self.model,
                images,
                file,
                embeddings=places,
                guidance=5.0,
                seed=self.seed,
                device=self.device,
                record=place / "record.json",
            )
        )
        P3_evaluate.main(
            P3_evaluate.Settings(images, file, self.folder / "references", self.clip, device=self.device, output=grades)
        )
        found: dict[str, list[list[float]]] = {}
        for case in read_json(grades / "record.json")["metrics"]["cases"]:
            scores = (case["image_score"] + self.margin[0], case["text_score"] + self.margin[1])
            found.setdefault(case["key"], []).append([round(score, 2) for score in scores])
        return found


def token_of(name: str) -> str:
    """<fish> for fish."""
    return f"<{name}>"
