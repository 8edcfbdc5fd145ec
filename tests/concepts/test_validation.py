"""Validation of textual inversion: its images and scores, the best vectors, the figures' numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_pipeline import WIDTH, save_clip, save_pictures, save_pipeline
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from concepts import validation
from concepts.clip_scores import Scorer
from concepts.dataset import Augmentation, ConceptData, ConceptSet
from concepts.embeddings import install
from concepts.inversion import TextualInversion
from concepts.sampling import Request, SamplerConfig, StableDiffusionSampler
from concepts.stable_diffusion import load_pipeline
from concepts.validation import Validator
from diffusion.guidance import Guidance
from P3_textual_inversion import Settings, main
from training.log import TrainingLog

CPU = torch.device("cpu")
TOKEN = "<new1>"
PROMPTS = ("a photo of a {}", "a {} on a red background", "{} and {}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_pipeline(tmp_path_factory.mktemp("model")))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return save_pictures(tmp_path / "images", 3)


class ScriptedScorer:
    """A scorer whose image scores are a list, one per scoring, and whose texts all score 0."""

    def __init__(self, *scores: float):
        self.scores = list(scores)

    def encode(self, images: Sequence[Any] | Tensor) -> Tensor:
        return torch.zeros(len(images), 1)

    def image_scores(self, features: Tensor, _references: Tensor) -> Tensor:
        return torch.full((len(features),), self.scores.pop(0))

    def text_scores(self, features: Tensor, _text: str) -> Tensor:
        return torch.zeros(len(features))


class Shown(TrainingLog):
    """A log that keeps what it is to show."""

    def __init__(self) -> None:
        super().__init__(Path(), "", 0, 1, shown=False)
        self.values: dict[int, dict[str, float]] = {}
        self.rows: dict[str, Tensor] = {}

    def show(self, step: int, **values: float) -> None:
        self.values[step] = values

    def image(self, step: int, name: str, image: Tensor) -> None:
        self.rows[f"{name} {step}"] = image


def validator_of(model: str, folder: Path, *concepts: ConceptSet, scorer: Any = None, prompts: Any = ()) -> Validator:
    pipe = load_pipeline(model, CPU, torch.float32)
    inversion = TextualInversion(pipe, concepts, 0)
    data = [ConceptData(pipe, concept, 0, Augmentation()) for concept in concepts]
    return Validator(inversion, data, prompts, scorer, folder)


def black(_sampler: StableDiffusionSampler, requests: list[Request]) -> Tensor:
    return torch.zeros(len(requests), 3, 8, 8, dtype=torch.uint8)


def requests_of(patch: pytest.MonkeyPatch, sample: Any = StableDiffusionSampler.sample_images) -> list[list[Request]]:
    """Return a list that grows by the requests of every batch, which `sample` samples."""
    requests: list[list[Request]] = []

    def recorded(sampler: StableDiffusionSampler, own: list[Request]) -> Any:
        requests.append(own)
        return sample(sampler, own)

    patch.setattr(StableDiffusionSampler, "sample_images", recorded)
    return requests


# ---------------------------------------------------------------- the best vectors


@dataclass
class Trial:
    """Runs of the script that continue each other, scored by a script; the vectors of every validation."""

    settings: Settings
    patch: pytest.MonkeyPatch
    vectors: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def train(self, *scores: float, **changes: Any) -> dict[str, Tensor]:
        """Run it; return the saved vectors of every token."""
        original = Validator.run

        def run(validator: Validator, step: int, log: TrainingLog) -> None:
            self.vectors[step] = validator.inversion.learned()
            original(validator, step, log)

        self.patch.setattr("concepts.clip_scores.Scorer.load", lambda *_: ScriptedScorer(*scores))
        with self.patch.context() as patch:
            patch.setattr(Validator, "run", run)
            patch.setattr(StableDiffusionSampler, "sample_images", black)
            main(Settings(**vars(self.settings) | changes))
        files = self.settings.output.glob("*.safetensors")
        return {token: vectors for file in files for token, vectors in load_file(file).items()}


@pytest.fixture
def trial(tmp_path: Path, model: str, images: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    entries = [
        {"token": token, "images": str(images), "init": init} for token, init in (("<a>", "star"), ("<b>", "moon"))
    ]
    (tmp_path / "concepts.json").write_text(json.dumps(entries))
    places: dict[str, Any] = {"run": tmp_path / "run", "output": tmp_path / "learned"}
    machine: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
    lengths: dict[str, Any] = {"steps": 6, "batch": 2, "validate_every": 2, "lr": 0.1}
    chosen = Settings(model, concepts=tmp_path / "concepts.json", clip="scripted", **places, **machine, **lengths)
    return Trial(chosen, monkeypatch)


def assert_from(saved: dict[str, Tensor], trial: Trial, **steps: int) -> None:
    """Assert that each token's vectors are those of this step's validation and of no other."""
    for name, chosen in steps.items():
        same = [
            step for step, vectors in trial.vectors.items() if torch.equal(saved[f"<{name}>"], vectors[f"<{name}>"])
        ]
        assert same == [chosen]


def test_each_token_keeps_the_vectors_of_its_best_validation(trial: Trial) -> None:
    """Each token has its best score at another step, neither of them the last; of equal scores the first counts."""
    saved = trial.train(1.0, 9.0, 3.0, 8.0, 3.0, 7.0)
    assert_from(saved, trial, a=4, b=2)
    scores = json.loads((trial.settings.output.parent / "run" / "record.json").read_text())["metrics"]["scores"]
    assert scores == {"<a>": {"2": 1.0, "4": 3.0, "6": 3.0}, "<b>": {"2": 9.0, "4": 8.0, "6": 7.0}}


def test_the_best_of_an_earlier_part_of_a_run_outlives_a_worse_end(trial: Trial) -> None:
    trial.train(1.0, 9.0, 2.0, 8.0, steps=4)
    assert_from(trial.train(3.0, 7.0, 2.0, 6.0, steps=8), trial, a=6, b=2)


def test_without_scores_the_last_vectors_are_kept(trial: Trial) -> None:
    assert_from(trial.train(clip=None), trial, a=6, b=6)


# ---------------------------------------------------------------- scores and images


def test_a_score_is_image_plus_two_and_a_half_times_text_score_by_clips_own_calls(
    tmp_path: Path, model: str, images: Path
) -> None:
    """The texts have the initial word for the token; the references are all of the concept's pictures."""
    clip = save_clip(tmp_path / "clip")
    concept = ConceptSet(TOKEN, images, "star", vectors=2)
    scorer = Scorer.load(str(clip), CPU)
    validator = validator_of(model, tmp_path, concept, scorer=scorer, prompts=PROMPTS)
    shown = Shown()
    validator.run(9, shown)

    network, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    references = [Image.open(path).convert("RGB") for path in sorted(images.iterdir())]
    texts = ["a photo of a star", "a star on a red background", "star and star", "a photo of a star"]
    scores = []
    with torch.no_grad():
        theirs = network.get_image_features(**processor(images=references, return_tensors="pt")).pooler_output
        for image, text in zip(validator.validations[0].images[TOKEN], texts, strict=True):
            inputs = processor(text=[text], images=Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt")
            ours = network.get_image_features(inputs.pixel_values).pooler_output
            image_score = 100 * torch.nn.functional.cosine_similarity(ours, theirs).mean()
            scores.append(float(image_score + 2.5 * network(**inputs).logits_per_image))
    assert validator.scores() == {TOKEN: {9: pytest.approx(sum(scores) / 4, abs=1e-3)}}
    assert shown.values == {9: {f"score {TOKEN}": validator.scores()[TOKEN][9]}}
    assert max(scores) - min(scores) > 0.1


def test_validation_images_are_sampled_with_what_is_learned_so_far(
    tmp_path: Path, model: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 steps of DPM-Solver++ with guidance 5; the images of a token have the same noise at every validation."""
    concepts = ConceptSet(TOKEN, images, "star", vectors=2), ConceptSet("<new2>", images, "moon", "style")
    validator, shown = validator_of(model, tmp_path, *concepts), Shown()
    original, requests = StableDiffusionSampler.sample_images, requests_of(monkeypatch)
    validator.run(1, shown)
    with torch.no_grad():
        change = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
        validator.inversion.embeddings.learned.weight.add_(change)
    validator.run(2, shown)
    before, after = validator.validations
    assert not torch.equal(before.images[TOKEN], after.images[TOKEN])
    assert [request.prompt for request in requests[0]] == ["a photo of a <new1>", "a <new1> on a blue background"] * 2
    assert [request.prompt for request in requests[1]] == [
        "a picture in the style of <new2>",
        "a red house in the style of <new2>",
    ] * 2
    assert requests[:2] == requests[2:]

    fresh = load_pipeline(model, CPU, torch.float32)
    install(fresh, validator.inversion.learned())
    sampler = StableDiffusionSampler(fresh, SamplerConfig("dpm", 15, Guidance(5.0)))
    for token, own in zip((TOKEN, "<new2>"), requests[2:], strict=True):
        difference = (after.images[token].int() - original(sampler, own).int()).abs()
        assert difference.max() <= 1
        assert torch.equal(shown.rows[f"{token} 2"], torch.cat(list(after.images[token]), 2))


def test_no_two_images_of_neighbouring_runs_and_tokens_share_their_noise(
    tmp_path: Path, model: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of(monkeypatch, black)
    validator = validator_of(model, tmp_path, *(ConceptSet(token, images, "star") for token in ("<a>", "<b>")))
    for seed in range(4):
        for data in validator.data:
            data.seed = seed
        validator.run(1, Shown())
    seeds = [request.seed for own in requests for request in own]
    assert len(set(seeds)) == len(seeds) == 4 * 2 * 4


# ---------------------------------------------------------------- figures


def test_the_figures_show_the_images_and_scores_of_their_steps(
    tmp_path: Path, model: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids: dict[str, tuple[Any, ...]] = {}
    lines: dict[str, tuple[Any, ...]] = {}
    monkeypatch.setattr(validation, "pixel_grid", lambda path, *rest: grids.update({path.name: rest}))
    monkeypatch.setattr(validation, "line_figure", lambda path, *rest: lines.update({path.name: rest}))
    scorer = ScriptedScorer(71.25, 60.0, 73.5, 50.0)
    concepts = ConceptSet(TOKEN, images, "star"), ConceptSet("<new2>", images, "moon", "style")
    validator, shown = validator_of(model, tmp_path, *concepts, scorer=scorer), Shown()
    validator.run(500, shown)
    assert not lines
    validator.run(1000, shown)
    pictures, rows, columns, title = grids["progress_new1.png"]
    assert rows == ["500\n71.2", "1,000\n73.5"]
    assert columns == ["1", "2", "3", "4"]
    assert title == "a photo of a <new1> / a <new1> on a blue background, by step"
    assert torch.equal(pictures, torch.cat([each.images[TOKEN] for each in validator.validations]))
    assert grids["progress_new2.png"][1] == ["500\n60.0", "1,000\n50.0"]
    steps, curves, *_ = lines["scores.png"]
    assert list(steps) == [500, 1000]
    assert curves == {"image + 2.5 x text": {TOKEN: [71.25, 73.5], "<new2>": [60.0, 50.0]}}
