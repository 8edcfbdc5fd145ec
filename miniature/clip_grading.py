"""Zero-shot accuracy of the small CLIP on new images, one prompt per answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miniature.clip_batches import true_of
from miniature.clip_model import SmallClip
from miniature.scenery.captions import ALONE
from miniature.scenery.render import as_tensor, dataset, render_batch
from miniature.scenery.scenes import BACKGROUNDS, COLOURS, KINDS, STYLES, Scene, SceneSpec
from miniature.scenery.vocabulary import LENGTH
from runtime.images import to_float
from runtime.seeds import derived_seed
from zeroshot.transduction import transduce

CHOICES = 100  # captions of which the most similar one should be true
CHUNK = 100  # images encoded at a time

ANSWERS: dict[str, dict[str, str]] = {
    "object": {kind: f"a photo of a {kind}." for kind in KINDS},
    "colour": {colour: f"a photo of a {colour} object." for colour in COLOURS},
    "background": {colour: f"a photo of an object on a {colour} background." for colour in BACKGROUNDS},
    "style": {style: f"a photo of an object in the style of {style}." for style in STYLES},
    "place": {place: f"a photo of an object {words[0]}." for place, words in ALONE.items()},
}


@torch.inference_mode()
def encode_images(clip: SmallClip, images: Tensor) -> Tensor:
    """Return the features [N,D], of length 1, of images [N,3,64,64] uint8."""
    device = clip.model.logit_scale.device
    return torch.cat(
        [clip.model.encode_image(to_float(part.to(device)), normalize=True) for part in images.split(CHUNK)]
    )


@torch.inference_mode()
def encode_texts(clip: SmallClip, texts: Sequence[str]) -> Tensor:
    """Return the features [N,D], of length 1, of texts cut after 77 tokens."""
    encoded = clip.tokenizer(list(texts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    device = clip.model.logit_scale.device
    features: Tensor = clip.model.encode_text(encoded["input_ids"].to(device), normalize=True)
    return features


def measure_rates(clip: SmallClip, count: int, seed: int, together: bool = False) -> dict[str, float]:
    """Return {question: share of right answers}, on `count` images each.

    `together` classifies all images of a question jointly, as `P3_clip_zeroshot.py --transduce` does. It does not affect captions.
    """
    singles = dataset(count, seed, SceneSpec(count=1, among=KINDS))
    features = encode_images(clip, as_tensor(singles.images))
    rates = {"object, held-out pairs": held_out_pairs(clip, count, seed, together)}
    for question in ANSWERS:
        rates[question] = _share(clip, question, features, singles.scenes, together)
    rates[f"caption, of {CHOICES}"] = matching(clip, count, seed + 1)
    return rates


def held_out_pairs(clip: SmallClip, count: int, seed: int, together: bool = False) -> float:
    """Return the accuracy on images of held-out (colour, object) pairs, by the prompt of `--prompts single`.

    The images are those of `world.py zeroshot` with this count and seed.
    """
    batches = [
        render_batch([derived_seed(seed, index)], SceneSpec(kinds=(KINDS[index % len(KINDS)],), pairs="held_out"))
        for index in range(count)
    ]
    images = torch.cat([as_tensor(each.images) for each in batches])
    return _share(clip, "object", encode_images(clip, images), [each.scenes[0] for each in batches], together)


def _share(clip: SmallClip, question: str, features: Tensor, scenes: Sequence[Scene], together: bool) -> float:
    """Return the share of right answers, among the images whose label is one of the question's answers."""
    answers, labels = list(ANSWERS[question]), [_label(scene, question) for scene in scenes]
    rows = [row for row, label in enumerate(labels) if label in answers]
    scores = features[rows] @ encode_texts(clip, list(ANSWERS[question].values())).T
    if together:
        scores = transduce(features[rows].cpu(), clip.model.logit_scale.exp().cpu() * scores.cpu())
    best = scores.argmax(1).tolist()
    return _mean([answers[index] == labels[row] for index, row in zip(best, rows, strict=True)])


def _label(scene: Scene, question: str) -> str:
    """Return the right answer to a question about a scene with one object."""
    thing = scene.things[0]
    labels = {"object": thing.kind, "colour": thing.colour, "background": scene.background.colour}
    return (labels | {"style": scene.style, "place": thing.place})[question]


def matching(clip: SmallClip, count: int, seed: int) -> float:
    """Return the share of images for which the most similar of 100 captions is true.

    These are the captions of the image and of 99 others.
    """
    batch = dataset(count, seed)
    images = encode_images(clip, as_tensor(batch.images))
    texts = encode_texts(clip, [each.text for each in batch.captions])
    right: list[bool] = []
    for start in range(0, count, CHOICES):
        part = slice(start, start + CHOICES)
        best = (images[part] @ texts[part].T).argmax(1).cpu()
        right += true_of(batch.scenes[part], batch.captions[part])[torch.arange(len(best)), best].tolist()
    return _mean(right)


def _mean(right: Sequence[bool]) -> float:
    return round(sum(right) / max(1, len(right)), 4)


def table(rates: dict[str, float]) -> str:
    """Return the rates as text, one line per question."""
    return "\n".join(f"{question:<28}{rate:>8.4f}" for question, rate in rates.items())
