"""Prompts that grade the miniature's diffusion model, and the share of images that show what their prompt names.

The judge, the classifier of miniature/judge_model.py, decides what an image shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import tyro
from torch import Tensor

from miniature.diffusion_parts import CLIP, PARTS
from miniature.judge_model import SHIPPED, WHOLE, SceneClassifier
from miniature.scenery.captions import with_article
from miniature.scenery.scenes import ALL_KINDS, BACKGROUNDS, COLOURS, HELD_OUT_PAIRS, KINDS, STYLES, allowed, fits
from runtime.device import Device

Pair = tuple[str, str]  # colour, kind
ANSWERS = {**WHOLE, "present": ALL_KINDS, "paints": tuple(COLOURS)}  # {question of SceneClassifier.whole: its answers}


@tyro.conf.configure(tyro.conf.subcommand(name="grade"))
@dataclass(frozen=True)
class GradeDiffusion:
    """Draw an image per prompt. A classifier, the judge, decides whether it shows what the prompt names."""

    clip: Path = CLIP
    """Folder of the small CLIP in transformers' form (train_clip.py convert)."""
    parts: Path = PARTS
    """Folder that holds vae/ and unet/."""
    judge: Path = SHIPPED
    """File of the judge."""
    count: int = 500
    """Prompts with one object, of a (colour, object) pair in the training images."""
    held_out: int = 240
    """Prompts with one object, of a held-out pair, which is in no training image."""
    scenes: int = 120
    """Prompts with one object, background and style."""
    couples: int = 120
    """Prompts with two objects."""
    guidance: float = 5.0
    """Guidance scale."""
    steps: int = 25
    """Steps of DPM-Solver++."""
    batch: int = 8
    """Images drawn at a time."""
    seed: int = 1
    device: Device = "auto"
    output: Path = Path("runs/miniature/diffusion/grade")
    """Folder for record.json and sheet.png."""


@dataclass(frozen=True)
class PromptCase:
    """A prompt, and the answers that the judge must give about its image."""

    group: str
    prompt: str
    expected: Mapping[str, tuple[str, ...]]  # {question: answers}; several answers only for "present" and "paints"


def cases_of(settings: GradeDiffusion) -> list[PromptCase]:
    """Return all prompts, group by group; the same for the same seed.

    Where a prompt names one object, the (colour, object) pairs take turns, so that none is missed.
    """
    random = Random(settings.seed)
    trained = [(c, k) for c in COLOURS for k in KINDS if allowed(c, k, "trained")]
    random.shuffle(trained)
    singles = [_single("trained pairs", trained[i % len(trained)]) for i in range(settings.count)]
    held_out = HELD_OUT_PAIRS
    rare = [_single("held-out pairs", held_out[i % len(held_out)]) for i in range(settings.held_out)]
    scenes = [_scene(trained[i % len(trained)], random) for i in range(settings.scenes)]
    return [*singles, *rare, *scenes, *(_couple(trained, random) for _ in range(settings.couples))]


def _single(group: str, pair: Pair) -> PromptCase:
    return PromptCase(group, f"a photo of {with_article(' '.join(pair))}", {"kind": pair[1:], "colour": pair[:1]})


def _scene(pair: Pair, random: Random) -> PromptCase:
    background = random.choice([b for b in BACKGROUNDS if fits(pair[0], b)])
    style = random.choice(STYLES)
    prompt = f"a photo of {with_article(' '.join(pair))} on a {background} background in the style of {style}"
    expected = {"kind": pair[1:], "colour": pair[:1], "background": (background,), "style": (style,)}
    return PromptCase("whole scenes", prompt, expected)


def _couple(pairs: Sequence[Pair], random: Random) -> PromptCase:
    first = random.choice(pairs)
    second = random.choice([p for p in pairs if p[0] != first[0] and p[1] != first[1]])
    expected = {"present": (first[1], second[1]), "paints": (first[0], second[0])}
    prompt = f"a photo of {with_article(' '.join(first))} next to {with_article(' '.join(second))}"
    return PromptCase("two objects", prompt, expected)


def rates_of(judge: SceneClassifier, images: Tensor, cases: Sequence[PromptCase]) -> dict[str, dict[str, float]]:
    """Return {group: {question: share of images with the expected answers}}.

    The question "all" is the share of images with all answers as expected.
    """
    answers = judge.whole(images)
    groups: dict[str, dict[str, list[bool]]] = {}
    for row, case in enumerate(cases):
        right = {question: holds(answers[question][row], question, words) for question, words in case.expected.items()}
        columns = groups.setdefault(case.group, {})
        for question, yes in (right | {"all": all(right.values())}).items():
            columns.setdefault(question, []).append(yes)
    return {g: {q: round(sum(yes) / len(yes), 4) for q, yes in columns.items()} for g, columns in groups.items()}


def holds(probabilities: Tensor, question: str, words: Sequence[str]) -> bool:
    """Return whether the judge's probabilities for one image give these answers.

    "present" and "paints" need more than 0.5 for each word. Other questions have one word, which must be the most probable answer.
    """
    if question in ("present", "paints"):
        return all(float(probabilities[ANSWERS[question].index(word)]) > 0.5 for word in words)
    return ANSWERS[question][int(probabilities.argmax())] == words[0]


def table(rates: dict[str, dict[str, float]]) -> str:
    """Return a line per group and question."""
    titles = {"kind": "object", "present": "both objects", "paints": "both colours"}
    lines = [f"{'share of images that are right':<40}{'':>8}"]
    for group, columns in rates.items():
        for question, rate in columns.items():
            lines.append(f"{group + ': ' + titles.get(question, question):<40}{rate:>8.3f}")
    return "\n".join(lines)
