"""Looks at the progress of textual inversion: pictures by a few-step solver, their scores, the best vectors so far, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from concepts.clip_scores import TEXT_WEIGHT, Scorer
from concepts.dataset import VALIDATION_PROMPTS
from concepts.inversion import ConceptData, TextualInversion
from concepts.sampling import Request, SamplerConfig, StableDiffusionSampler
from diffusion.guidance import Guidance
from runtime.batches import in_batches
from runtime.images import labelled_grid, line_figure
from runtime.seeds import derived_seed

IMAGES = 4  # pictures of every look
SAMPLER = SamplerConfig(solver="dpm", steps=15, guidance=Guidance(5.0))


@dataclass
class Validation:
    """One look: per token the pictures [SHOWN,3,H,W] uint8, and a score where a CLIP is at hand."""

    step: int
    images: dict[str, Tensor]
    scores: dict[str, float]


@dataclass
class Validator:
    """All looks of a run, and per token the vectors that scored best. `prompts` have {} for the token; none: those of the kind."""

    learner: TextualInversion
    prompts: Sequence[str]
    scorer: Scorer | None
    folder: Path
    taken: list[Validation] = field(default_factory=list)
    best: dict[str, tuple[float, Tensor]] = field(default_factory=dict)

    def take(self, step: int) -> Validation:
        """Draws every concept, scores it, keeps the best rows."""
        look, rows = Validation(step, {}, {}), self.learner.learned()
        with self.learner.decoder(), torch.compiler.set_stance("force_eager"):  # a few pictures don't pay for compiling
            painter = StableDiffusionSampler(self.learner.pipe, SAMPLER)
            for lesson in self.learner.lessons:
                orders = self._orders(lesson)
                images = torch.cat(
                    [made[: len(chunk)] for chunk, made in in_batches(painter.sample_images, orders, IMAGES)]
                )
                look.images[lesson.concept.token] = images
                if self.scorer:
                    self._keep(look, lesson, self._score(self.scorer, lesson, orders, images), rows)
        self.taken.append(look)
        self.draw()
        return look

    def _prompts(self, lesson: ConceptData) -> list[str]:
        return [
            text.replace("{}", lesson.concept.token) for text in self.prompts or VALIDATION_PROMPTS[lesson.concept.kind]
        ]

    def _orders(self, lesson: ConceptData) -> list[Request]:
        prompts, seed = self._prompts(lesson), self.learner.seed
        return [Request(prompts[k % len(prompts)], derived_seed(seed, lesson.concept.key, k)) for k in range(IMAGES)]

    def _keep(self, look: Validation, lesson: ConceptData, score: float, rows: dict[str, Tensor]) -> None:
        token = lesson.concept.token
        look.scores[token] = score
        if token not in self.best or score > self.best[token][0]:
            self.best[token] = (score, rows[token])

    def _score(self, scorer: Scorer, lesson: ConceptData, orders: Sequence[Request], images: Tensor) -> float:
        """Mean of image + 2.5 x text, the text being the prompt with the initial word in the token's place."""
        features, references = scorer.encode(images), scorer.encode(lesson.pictures)
        likeness = scorer.image_scores(features, references)
        texts = [order.prompt.replace(lesson.concept.token, lesson.concept.init) for order in orders]
        fit = torch.stack([scorer.text_scores(features[k : k + 1], text)[0] for k, text in enumerate(texts)])
        return float((likeness + TEXT_WEIGHT * fit).mean())

    # ------------------------------------------------ what is left

    def chosen(self) -> dict[str, Tensor]:
        """Per token the vectors that scored best, or the last ones."""
        last = self.learner.learned()
        return {token: self.best[token][1] if token in self.best else rows for token, rows in last.items()}

    def scores(self) -> dict[str, dict[int, float]]:
        """Per token the scores by step."""
        tokens = [lesson.concept.token for lesson in self.learner.lessons]
        return {token: {x.step: x.scores[token] for x in self.taken if token in x.scores} for token in tokens}

    def pictures(self) -> list[Path]:
        """The figures of the progress, one per token."""
        return [self._figure(lesson) for lesson in self.learner.lessons]

    def _figure(self, lesson: ConceptData) -> Path:
        return self.folder / f"progress_{lesson.concept.token.strip('<>')}.png"

    def draw(self) -> None:
        """progress_NAME.png per token, a row per look; scores.png where there are several scores."""
        for lesson in self.learner.lessons:
            token = lesson.concept.token
            names = [f"{x.step:,}" + (f"\n{x.scores[token]:.1f}" if token in x.scores else "") for x in self.taken]
            images = torch.cat([look.images[token] for look in self.taken])
            columns, told = [f"{k + 1}" for k in range(IMAGES)], " / ".join(self._prompts(lesson))
            labelled_grid(self._figure(lesson), images, names, columns, f"{told}, by step", inch=1.2)
        steps = [look.step for look in self.taken if look.scores]
        if len(steps) > 1:
            lines = {token: list(found.values()) for token, found in self.scores().items()}
            line_figure(self.folder / "scores.png", steps, {"image + 2.5 x text": lines}, "step", "Textual inversion")

    def state(self) -> dict[str, Any]:
        """Plain types and tensors, for a checkpoint."""
        return {"looks": [(look.step, look.images, look.scores) for look in self.taken], "best": self.best}

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave."""
        self.taken, self.best = [Validation(*look) for look in state["looks"]], state["best"]
