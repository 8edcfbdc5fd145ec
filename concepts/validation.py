"""Validation of textual inversion: images by a few-step solver, their CLIP scores, the best vectors so far, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from concepts.dataset import ConceptData
from concepts.embeddings import require_known
from concepts.inversion import TextualInversion
from concepts.sampling import Request, SamplerConfig, StableDiffusionSampler
from diffusion.guidance import Guidance
from runtime import cli
from runtime.batches import in_batches
from runtime.images import decoration, line_figure, pixel_grid
from runtime.seeds import derived_seed
from training.log import TrainingLog

if TYPE_CHECKING:
    from concepts.clip_scores import Scorer

IMAGES = 4  # per concept
SAMPLER = SamplerConfig(solver="dpm", steps=15, guidance=Guidance(5.0))
PROMPTS = {  # default validation prompts: subject fidelity, prompt fidelity
    "object": ("a photo of a {}", "a {} on a blue background"),
    "style": ("a picture in the style of {}", "a red house in the style of {}"),
}


@dataclass
class Validation:
    """Per token the images [IMAGES,3,H,W] uint8 sampled at one step and, with a CLIP, their mean score."""

    step: int
    images: dict[str, Tensor]
    scores: dict[str, float]


@dataclass
class Validator:
    """All validations of a run, and per token the vectors with the best score.

    `prompts` have {} for the token; () = two for the concept's kind. `scorer` None = no scores.
    """

    inversion: TextualInversion
    data: Sequence[ConceptData]
    prompts: Sequence[str]
    scorer: Scorer | None
    folder: Path
    validations: list[Validation] = field(default_factory=list)
    best: dict[str, tuple[float, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise BadInput for prompts with unknown tokens; log those without the concept's token, which show nothing of it."""
        for data in self.data:
            prompts, tokenizer = self._prompts(data), self.inversion.pipe.tokenizer
            require_known(prompts, tokenizer.get_added_vocab(), "--validate: ")
            for prompt in prompts:
                if data.concept.token not in prompt:
                    cli.log(
                        f"--validate {prompt!r} has no {{}} for {data.concept.token}: it shows nothing that is learned"
                    )

    def run(self, step: int, log: TrainingLog) -> None:
        """Sample every concept, draw the figures and log to TensorBoard. With a scorer, score the images and keep the best vectors."""
        validation, vectors, pipe = Validation(step, {}, {}), self.inversion.learned(), self.inversion.pipe
        vae_device = pipe.vae.device  # the CPU if training needs no autoencoder
        pipe.vae.to(self.inversion.device)
        with torch.compiler.set_stance("force_eager"):  # compiling does not pay for a few images
            sampler = StableDiffusionSampler(pipe, SAMPLER)
            for data in self.data:
                token, requests = data.concept.token, self._requests(data)
                batches = in_batches(sampler.sample_images, requests, IMAGES)
                images = torch.cat([images[: len(chunk)] for chunk, images in batches])
                validation.images[token] = images
                if self.scorer:
                    score = validation.scores[token] = self._score(self.scorer, data, requests, images)
                    if token not in self.best or score > self.best[token][0]:
                        self.best[token] = (score, vectors[token])
        pipe.vae.to(vae_device)
        self.validations.append(validation)
        with decoration(self.folder):
            self.draw_figures()
        log.show(step, **{f"score {token}": score for token, score in validation.scores.items()})
        for token, images in validation.images.items():
            log.image(step, token, torch.cat(list(images), 2))

    def _prompts(self, data: ConceptData) -> list[str]:
        return [text.replace("{}", data.concept.token) for text in self.prompts or PROMPTS[data.concept.kind]]

    def _requests(self, data: ConceptData) -> list[Request]:
        prompts = self._prompts(data)
        seeds = [derived_seed(data.seed, data.concept.key, k) for k in range(IMAGES)]
        return [Request(prompts[k % len(prompts)], seed) for k, seed in enumerate(seeds)]

    def _score(self, scorer: Scorer, data: ConceptData, requests: Sequence[Request], images: Tensor) -> float:
        """Return the mean of image + 2.5 x text score. For the text score, the initial word replaces the token."""
        from concepts.clip_scores import TEXT_WEIGHT  # slow to import

        features = scorer.encode(images)
        image_scores = scorer.image_scores(features, scorer.encode(data.images))
        texts = [request.prompt.replace(data.concept.token, data.concept.init) for request in requests]
        text_scores = [scorer.text_scores(features[k : k + 1], text)[0] for k, text in enumerate(texts)]
        return float((image_scores + TEXT_WEIGHT * torch.stack(text_scores)).mean())

    # ------------------------------------------------ results

    def chosen(self) -> dict[str, Tensor]:
        """Return {token: vectors [vectors,width]}: those with the best score, or the present ones if there are no scores."""
        return self.inversion.learned() | {token: vectors for token, (_, vectors) in self.best.items()}

    def scores(self) -> dict[str, dict[int, float]]:
        """Return {token: {step: score}}."""
        tokens = [data.concept.token for data in self.data]
        return {token: {v.step: v.scores[token] for v in self.validations if token in v.scores} for token in tokens}

    def draw_figures(self) -> None:
        """Write progress_NAME.png per token, a row per validation, and scores.png if there are several scores."""
        for data in self.data:
            token = data.concept.token
            scores = [f"\n{v.scores[token]:.1f}" if token in v.scores else "" for v in self.validations]
            rows = [f"{v.step:,}{score}" for v, score in zip(self.validations, scores, strict=True)]
            images = torch.cat([v.images[token] for v in self.validations])
            columns, title = [f"{k + 1}" for k in range(IMAGES)], f"{' / '.join(self._prompts(data))}, by step"
            pixel_grid(self.folder / f"progress_{token.strip('<>')}.png", images, rows, columns, title)
        steps = [v.step for v in self.validations if v.scores]
        if len(steps) > 1:
            lines = {token: list(scores.values()) for token, scores in self.scores().items()}
            line_figure(self.folder / "scores.png", steps, {"image + 2.5 x text": lines}, "step", "Textual inversion")

    # ------------------------------------------------ checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors for a checkpoint."""
        return {"validations": [(v.step, v.images, v.scores) for v in self.validations], "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.validations, self.best = [Validation(*values) for values in state["validations"]], state["best"]
