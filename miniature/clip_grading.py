"""How well the small CLIP knows the world: zero-shot questions about fresh pictures, one prompt per answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miniature.clip_batches import true_of
from miniature.clip_model import SmallClip
from miniature.judge_model import to_float
from miniature.scenery.captions import ALONE
from miniature.scenery.render import as_tensor, batch, dataset
from miniature.scenery.scenes import BACKGROUNDS, COLOURS, KINDS, STYLES, Scene, SceneSpec
from miniature.scenery.vocabulary import LENGTH
from runtime.seeds import derived_seed

CHOICES = 100  # captions from which the right one is to be picked
CHUNK = 100  # pictures at once

ANSWERS: dict[str, dict[str, str]] = {
    "object": {kind: f"a photo of a {kind}." for kind in KINDS},
    "colour": {colour: f"a photo of a {colour} object." for colour in COLOURS},
    "background": {colour: f"a photo of an object on a {colour} background." for colour in BACKGROUNDS},
    "style": {style: f"a photo of an object in the style of {style}." for style in STYLES},
    "place": {place: f"a photo of an object {words[0]}." for place, words in ALONE.items()},
}


@torch.inference_mode()
def encode_pictures(clip: SmallClip, images: Tensor) -> Tensor:
    """[N,3,64,64] uint8 -> [N,D] of length 1."""
    device = clip.model.logit_scale.device
    return torch.cat(
        [clip.model.encode_image(to_float(part.to(device)), normalize=True) for part in images.split(CHUNK)]
    )


@torch.inference_mode()
def encode_texts(clip: SmallClip, texts: Sequence[str]) -> Tensor:
    """[N,D] of length 1; what is longer than 77 tokens is cut."""
    encoded = clip.tokenizer(list(texts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return clip.model.encode_text(encoded["input_ids"].to(clip.model.logit_scale.device), normalize=True)


def graded(clip: SmallClip, count: int, seed: int) -> dict[str, float]:
    """Question -> share of right answers, on `count` pictures each."""
    singles = dataset(count, seed, SceneSpec(count=1, among=KINDS))
    features = encode_pictures(clip, as_tensor(singles.images))
    rates = {"object, held-out pairs": held_out_pairs(clip, count, seed)}
    for question in ANSWERS:
        rates[question] = _share(clip, question, features, singles.scenes)
    rates[f"caption, of {CHOICES}"] = matching(clip, count, seed + 1)
    return rates


def held_out_pairs(clip: SmallClip, count: int, seed: int) -> float:
    """Share of right objects on the pictures of `world.py zeroshot` with this count and seed, by the prompt of `--prompts single`."""
    made = [
        batch([derived_seed(seed, index)], SceneSpec(kinds=(KINDS[index % len(KINDS)],), pairs="held_out"))
        for index in range(count)
    ]
    images = torch.cat([as_tensor(each.images) for each in made])
    return _share(clip, "object", encode_pictures(clip, images), [each.scenes[0] for each in made])


def _share(clip: SmallClip, question: str, features: Tensor, scenes: Sequence[Scene]) -> float:
    """Of the pictures to which the question has one of its answers."""
    answers = list(ANSWERS[question])
    right = [_truth(scene)[question] for scene in scenes]
    rows = [row for row, answer in enumerate(right) if answer in answers]
    found = (features[rows] @ encode_texts(clip, list(ANSWERS[question].values())).T).argmax(1).tolist()
    return _mean([answers[index] == right[row] for index, row in zip(found, rows, strict=True)])


def _truth(scene: Scene) -> dict[str, str]:
    """Of a scene with one object."""
    thing = scene.things[0]
    return {
        "object": thing.kind,
        "colour": thing.colour,
        "background": scene.background.colour,
        "style": scene.style,
        "place": thing.place,
    }


def matching(clip: SmallClip, count: int, seed: int) -> float:
    """Share of pictures of one to three objects for which the best of 100 captions is true."""
    made = dataset(count, seed)
    pictures = encode_pictures(clip, as_tensor(made.images))
    texts = encode_texts(clip, [each.text for each in made.captions])
    right: list[bool] = []
    for start in range(0, count, CHOICES):
        part = slice(start, start + CHOICES)
        best = (pictures[part] @ texts[part].T).argmax(1).cpu()
        also = true_of(made.scenes[part], made.captions[part])
        right += also[torch.arange(len(best)), best].tolist()
    return _mean(right)


def _mean(right: Sequence[bool]) -> float:
    return round(sum(right) / max(1, len(right)), 4)


def table(rates: dict[str, float]) -> str:
    """A line per question."""
    return "\n".join(f"{question:<28}{rate:>8.4f}" for question, rate in rates.items())
